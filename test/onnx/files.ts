/** A folder for the models of a test file, and texts to run through them. */
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import type { Model } from '../../lib/onnx/proto'
import { encodeModel } from '../../lib/onnx/proto'

/** The real model of the repository: 4 layers, 4 query heads, 2 kv heads of 64 channels, bytes as tokens. */
export const tinyLlama = join(__dirname, '../../models/tiny-llama-bytes')

/** Makes the folder before the tests of the file that calls this, and removes it after them. */
export function temporaryFolder(): { readonly path: string; save(model: Model): string } {
  let path = ''
  let files = 0
  before(() => { path = mkdtempSync(join(tmpdir(), 'couplet-onnx-')) })
  after(() => rmSync(path, { recursive: true }))
  return {
    get path() {
      return path
    },
    save(model) {
      const file = join(path, `${files++}.onnx`)
      writeFileSync(file, encodeModel(model))
      return file
    },
  }
}

/** Token ids below 61, in no simple order. */
export const ids = (length: number, seed = 7): number[] => Array.from({ length }, (_, i) => (i * i * seed + 31 * i) % 61)

/** Bytes [start, end) of an English text. */
export const prose = (start: number, end: number): number[] =>
  [...Buffer.from('The pages of a cache hold the codes of a fixed number of tokens; a table maps each token to its page. '.repeat(24))].slice(start, end)

/**
 * A codebook from a file: whatever `couplet calibrate` or `couplet tune` wrote for the model, in the table beside plain CQ. Keys before
 * rotary embedding. Bits: b / c of each side, nothing else a token.
 */
import { createHash } from 'node:crypto'
import { readFileSync } from 'node:fs'
import path from 'node:path'
import { Codebook } from '../../../lib/codebook'
import type { Method, Quantizer } from './method'
import { toCentroids } from './product'

/** `identity` is of the file's bytes: another file of the same name is measured again. */
export function codebookFile(file: string): Method & { identity: string } {
  const bytes = readFileSync(file)
  using given = Codebook.fromBuffer(bytes)
  const { keyCodec, valueCodec } = given
  return {
    name: path.basename(file).replace(/\.safetensors$/, ''),
    width: (keyCodec.bitsPerChannel + valueCodec.bitsPerChannel) / 2,
    file: 'codebook.ts', rotated: false,
    identity: createHash('sha256').update(bytes).digest('hex'),
    fit: ({ captured, threads }): Promise<Quantizer> => {
      const codebook = Codebook.fromBuffer(bytes)
      const { layers, kvHeads, headDim, rotary } = captured.model.shape
      codebook.check({ layers, kvHeads, headDim, rotary, model: captured.model.fingerprint })
      const numbers = Array.from({ length: layers }, (_, layer) => layer)
      const sides = {
        key: { codec: keyCodec, tables: numbers.map((layer) => codebook.keyTable(layer)) },
        value: { codec: valueCodec, tables: numbers.map((layer) => codebook.valueTable(layer)) },
      }
      return Promise.resolve({
        tableBytes: Object.values(sides).flatMap((side) => side.tables).reduce((sum, { byteLength }) => sum + byteLength, 0),
        quantize: (rows, { layer, side }) => toCentroids(rows, { codec: sides[side].codec, data: sides[side].tables[layer]! }, threads),
      })
    },
  }
}

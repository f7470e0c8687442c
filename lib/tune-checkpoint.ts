/** The state of a tuning as a safetensors file, from which it goes on as if it had not been interrupted. */
import { readFile, rm } from 'node:fs/promises'

import { codeOf, rangeError } from './errors'
import { unlessLocked } from './file-lock'
import { writeAtomically } from './files'
import { sides } from './gradient/attention'
import type { Tables } from './gradient/coded'
import { FormatError, headerBytes, lengthBytes, parseHeader, writeHeader } from './safetensors'

/** What a tuning is told; a checkpoint belongs to one set of these. */
export type TuneSettings = Record<string, string | number>

/** Tables that a checkpoint holds: the current ones, Adam's two means, and the best ones. */
export type TuneTables = Record<'current' | 'mean' | 'square' | 'best', Tables>
const kinds = ['current', 'mean', 'square', 'best'] as const

export interface TuneProgressState {
  /** Steps done. */
  step: number
  /** Held-out loss before the first step, and of the best tables. */
  before: number
  best: number
  /** The step that gave the best tables, 0 for the ones to begin with. */
  bestStep: number
}

const format = 'couplet.tune'

export async function writeCheckpoint(path: string, settings: TuneSettings, state: TuneProgressState, tables: TuneTables): Promise<void> {
  const named = namedTables(tables)
  const header = writeHeader(named.map(({ name, data }) => ({ name, dtype: 'F32', shape: [data.length] })), {
    format, settings: JSON.stringify(settings), state: JSON.stringify(state),
  })
  await writeAtomically(path, [header, ...named.map(({ data }) => new Uint8Array(data.buffer, data.byteOffset, data.byteLength))])
}

/**
 * Reads a checkpoint into `tables`.
 * @returns undefined when there is no such file.
 * @throws {RangeError} `ERR_COUPLET_INVALID_ARGUMENT` for a file that is none, or that belongs to other settings, naming them
 */
export async function readCheckpoint(path: string, settings: TuneSettings, tables: TuneTables): Promise<TuneProgressState | undefined> {
  let file: Uint8Array
  try {
    file = await readFile(path)
  } catch (error) {
    if (codeOf(error) === 'ENOENT') return undefined
    throw error
  }
  try {
    const header = parseHeader(file.subarray(lengthBytes, lengthBytes + headerBytes(file, file.length)), file.length)
    const { metadata } = header
    if (metadata.get('format') !== format) throw new FormatError(`its __metadata__ has no "format" that is "${format}"`)
    const known = JSON.parse(metadata.get('settings') ?? '{}') as TuneSettings
    const other = Object.keys(settings).filter((name) => known[name] !== settings[name])
    if (other.length > 0) throw new FormatError(other.map((name) => `${name} was ${known[name] ?? 'not there'} and is ${settings[name]!}`).join(', '))
    for (const { name, data } of namedTables(tables)) {
      const tensor = header.tensors.get(name)
      if (tensor?.dtype !== 'F32' || tensor.end - tensor.begin !== data.byteLength) throw new FormatError(`it has no tensor "${name}" of ${data.length} elements`)
      new Uint8Array(data.buffer, data.byteOffset, data.byteLength).set(file.subarray(header.dataOffset + tensor.begin, header.dataOffset + tensor.end))
    }
    return JSON.parse(metadata.get('state') ?? '') as TuneProgressState
  } catch (error) {
    if (!(error instanceof FormatError) && !(error instanceof SyntaxError)) throw error
    throw Object.assign(rangeError(`Expected a checkpoint of this tuning for \`checkpoint\` but received "${path}": ${error.message}`), { cause: error })
  }
}

/** Unless another tuning has begun with it since. */
export async function removeTuneCheckpoint(path: string): Promise<void> {
  await unlessLocked(path, 'checkpoint', () => rm(path, { force: true }))
}

function namedTables(tables: TuneTables): { name: string; data: Float32Array }[] {
  return kinds.flatMap((kind) => sides.flatMap((side) => tables[kind][side].map((data, layer) => ({ name: `${kind}.layers.${layer}.${side}`, data }))))
}

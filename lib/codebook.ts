import { isArray, requireObject, requireText } from './arguments'
import type { CodebookContents } from './codebook-file'
import { readBuffer, readFile, readFileSync, tableElements, writeBuffer, writeFile, writeFileSync } from './codebook-file'
import type { CodebookMetadata, CodebookShape, LearnedFrom, RotarySpec } from './codebook-metadata'
import { readMetadata, readShape, writeMetadata } from './codebook-metadata'
import type { Codec, CodecLike } from './codec'
import { codec } from './codec'
import { CoupletError, describe, disposedError, throwExpected, typeError } from './errors'
import { parseJson } from './json'
import { requireSignal } from './native/call'
import type { TensorType } from './safetensors'

export type { CodebookMetadata, LearnedFrom, RotarySpec }

/** Where the tables of {@link Codebook.fromTables} come from. */
export interface CodebookTables {
  /** One per layer: float32 [kvHeads][groups][centroids][groupChannels]. Copied. */
  keyTables: readonly Float32Array[]
  valueTables: readonly Float32Array[]
  keyCodec: CodecLike
  valueCodec: CodecLike
  kvHeads: number
  headDim: number
  metadata?: Partial<CodebookMetadata> | undefined
}

/** What a model needs of a codebook; what is absent is not compared. */
export interface ExpectedCodebook {
  layers?: number
  kvHeads?: number
  headDim?: number
  rotary?: RotarySpec | null
  /** Fingerprint of the model. */
  model?: string
}

export interface SaveOptions {
  /** 'F16' halves the file and rounds the centroids; default 'F32'. */
  dtype?: TensorType | undefined
}

/**
 * All centroid tables of a model: [layer][key or value][kvHead][group][centroid][groupChannels].
 *
 * Its file is a safetensors file, which Python's safetensors opens as well (docs/layout.md). Files are refused with
 * `ERR_COUPLET_CODEBOOK_INVALID` when they are not sound, and with `ERR_COUPLET_CODEBOOK_MISMATCH` when they are of another
 * format version.
 */
export class Codebook {
  readonly keyCodec: Codec
  readonly valueCodec: Codec
  readonly layers: number
  readonly kvHeads: number
  readonly headDim: number
  readonly metadata: CodebookMetadata
  #contents: CodebookContents | undefined

  private constructor(contents: CodebookContents) {
    const { keyCodec, valueCodec, layers, kvHeads, headDim } = contents.shape
    this.keyCodec = keyCodec
    this.valueCodec = valueCodec
    this.layers = layers
    this.kvHeads = kvHeads
    this.headDim = headDim
    this.metadata = contents.metadata
    this.#contents = contents
  }

  /** Reads a file. Rejects with the reason of `signal` when that fires before the end. */
  static async load(path: string, options: { signal?: AbortSignal | undefined } = {}): Promise<Codebook> {
    requireText(path, 'path')
    requireObject(options, 'options')
    requireSignal(options.signal)
    return new Codebook(await readFile(path, options.signal))
  }

  /** {@link load}, blocking. */
  static loadSync(path: string): Codebook {
    requireText(path, 'path')
    return new Codebook(readFileSync(path))
  }

  /** The bytes of a file; they are copied. */
  static fromBuffer(data: Uint8Array): Codebook {
    if (!isArray(data, Uint8Array)) throwExpected('a Uint8Array', 'data', data)
    return new Codebook(readBuffer(data))
  }

  /**
   * A codebook of tables that were learned or made elsewhere.
   * @throws {CoupletError} `ERR_COUPLET_NOT_FINITE` with the layer, for a NaN or an infinity
   * @throws {TypeError | RangeError} `ERR_COUPLET_INVALID_ARGUMENT`
   */
  static fromTables(tables: CodebookTables): Codebook {
    requireObject(tables, 'tables')
    const { keyTables, valueTables, kvHeads, headDim, metadata } = tables
    if (metadata !== undefined) requireObject(metadata, 'metadata')
    const keyCodec = codec(tables.keyCodec)
    const valueCodec = codec(tables.valueCodec)
    if (!Array.isArray(keyTables)) throwExpected('an array', 'keyTables', keyTables)
    if (!Array.isArray(valueTables)) throwExpected('an array', 'valueTables', valueTables)
    const shape = readShape({ keyCodec, valueCodec, layers: keyTables.length, kvHeads, headDim })
    if (valueTables.length !== shape.layers) throwExpected(`${shape.layers} tables`, 'valueTables.length', valueTables.length, true)
    return new Codebook({
      shape,
      metadata: checkedMetadata(shape, metadata),
      keyTables: keyTables.map((table, layer) => checkedTable(table, 'keyTables', layer, tableElements(shape, keyCodec))),
      valueTables: valueTables.map((table, layer) => checkedTable(table, 'valueTables', layer, tableElements(shape, valueCodec))),
    })
  }

  /** Writes a file: under another name, then renamed, so that `path` never holds half of one. */
  async save(path: string, options: SaveOptions = {}): Promise<void> {
    requireText(path, 'path')
    await writeFile(path, this.#use(), tensorType(options))
  }

  /** {@link save}, blocking. */
  saveSync(path: string, options: SaveOptions = {}): void {
    requireText(path, 'path')
    writeFileSync(path, this.#use(), tensorType(options))
  }

  /** The bytes that {@link save} writes. */
  toBuffer(options: SaveOptions = {}): Uint8Array {
    return writeBuffer(this.#use(), tensorType(options))
  }

  /** float32 [kvHeads][groups][centroids][groupChannels] of the key side of a layer; the codebook's own memory, not to be written. */
  keyTable(layer: number): Float32Array {
    return tableOf(this.#use().keyTables, layer)
  }

  /** Likewise of the value side. */
  valueTable(layer: number): Float32Array {
    return tableOf(this.#use().valueTables, layer)
  }

  /**
   * Compares with what a model needs.
   * @throws {CoupletError} `ERR_COUPLET_CODEBOOK_MISMATCH`, naming both sides of every difference
   */
  check(expected: ExpectedCodebook): void {
    requireObject(expected, 'expected')
    const { layers, kvHeads, headDim, metadata } = this
    const known = { layers, kvHeads, headDim, rotary: metadata.rotary, model: metadata.model }
    const names = (['layers', 'kvHeads', 'headDim', 'rotary', 'model'] as const).filter((name) => differs(expected[name], known[name]))
    if (names.length === 0) return
    const side = (values: ExpectedCodebook | typeof known): string => names.map((name) => `${name} ${jsonText(values[name])}`).join(', ')
    throw new CoupletError('ERR_COUPLET_CODEBOOK_MISMATCH', `Expected a codebook for ${side(expected)} but received one for ${side(known)}`)
  }

  /** Lets the tables go; using them afterwards throws `ERR_COUPLET_DISPOSED`. Caches made of this codebook keep their own. */
  dispose(): void {
    this.#contents = undefined
  }

  [Symbol.dispose](): void {
    this.dispose()
  }

  #use(): CodebookContents {
    if (this.#contents === undefined) throw disposedError('codebook')
    return this.#contents
  }
}

function checkedMetadata(shape: CodebookShape, given: Partial<CodebookMetadata> = {}): CodebookMetadata {
  const { rotary = null, model = null, learned = null } = given
  // Through the text that a file would hold: what a file could not say is refused here already.
  return readMetadata(parseJson(metadataText(shape, { formatVersion: 1, rotary, model, learned }))).metadata
}

function metadataText(shape: CodebookShape, metadata: CodebookMetadata): string {
  try {
    return writeMetadata(shape, metadata)
  } catch (cause) { // a bigint, a circle
    throw Object.assign(typeError(`Expected values that JSON can hold for \`metadata\`: ${cause instanceof Error ? cause.message : String(cause)}`), { cause })
  }
}

/** For a sentence: what JSON cannot hold is described. */
function jsonText(value: unknown): string {
  try {
    return JSON.stringify(value)
  } catch {
    return describe(value)
  }
}

function checkedTable(table: unknown, name: string, layer: number, elements: number): Float32Array {
  if (!isArray(table, Float32Array)) throw typeError(`Expected Float32Arrays for \`${name}\` but received another value at layer ${layer}`)
  if (table.length !== elements) throwExpected(`a Float32Array of ${elements} elements`, `${name}[${layer}]`, table, true)
  if (!table.every(Number.isFinite))
    throw new CoupletError('ERR_COUPLET_NOT_FINITE', `Expected finite numbers for \`${name}[${layer}]\` but received a NaN or an infinity`, { layer })
  return table.slice()
}

function tableOf(tables: Float32Array[], layer: number): Float32Array {
  return tables[layer] ?? throwExpected(`an integer from 0 to ${tables.length - 1}`, 'layer', layer, typeof layer === 'number')
}

function tensorType({ dtype = 'F32' }: SaveOptions): TensorType {
  if (!['F16', 'F32'].includes(dtype)) throwExpected('"F16" or "F32"', 'dtype', dtype, typeof dtype === 'string')
  return dtype
}

/** What one side does not state is no difference; rotary is compared member by member in the same way. */
function differs(expected: unknown, known: unknown): boolean {
  if (expected === undefined || expected === null || known === undefined || known === null) return false
  if (typeof expected !== 'object') return expected !== known
  return Object.keys(expected).some((name) => differs(expected[name as keyof typeof expected], known[name as keyof typeof known]))
}

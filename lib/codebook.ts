import { isArray, requireInteger, requireObject, requireText } from './arguments'
import type { CodebookContents } from './codebook-file'
import { readBuffer, readFile, readFileSync, tableElements, writeBuffer, writeFile, writeFileSync } from './codebook-file'
import type { CodebookMetadata, CodebookShape, GivenCodecs, KeyOrders, LearnedFrom, RotarySpec } from './codebook-metadata'
import { formatVersionOf, readMetadata, readShape, writeMetadata } from './codebook-metadata'
import type { TransformName, Transforms } from './codebook-transforms'
import { checkedTransforms, transformElements } from './codebook-transforms'
import type { Codec, CodecLike, HeadCodecs, HeadCodecsLike, LayerCodecs } from './codec'
import { commonCodec } from './codec'
import { CoupletError, describe, disposedError, throwExpected, typeError } from './errors'
import { parseJson } from './json'
import { requireSignal } from './native/call'
import type { TensorType } from './safetensors'

export type { CodebookMetadata, LearnedFrom, RotarySpec, TransformName, Transforms }

/** Where the tables of {@link Codebook.fromTables} come from. */
export interface CodebookTables {
  /** One per layer: float32 [kvHeads][groups][centroids][groupChannels], or its parts one after another, each of its heads. Copied. */
  keyTables: readonly Float32Array[]
  valueTables: readonly Float32Array[]
  /** Of all layers and heads; or `codecs`. */
  keyCodec?: CodecLike | undefined
  valueCodec?: CodecLike | undefined
  /** Of every layer its parts, which cover its kv heads in their order. */
  codecs?: readonly (readonly HeadCodecsLike[])[] | undefined
  /** Steps beside the tables (docs/codebook.md), of every layer one array. Copied; default none. */
  transforms?: Transforms | undefined
  kvHeads: number
  headDim: number
  metadata?: Partial<CodebookMetadata> | undefined
}

/** A part of a layer with its tables, float32 [heads][groups][centroids][groupChannels]: the codebook's own memory, not to be written. */
export interface CodebookPart extends HeadCodecs {
  readonly keyTable: Float32Array
  readonly valueTable: Float32Array
  /** float32 [heads][groups][groupChannels][groupChannels] of what encode calls near; undefined: the plain distance. */
  readonly keyMetric: Float32Array | undefined
  readonly valueMetric: Float32Array | undefined
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
  /** Of all layers and heads; undefined where they differ. */
  readonly keyCodec: Codec | undefined
  readonly valueCodec: Codec | undefined
  /** Of every layer, one part for its kv heads, or several that differ. */
  readonly codecs: LayerCodecs
  /** Names of the steps that all layers have beside their tables. */
  readonly transforms: readonly TransformName[]
  readonly layers: number
  readonly kvHeads: number
  readonly headDim: number
  readonly metadata: CodebookMetadata
  #contents: CodebookContents | undefined

  private constructor(contents: CodebookContents) {
    const { codecs, transforms, layers, kvHeads, headDim } = contents.shape
    this.keyCodec = commonCodec(codecs, 'keyCodec')
    this.valueCodec = commonCodec(codecs, 'valueCodec')
    this.codecs = codecs
    this.transforms = transforms
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
    if (!Array.isArray(keyTables)) throwExpected('an array', 'keyTables', keyTables)
    if (!Array.isArray(valueTables)) throwExpected('an array', 'valueTables', valueTables)
    const plain = readShape({ ...givenCodecs(tables), layers: keyTables.length, kvHeads, headDim, transforms: [] })
    if (tables.transforms !== undefined) requireObject(tables.transforms, 'transforms')
    const transforms = checkedTransforms(tables.transforms ?? {}, plain.codecs, plain.headDim)
    const shape = { ...plain, transforms: Object.freeze(Object.keys(transforms) as TransformName[]) }
    const checked = (list: readonly Float32Array[], side: 'key' | 'value') =>
      list.map((table, layer) => checkedTable(table, `${side}Tables`, layer, tableElements(shape.codecs[layer]!, shape.headDim, side)))
    if (valueTables.length !== shape.layers) throwExpected(`${shape.layers} tables`, 'valueTables.length', valueTables.length, true)
    return new Codebook({
      shape,
      metadata: checkedMetadata(shape, metadata, transforms['key.group']),
      keyTables: checked(keyTables, 'key'),
      valueTables: checked(valueTables, 'value'),
      transforms,
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

  /**
   * float32 [kvHeads][groups][centroids][groupChannels] of the key side of a layer, or that of its parts one after another: of keys in the
   * order of `transform('key.group', layer)` where there is one. The codebook's own memory, not to be written.
   */
  keyTable(layer: number): Float32Array {
    return tableOf(this.#use().keyTables, layer)
  }

  /** Likewise of the value side: of values that `value.mix` has mixed. */
  valueTable(layer: number): Float32Array {
    return tableOf(this.#use().valueTables, layer)
  }

  /** What a step has for a layer, its parts one after another (docs/codebook.md); undefined without that step. Not to be written. */
  transform(name: 'key.group', layer: number): Int32Array | undefined
  transform(name: Exclude<TransformName, 'key.group'>, layer: number): Float32Array | undefined
  transform(name: TransformName, layer: number): Float32Array | Int32Array | undefined
  transform(name: TransformName, layer: number): Float32Array | Int32Array | undefined {
    const arrays = this.#use().transforms[name]
    return arrays && tableOf<Float32Array | Int32Array>(arrays, layer)
  }

  /** The parts of a layer, each with its own tables. */
  parts(layer: number): CodebookPart[] {
    const [keys, values] = [this.keyTable(layer), this.valueTable(layer)]
    const rest = { key: 0, value: 0, 'key.metric': 0, 'value.metric': 0 }
    const take = (table: Float32Array, side: 'key' | 'value', part: HeadCodecs): Float32Array =>
      table.subarray(rest[side], rest[side] += tableElements([part], this.headDim, side))
    const metric = (side: 'key' | 'value', part: HeadCodecs): Float32Array | undefined => {
      const name = `${side}.metric` as const
      return this.transform(name, layer)?.subarray(rest[name], rest[name] += transformElements(name, [part], this.headDim))
    }
    return this.codecs[layer]!.map((part) => ({
      ...part,
      keyTable: take(keys, 'key', part), valueTable: take(values, 'value', part),
      keyMetric: metric('key', part), valueMetric: metric('value', part),
    }))
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

function checkedMetadata(shape: CodebookShape, given: Partial<CodebookMetadata> = {}, orders?: KeyOrders): CodebookMetadata {
  const { rotary = null, model = null, learned = null } = given
  // Through the text that a file would hold: what a file could not say is refused here already.
  return readMetadata(parseJson(metadataText(shape, { formatVersion: formatVersionOf(shape), rotary, model, learned }, orders))).metadata
}

function givenCodecs({ keyCodec, valueCodec, codecs }: CodebookTables): GivenCodecs {
  if (codecs === undefined) return { keyCodec: keyCodec as CodecLike, valueCodec: valueCodec as CodecLike }
  if (keyCodec !== undefined || valueCodec !== undefined) throwExpected('either `codecs` or `keyCodec` and `valueCodec`', 'codecs', codecs)
  if (!Array.isArray(codecs)) throwExpected('an array', 'codecs', codecs)
  codecs.forEach((parts, layer) => {
    if (!Array.isArray(parts)) throwExpected('an array', `codecs[${layer}]`, parts)
    parts.forEach((part) => { requireObject(part, `codecs[${layer}]`) })
  })
  return { codecs }
}

function metadataText(shape: CodebookShape, metadata: CodebookMetadata, orders: KeyOrders | undefined): string {
  try {
    return writeMetadata(shape, metadata, orders)
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

function tableOf<Table>(tables: readonly Table[], layer: number): Table {
  requireInteger(layer, 'layer', 0, tables.length - 1)
  return tables[layer]!
}

function tensorType(options: SaveOptions): TensorType {
  requireObject(options, 'options')
  const { dtype = 'F32' } = options
  if (!['F16', 'F32'].includes(dtype)) throwExpected('"F16" or "F32"', 'dtype', dtype, typeof dtype === 'string')
  return dtype
}

/** What one side does not state is no difference; rotary is compared member by member in the same way. */
function differs(expected: unknown, known: unknown): boolean {
  if (expected === undefined || expected === null || known === undefined || known === null) return false
  if (typeof expected !== 'object') return expected !== known
  return Object.keys(expected).some((name) => differs(expected[name as keyof typeof expected], known[name as keyof typeof known]))
}

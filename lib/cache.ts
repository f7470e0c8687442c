/** The KV cache of many sequences, coded, and the steps that new tokens enter it by. */
import { isArray, requireArray, requireInteger, requireList, requireObject, resultArray } from './arguments'
import { Codebook } from './codebook'
import type { RotarySpec } from './codebook'
import type { MatrixName } from './codebook-transforms'
import { transformNames } from './codebook-transforms'
import type { HeadCodecs, LayerCodecs } from './codec'
import type { Rows } from './codes'
import { dtypeOf, rowsOf } from './codes'
import type { DeviceMemory, DeviceName, DeviceOptions, ElementType, StreamOption } from './device'
import { isDeviceMemory, placeOf } from './device'
import { CoupletError, describe, rangeError, throwExpected, typeError } from './errors'
import { addon } from './native/addon'
import type {
  NativeAttendArguments, NativeCache, NativeCodebook, NativeCodebookArguments, NativeLayerOptions, NativeOrderedRotary, NativeRotary,
  NativeRows, NativeSequence, NativeStep,
} from './native/cache'
import type { NativeDevice } from './native/device'
import { abortable, refusePromiseOptions } from './native/call'
import { pairOrder } from './rotary-pairs'

const int32Max = 2 ** 31 - 1

/** As many as a codebook file may claim; each gets an entry on the JavaScript heap. */
const mostLayers = 65536

/** Positions that angles are prepared for when only `theta` is given. */
const defaultPositions = 2 ** 20

/**
 * Rotary position embedding of queries and keys. (x, y) of pair i at position t becomes (x cos - y sin, y cos + x sin), the angle being
 * t * theta ** (-2 i / dim), or whatever the tables say (linear, dynamic, llama3, yarn, longrope scaling). null: none.
 */
export type RotaryOption =
  | {
    /** half: channel i pairs with i + dim / 2 (Llama, Qwen). interleaved: 2i pairs with 2i + 1 (GPT-J). */
    kind: 'half' | 'interleaved'
    /** Channels that are rotated, the first ones of a head; even; default headDim. */
    dim?: number | undefined
    theta: number
    /** First position that is refused; default 2 ** 20. */
    positions?: number | undefined
  }
  | {
    kind: 'half' | 'interleaved'
    dim?: number | undefined
    /** float32 [positions][dim / 2], copied. */
    cos: Float32Array
    /** float32 [positions][dim / 2], copied. */
    sin: Float32Array
  }
  | null

/** How one layer attends. */
export interface LayerOptions {
  /** Factor of the logits; default 1 / sqrt(headDim). */
  scale?: number | undefined
  /** logit = softcap * tanh(logit / softcap); default 0, none. */
  softcap?: number | undefined
  /** Newest tokens that a query sees, its own among them; default 0, all. */
  localWindow?: number | undefined
  /** float32 [queryHeads], copied: one more logit in the softmax of each head, with no value behind it. */
  headSinks?: Float32Array | undefined
  /** Default the cache's. */
  rotary?: RotaryOption | undefined
}

export interface CacheOptions extends DeviceOptions {
  /** Codes keys and values. Without it everything stays in full precision. The cache keeps its own copy of the tables. */
  codebook?: Codebook | undefined
  /** Default the codebook's; likewise kvHeads and headDim. */
  layers?: number | undefined
  /** A multiple of kvHeads: query head h reads kv head floor(h * kvHeads / queryHeads). */
  queryHeads: number
  kvHeads?: number | undefined
  /** Channels of a head: 32 to 256 in steps of 8. */
  headDim?: number | undefined
  /** First tokens of a sequence that stay in full precision; default 4. */
  sinks?: number | undefined
  /** Last tokens of a sequence that stay in full precision; Infinity for all. Default 32, and Infinity without a codebook. */
  window?: number | undefined
  /** Bytes that pages and full-precision tokens of all sequences may take together; default no limit. */
  memory?: number | undefined
  rotary?: RotaryOption | undefined
  /** Threads that one call uses; default 0, all cores. */
  threads?: number | undefined
  /** For all layers, or one for each. */
  layerOptions?: LayerOptions | readonly LayerOptions[] | undefined
}

/**
 * How the new tokens of a step meet each other: `exact`, all in full precision, or `coded`, as if they had come one by one. Older tokens are
 * read alike in both: from codes once they have left the window of the query.
 */
export type Prefill = 'exact' | 'coded'

export interface StepRow {
  sequence: Sequence
  /** New tokens; 0 takes part with nothing to do. */
  tokens: number
}

/**
 * Rows of a call: float32, or for a cache on a GPU also the bits of float16 or bfloat16; in arrays, or in memory of the cache's device. All
 * inputs of a call are of one kind, and all outputs.
 */
export type CacheRows = Rows | DeviceMemory

/** Keys (before rotary) and values of the new tokens of one sequence in one layer: [tokens][kvHeads][headDim]. */
export interface AppendRow {
  keys: CacheRows
  values: CacheRows
}

export interface AttendRow<Out extends CacheRows = Float32Array> extends AppendRow {
  /** [tokens][queryHeads][headDim], before rotary. */
  queries: CacheRows
  /** [tokens][queryHeads][headDim], receives the result; default a new array. May not overlap an input. */
  out?: Out | undefined
}

export interface AppendSyncOptions extends StreamOption {
  /** Elements of keys, values and queries; default what their memory says, 'float16' for a Uint16Array, else 'float32'. */
  dtype?: ElementType | undefined
}

export interface AppendOptions extends AppendSyncOptions {
  /** Rejects with its reason. A layer that had begun cannot be repeated: the step can then only be aborted. */
  signal?: AbortSignal | undefined
}

export interface AttendSyncOptions extends AppendSyncOptions {
  /** Elements of the result; default that of `out`, or 'float32'. A new array of another type is a Uint16Array of its bits. */
  outDtype?: ElementType | undefined
}

export interface AttendOptions extends AttendSyncOptions, AppendOptions {}

/** What a cache holds. Bytes count what was allocated, so padding and slots not used yet are in them; shared blocks count once. */
export interface CacheStatistics {
  sequences: number
  /** Over all sequences; what forks share counts for each. codedTokens + rawTokens. */
  tokens: number
  codedTokens: number
  rawTokens: number
  /** Bytes of codes. */
  pageBytes: number
  /** Bytes of full-precision tokens: sinks and windows. */
  rawBytes: number
  /** Bytes of centroids as the backend keeps them, once for all caches of the same {@link Codebook}. */
  codebookBytes: number
  /** Page tables, block headers, scratch of attention, blocks that a GPU keeps for the next ones: an estimate from below. */
  bookkeepingBytes: number
  /** The `memory` option; Infinity without a limit. pageBytes + rawBytes stays within it. */
  budgetBytes: number
  /** Highest pageBytes + rawBytes so far. */
  peakBytes: number
  /** 8 * (pageBytes + rawBytes + codebookBytes) / (tokens * layers * 2 * kvHeads * headDim); 0 without tokens. */
  bitsPerChannel: number
}

/**
 * Keys and values of many sequences: codes in pages, with the first `sinks` and last `window` tokens in full precision, and attention
 * computed on the codes. New tokens enter in steps:
 *
 * ```ts
 * using cache = new Cache({ codebook, queryHeads: 32, rotary: { kind: 'half', theta: 500000 } })
 * const sequence = cache.sequence()
 * using step = cache.begin([{ sequence, tokens: 1 }])
 * for (let layer = 0; layer < cache.layers; layer++) {
 *   const [output] = await step.attend(layer, [{ queries, keys, values }])
 *   // ... the rest of the layer
 * }
 * step.commit()
 * ```
 */
export class Cache {
  readonly layers: number
  readonly queryHeads: number
  readonly kvHeads: number
  readonly headDim: number
  readonly sinks: number
  /** Infinity: everything in full precision. */
  readonly window: number
  /** Where its memory is: 'cpu' or 'cuda'. */
  readonly device: Exclude<DeviceName, 'auto'>
  readonly deviceIndex: number
  /** @internal */
  readonly native: NativeCache
  /** @internal */
  readonly codebook: Codebook | undefined

  /**
   * Blocks while the tables of a codebook that no cache on the device has yet are made ready; {@link Cache.create} does not.
   * @throws {CoupletError} `ERR_COUPLET_CODEBOOK_MISMATCH` when the codebook and the other options disagree
   * @throws {TypeError | RangeError} `ERR_COUPLET_INVALID_ARGUMENT`
   */
  constructor(options: CacheOptions) {
    requireObject(options, 'options')
    const { codebook, queryHeads, sinks = 4, threads, memory = Infinity, rotary } = options
    if (codebook !== undefined && !(codebook instanceof Codebook)) throwExpected('a Codebook', 'codebook', codebook)
    const { layers = codebook?.layers, kvHeads = codebook?.kvHeads, headDim = codebook?.headDim } = options
    const { window = codebook === undefined ? Infinity : 32 } = options
    requireInteger(layers, 'layers', 1, mostLayers)
    requireInteger(kvHeads, 'kvHeads', 1)
    requireInteger(headDim, 'headDim', 32, 256)
    requireInteger(queryHeads, 'queryHeads', 1)
    requireInteger(sinks, 'sinks', 0)
    if (window !== Infinity) requireInteger(window, 'window', 0)
    if (threads !== undefined) requireInteger(threads, 'threads', 0, 256)
    if (memory !== Infinity) requireInteger(memory, 'memory', 1, Number.MAX_SAFE_INTEGER)
    if (rotary !== undefined && rotary !== null) requireObject(rotary, 'rotary')
    const attention = nativeLayers(options.layerOptions, layers, { queryHeads, headDim, rotary, codebook })
    codebook?.check({ layers, kvHeads, headDim, ...(rotary && { rotary: rotarySpec(rotary, headDim) }) })

    const place = addon().findDevice({ device: options.device, deviceIndex: options.deviceIndex })
    this.device = place.device as Exclude<DeviceName, 'auto'>
    this.deviceIndex = place.deviceIndex
    this.codebook = codebook
    this.layers = layers
    this.queryHeads = queryHeads
    this.kvHeads = kvHeads
    this.headDim = headDim
    this.sinks = sinks
    this.window = window
    this.native = addon().createCache({
      codebook: codebook && nativeCodebook(codebook, place),
      ...attention,
      config: {
        layers,
        queryHeads,
        kvHeads,
        headDim,
        sinks,
        window: window === Infinity ? -1 : window,
        threads,
        memory: memory === Infinity ? undefined : memory,
      },
      ...place,
    })
  }

  /**
   * As the constructor, but the tables of a codebook that no cache on the device has yet are made ready, and taken there, off the JavaScript thread.
   * Leave the codebook's tables alone until then.
   * @throws what the constructor throws
   */
  static async create(options: CacheOptions): Promise<Cache> {
    requireObject(options, 'options')
    const { codebook, device, deviceIndex } = options
    if (codebook instanceof Codebook) await prepareCodebook(codebook, addon().findDevice({ device, deviceIndex }))
    return new Cache(options)
  }

  /** An empty sequence. */
  sequence(): Sequence {
    return new Sequence(this, addon().createSequence(this.native))
  }

  /**
   * Opens a step that adds new tokens to some sequences. All memory that it needs is reserved here. Until the step is committed or
   * aborted its sequences refuse everything else with `ERR_COUPLET_BUSY`.
   * @param rows each sequence once
   * @throws {CoupletError} `ERR_COUPLET_CACHE_FULL` when `memory` does not suffice; nothing has changed then
   */
  begin(rows: readonly StepRow[], options: { prefill?: Prefill | undefined } = {}): Step {
    requireObject(options, 'options')
    const { prefill = 'exact' } = options
    if (!['exact', 'coded'].includes(prefill)) throwExpected('"exact" or "coded"', 'prefill', prefill)
    requireList(rows, 'rows')
    const entries = rows.map((row) => {
      requireObject(row, 'rows')
      if (!(row.sequence instanceof Sequence)) throwExpected('a Sequence', 'sequence', row.sequence)
      requireInteger(row.tokens, 'tokens', 0)
      return { sequence: row.sequence, tokens: row.tokens }
    })
    const native = addon().beginStep({
      cache: this.native,
      rows: entries.map(({ sequence, tokens }) => ({ sequence: sequence.native, tokens })),
      prefill,
    })
    return new Step(this, native, entries)
  }

  statistics(): CacheStatistics {
    const statistics = addon().cacheStatistics(this.native)
    return { ...statistics, budgetBytes: statistics.budgetBytes === 0 ? Infinity : statistics.budgetBytes }
  }

  /** Aborts open steps and frees all sequences. Using them afterwards throws `ERR_COUPLET_DISPOSED`. */
  dispose(): void {
    addon().disposeCache(this.native)
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}

/** The tokens of one text, conversation or beam. {@link Cache.sequence} makes one. */
export class Sequence {
  readonly cache: Cache
  /** @internal */
  readonly native: NativeSequence

  /** @internal */
  constructor(cache: Cache, native: NativeSequence) {
    this.cache = cache
    this.native = native
  }

  /** Tokens. */
  get length(): number {
    return addon().sequenceLength(this.native)
  }

  /** Another sequence with the same tokens. Their memory is shared until one of the two writes into it. */
  fork(): Sequence {
    return new Sequence(this.cache, addon().forkSequence(this.native))
  }

  /**
   * The same tokens as a sequence of another cache, which may be on another device: pages and full-precision tokens are the same bytes
   * everywhere. This sequence is busy meanwhile.
   * @param cache of the same shape, sinks and window, and with the same codebook
   * @throws {CoupletError} `ERR_COUPLET_CODEBOOK_MISMATCH`, `ERR_COUPLET_CACHE_FULL`, `ERR_COUPLET_BUSY` inside an open step
   */
  async copyTo(cache: Cache): Promise<Sequence> {
    this.#requireAlike(cache)
    return new Sequence(cache, await addon().copySequence({ sequence: this.native, cache: cache.native }))
  }

  /** {@link copyTo}, blocking. */
  copyToSync(cache: Cache): Sequence {
    this.#requireAlike(cache)
    return new Sequence(cache, addon().copySequenceSync({ sequence: this.native, cache: cache.native }))
  }

  #requireAlike(cache: Cache): void {
    if (!(cache instanceof Cache)) throwExpected('a Cache', 'cache', cache)
    if (sameTables(this.cache.codebook, cache.codebook)) return
    throw new CoupletError('ERR_COUPLET_CODEBOOK_MISMATCH', 'Codes of one cache mean nothing to another whose codebook has other centroids')
  }

  /**
   * Keeps the first `tokens` tokens, as after speculative decoding. A token that has left the window stays coded: when the cut goes into
   * such tokens, the window holds fewer tokens in full precision until enough new ones have come.
   */
  truncate(tokens: number): void {
    requireInteger(tokens, 'tokens', 0)
    addon().truncateSequence(this.native, tokens)
  }

  /** Forgets all tokens. */
  reset(): void {
    this.truncate(0)
  }

  /** @throws {CoupletError} `ERR_COUPLET_BUSY` inside an open step */
  dispose(): void {
    addon().disposeSequence(this.native)
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}

/**
 * New tokens of some sequences on their way through the layers: each layer once, in any order, one call at a time, then commit. The
 * sequences are as before until commit, and stay so after abort. After an error in a layer the step can only be aborted.
 */
export class Step {
  readonly cache: Cache
  /** What {@link Cache.begin} was given. */
  readonly rows: readonly Readonly<StepRow>[]
  /** @internal */
  readonly native: NativeStep

  /** @internal */
  constructor(cache: Cache, native: NativeStep, rows: readonly StepRow[]) {
    this.cache = cache
    this.native = native
    this.rows = rows
  }

  /**
   * Stores keys and values of the new tokens in one layer and lets their queries attend, causally, to all tokens of their sequence.
   * The arrays are read and written in place while the promise is pending: do not change them, and do not transfer their buffers.
   *
   * On a GPU arrays are uploaded and results downloaded; rows and `out` in the device's own memory are used where they are. With a `stream`
   * the call comes behind what that holds. When `out` is memory of the device it then only enqueues: the promise settles when it has, the
   * rows belong to the call until the stream has got there, and a NaN in them is an error of {@link commit}. Without a `stream` the
   * promise settles when the work is done.
   *
   * @param rows one for each row of the step
   * @returns [tokens][queryHeads][headDim] for each row: `out` where it is given, else new arrays
   * @throws {RangeError} `ERR_COUPLET_NOT_FINITE` for a NaN or an infinity, with `layer`, `kvHead`, `token` (its position) and `channel`
   * @throws {CoupletError} `ERR_COUPLET_BUSY` while another layer is computed, `ERR_COUPLET_DISPOSED` after commit or abort,
   *   `ERR_COUPLET_UNSUPPORTED` for float16 and bfloat16 on the CPU, `ERR_COUPLET_OUT_OF_MEMORY`, `ERR_COUPLET_DEVICE` when the device failed
   * @throws {TypeError | RangeError} `ERR_COUPLET_INVALID_ARGUMENT`
   */
  async attend<Out extends CacheRows = Float32Array>(layer: number, rows: readonly AttendRow<Out>[], options: AttendOptions = {}): Promise<Out[]> {
    const { call, outs } = this.#prepare(layer, rows, options, true)
    await abortable(options.signal, (cancel) => addon().attendStep({ ...call, cancel }))
    return outs as Out[]
  }

  /** {@link attend}, blocking. */
  attendSync<Out extends CacheRows = Float32Array>(layer: number, rows: readonly AttendRow<Out>[], options: AttendSyncOptions = {}): Out[] {
    const { call, outs } = this.#prepare(layer, rows, options, true)
    refusePromiseOptions(options)
    addon().attendStepSync(call)
    return outs as Out[]
  }

  /** Stores keys and values as {@link attend} does, without queries. */
  async append(layer: number, rows: readonly AppendRow[], options: AppendOptions = {}): Promise<void> {
    const { call } = this.#prepare(layer, rows, options, false)
    await abortable(options.signal, (cancel) => addon().attendStep({ ...call, cancel }))
  }

  /** {@link append}, blocking. */
  appendSync(layer: number, rows: readonly AppendRow[], options: AppendSyncOptions = {}): void {
    const { call } = this.#prepare(layer, rows, options, false)
    refusePromiseOptions(options)
    addon().attendStepSync(call)
  }

  /**
   * Waits for what calls with a `stream` have enqueued. {@link commit} and {@link abort} wait too, but block.
   * @throws {RangeError} `ERR_COUPLET_NOT_FINITE`, as commit
   */
  async synchronize(): Promise<void> {
    await addon().synchronizeStep({ step: this.native })
  }

  /** {@link synchronize}, blocking. */
  synchronizeSync(): void {
    addon().synchronizeStepSync({ step: this.native })
  }

  /**
   * Makes the new tokens part of their sequences, when the device is done with them.
   * @throws {RangeError} `ERR_COUPLET_INVALID_ARGUMENT` while a layer is missing, with `layer`; `ERR_COUPLET_NOT_FINITE` for rows of a call
   *   that only enqueued: the step can then only be aborted
   */
  commit(): void {
    addon().commitStep(this.native)
  }

  /** Forgets the new tokens, when the layer that is computed has ended (its promise rejects then). Does nothing after commit. */
  abort(): void {
    addon().abortStep(this.native)
  }

  /** abort(), unless the step has been committed. */
  [Symbol.dispose](): void {
    this.abort()
  }

  #prepare(
    layer: number, rows: readonly (AppendRow & Partial<AttendRow<CacheRows>>)[], options: AttendOptions, attends: boolean,
  ): { call: NativeAttendArguments; outs: CacheRows[] } {
    const { layers, queryHeads, kvHeads, headDim } = this.cache
    requireInteger(layer, 'layer', 0, layers - 1)
    requireObject(options, 'options')
    requireList(rows, 'rows')
    if (rows.length !== this.rows.length) throw rangeError(`Expected ${this.rows.length} entries for \`rows\` but received ${rows.length}`)
    const first: Partial<AttendRow<CacheRows>> | undefined = rows.find((row) => row as unknown)
    const dtype = dtypeOf(first?.keys, options.dtype)
    const outDtype = dtypeOf(first?.out, options.outDtype, 'outDtype')
    const outs: CacheRows[] = []
    const entries = this.rows.map(({ tokens }, index) => {
      const row = rows[index]
      requireObject(row, 'rows')
      const kvElements = tokens * kvHeads * headDim
      const shape = `${tokens} tokens x ${kvHeads} kvHeads x ${headDim} headDim`
      const keys = elementsOf(row.keys, 'keys', dtype, kvElements, shape)
      const values = elementsOf(row.values, 'values', dtype, kvElements, shape)
      if (!attends) return { keys, values }
      const queryElements = tokens * queryHeads * headDim
      const queryShape = `${tokens} tokens x ${queryHeads} queryHeads x ${headDim} headDim`
      const queries = elementsOf(row.queries, 'queries', dtype, queryElements, queryShape)
      const out = row.out ?? resultArray<Float32Array | Uint16Array>(undefined, outDtype === 'float32' ? Float32Array : Uint16Array, queryElements)
      outs.push(out)
      return { keys, values, queries, out: elementsOf(out, 'out', outDtype, queryElements, queryShape) }
    })
    return { call: { step: this.native, layer, dtype, outDtype, stream: options.stream, rows: entries }, outs }
  }
}

/** Rows as the addon takes them: of exactly so many elements, or memory of at least as many. */
function elementsOf(value: unknown, name: string, dtype: ElementType, elements: number, shape: string): NativeRows {
  if (isDeviceMemory(value)) return placeOf(value)
  const isBits = isArray(value, Uint16Array) || isArray(value, { name: 'Float16Array' })
  if ((dtype === 'float32' ? isArray(value, Float32Array) : isBits) && (value as Rows).length === elements) return rowsOf(value as Rows)
  const kind = dtype === 'float32' ? 'Float32Array' : 'Uint16Array'
  const message = `Expected a ${kind} of ${elements} elements (${shape}) for \`${name}\` but received ${describe(value)}`
  throw ArrayBuffer.isView(value) ? rangeError(message) : typeError(message)
}

function requireElements(value: unknown, name: string, elements: number, shape: string): asserts value is Float32Array {
  elementsOf(isDeviceMemory(value) ? undefined : value, name, 'float32', elements, shape)
}

/** Whether codes of one mean the same with the other. */
function sameTables(one: Codebook | undefined, other: Codebook | undefined): boolean {
  if (one === other || one === undefined || other === undefined) return one === other
  if (!sameCodecs(one.codecs, other.codecs)) return false
  return Array.from({ length: one.layers }, (_, layer) => layer).every((layer) =>
    sameFloats(one.keyTable(layer), other.keyTable(layer)) && sameFloats(one.valueTable(layer), other.valueTable(layer))
    && transformNames.every((name) => sameFloats(one.transform(name, layer) ?? none, other.transform(name, layer) ?? none)))
}

const none = new Float32Array(0)

function sameCodecs(one: LayerCodecs, other: LayerCodecs): boolean {
  const alike = (a: HeadCodecs, b: HeadCodecs | undefined): boolean =>
    a.heads === b?.heads && a.keyCodec.name === b.keyCodec.name && a.valueCodec.name === b.valueCodec.name
  return one.length === other.length && one.every((parts, layer) =>
    parts.length === other[layer]!.length && parts.every((part, index) => alike(part, other[layer]![index])))
}

function sameFloats(one: Float32Array | Int32Array, other: Float32Array | Int32Array): boolean {
  return one.length === other.length && one.every((value, index) => value === other[index])
}

/** The tables of a codebook as a backend keeps them, shared by its caches. */
const nativeCodebooks = new WeakMap<Codebook, Map<string, NativeCodebook>>()

function heldCodebooks(codebook: Codebook): Map<string, NativeCodebook> {
  const held = nativeCodebooks.get(codebook) ?? new Map<string, NativeCodebook>()
  nativeCodebooks.set(codebook, held)
  return held
}

const placeName = ({ device, deviceIndex }: NativeDevice): string => `${device} ${deviceIndex}`

function nativeCodebook(codebook: Codebook, place: NativeDevice): NativeCodebook {
  const tables = nativeTables(codebook) // throws after dispose()
  const held = heldCodebooks(codebook)
  const native = held.get(placeName(place)) ?? addon().createCodebookSync({ ...tables, ...place })
  held.set(placeName(place), native)
  return native
}

/** So that {@link nativeCodebook} has it. */
async function prepareCodebook(codebook: Codebook, place: NativeDevice): Promise<void> {
  if (heldCodebooks(codebook).has(placeName(place))) return
  const native = await addon().createCodebook({ ...nativeTables(codebook), ...place })
  heldCodebooks(codebook).set(placeName(place), native)
}

function nativeTables(codebook: Codebook): Omit<NativeCodebookArguments, keyof NativeDevice> {
  const { layers, kvHeads, headDim, codecs } = codebook
  const everyLayer = Array.from({ length: layers }, (_, layer) => layer)
  const every = (name: MatrixName) => codebook.transforms.includes(name) ? everyLayer.map((layer) => codebook.transform(name, layer)!) : undefined
  return {
    layers, kvHeads, headDim, codecs,
    keyTables: everyLayer.map((layer) => codebook.keyTable(layer)),
    valueTables: everyLayer.map((layer) => codebook.valueTable(layer)),
    keyOrders: codebook.transforms.includes('key.group') ? everyLayer.map((layer) => codebook.transform('key.group', layer)!) : undefined,
    keyMetrics: every('key.metric'), valueMetrics: every('value.metric'), valueMixes: every('value.mix'), valueUnmixes: every('value.unmix'),
  }
}

interface AttentionShape {
  queryHeads: number
  headDim: number
  rotary: RotaryOption | undefined
  codebook: Codebook | undefined
}

function nativeLayers(
  given: LayerOptions | readonly LayerOptions[] = {},
  layers: number,
  { queryHeads, headDim, rotary, codebook }: AttentionShape,
): { layers: NativeLayerOptions[]; rotaries: (NativeRotary | NativeOrderedRotary)[] } {
  const rotaries: (NativeRotary | NativeOrderedRotary)[] = []
  // Layers with the same object share its angles, and those with keys in the same order what was made of them.
  const [own, ordered] = [new Map<RotaryOption, number>(), new Map<string, number>()]
  const indexOf = (option: RotaryOption | undefined): number | undefined => {
    if (option === undefined || option === null) return undefined
    if (!own.has(option)) own.set(option, rotaries.push(nativeRotary(option, headDim)) - 1)
    return own.get(option)
  }
  const orderedIndexOf = (option: RotaryOption | undefined, order: Int32Array): number | undefined => {
    const of = indexOf(option)
    const pairs = of === undefined ? undefined : orderedPairs(order, rotaries[of] as NativeRotary)
    if (of === undefined || pairs === undefined) return of
    const name = `${of} ${String(pairs)}`
    if (!ordered.has(name)) ordered.set(name, rotaries.push({ of, order: pairs }) - 1)
    return ordered.get(name)
  }
  const options = Array.isArray(given) ? (given as readonly LayerOptions[]) : Array.from({ length: layers }, () => given as LayerOptions)
  if (options.length !== layers) throw rangeError(`Expected ${layers} entries for \`layerOptions\` but received ${options.length}`)
  const entries = options.map((layer, index) => {
    requireObject(layer, 'layerOptions')
    const { scale, softcap, localWindow, headSinks } = layer
    if (scale !== undefined) requirePositive(scale, 'scale')
    if (softcap !== undefined && softcap !== 0) requirePositive(softcap, 'softcap')
    if (localWindow !== undefined) requireInteger(localWindow, 'localWindow', 0)
    if (headSinks !== undefined) requireElements(headSinks, 'headSinks', queryHeads, `${queryHeads} queryHeads`)
    const angles = layer.rotary === undefined ? rotary : layer.rotary
    const order = codebook && index < codebook.layers ? codebook.transform('key.group', index) : undefined
    return { scale, softcap, localWindow, headSinks, rotary: indexOf(angles), orderedRotary: order && orderedIndexOf(angles, order) }
  })
  return { layers: entries, rotaries }
}

/** In which order angles meet keys that stand in another one; undefined: their own. */
function orderedPairs(order: Int32Array, { kind, dim }: NativeRotary): Int32Array | undefined {
  const pairs = pairOrder(order, { kind, dim })
  if (pairs) return pairs.every((pair, place) => pair === place) ? undefined : pairs
  throw new CoupletError('ERR_COUPLET_CODEBOOK_MISMATCH', `The codebook orders keys so that channels of one rotary pair are parted where ${dim} are rotated, kind "${kind}"`)
}

function requirePositive(value: unknown, name: string): void {
  if (typeof value !== 'number' || !(value > 0) || value === Infinity) throwExpected('a number above 0', name, value)
}

function nativeRotary(option: NonNullable<RotaryOption>, headDim: number): NativeRotary {
  requireObject(option, 'rotary')
  const { kind, dim = headDim } = option
  if (!['half', 'interleaved'].includes(kind)) throwExpected('"half" or "interleaved"', 'kind', kind)
  requireInteger(dim, 'dim', 2, headDim)
  if (dim % 2 !== 0) throwExpected('an even integer', 'dim', dim)
  if (!('cos' in option)) {
    const { theta, positions = defaultPositions } = option
    requirePositive(theta, 'theta')
    requireInteger(positions, 'positions', 1, int32Max)
    return { kind, dim, theta, positions }
  }
  const { cos, sin } = option
  requireArray(cos, 'cos', Float32Array, dim / 2)
  const positions = cos.length / (dim / 2)
  if (!Number.isInteger(positions)) throwExpected(`a Float32Array of rows of ${dim / 2} elements`, 'cos', cos)
  requireElements(sin, 'sin', cos.length, 'as many as `cos`')
  return { kind, dim, positions, cos, sin }
}

/** What a codebook may have been learned for. */
function rotarySpec(option: NonNullable<RotaryOption>, headDim: number): RotarySpec {
  const { kind, dim = headDim } = option
  return 'cos' in option ? { kind, dim } : { kind, dim, theta: option.theta }
}

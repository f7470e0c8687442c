/** The KV cache of many sequences, coded. */
import { requireInteger, requireList, requireObject } from './arguments'
import { nativeCodebook, prepareCodebook, sameTables } from './cache-codebook'
import type { LayerOptions, RotaryOption } from './cache-layers'
import { nativeLayers, rotarySpec } from './cache-layers'
import type { StepRow } from './cache-step'
import { Step } from './cache-step'
import { Codebook } from './codebook'
import type { DeviceName, DeviceOptions } from './device'
import { CoupletError, throwExpected } from './errors'
import { addon } from './native/addon'
import type { NativeCache, NativeSequence } from './native/cache'

export type { LayerOptions, RotaryOption } from './cache-layers'
export type {
  AppendOptions, AppendRow, AppendSyncOptions, AttendOptions, AttendRow, AttendSyncOptions, CacheRows, StepRow,
} from './cache-step'
export { Step } from './cache-step'

/** As many as a codebook file may claim; each gets an entry on the JavaScript heap. */
const mostLayers = 65536

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
   * @throws {CoupletError} `ERR_COUPLET_CODEBOOK_MISMATCH`, `ERR_COUPLET_CACHE_FULL`, `ERR_COUPLET_BUSY` inside an open step;
   *   `ERR_COUPLET_DISPOSED` also when the caches were made of two codebooks, which are compared, and one of these has been disposed
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

/** A step: new tokens of some sequences on their way through the layers, and the rows that its calls take. */
import { isArray, requireInteger, requireList, requireObject, resultArray, throwElements } from './arguments'
import type { Cache, Sequence } from './cache'
import type { Rows } from './codes'
import { dtypeOf, rowsOf } from './codes'
import type { DeviceMemory, ElementType, StreamOption } from './device'
import { isDeviceMemory, placeOf } from './device'
import { rangeError } from './errors'
import { addon } from './native/addon'
import { abortable, refusePromiseOptions } from './native/call'
import type { NativeAttendArguments, NativeRows, NativeStep } from './native/cache'

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
  throwElements(dtype === 'float32' ? 'Float32Array' : 'Uint16Array', elements, shape, name, value)
}

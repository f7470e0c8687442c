import { requireArray, requireInteger, requireObject } from './arguments'
import type { Codec, CodecLike } from './codec'
import { codec } from './codec'
import { type DeviceName, type DeviceOptions, deviceOf } from './device'
import { addon } from './native/addon'
import type { NativeTables, NativeTablesArguments } from './native/operations'

export interface TablesShape extends DeviceOptions {
  codec: CodecLike
  kvHeads: number
  /** Channels of a head, 8 to 256, a multiple of the codec's groupChannels. */
  headDim: number
  /** For encode: float32 [kvHeads][groups][groupChannels][groupChannels], as in `encode`; copied. */
  metric?: Float32Array | undefined
}

let handleOf: (tables: PreparedTables) => NativeTables

/**
 * Centroids that a device has in the order it wants: what `encode` and `decode` otherwise do with `tables` in every call.
 * Calls that only enqueue need them, and leave on them, for each stream, the few bytes that they work with; keep them until their streams
 * have got there. The first call of a stream for some codes brings the addresses of their pages to the device; the same once more only launches,
 * and may be captured in a CUDA graph.
 *
 * @example
 * using tables = await PreparedTables.prepare(centroids, { codec: 'cq-8c8b', kvHeads: 8, headDim: 128, device: 'cuda' })
 * await encode(rows, { ...shape, tables, out: codes, stream })
 */
export class PreparedTables {
  readonly codec: Codec
  readonly kvHeads: number
  readonly headDim: number
  /** Of memory of the device. */
  readonly bytes: number
  /** 'cpu' or 'cuda'. */
  readonly device: Exclude<DeviceName, 'auto'>
  readonly deviceIndex: number
  readonly #handle: NativeTables

  static {
    handleOf = (tables) => tables.#handle
  }

  private constructor(handle: NativeTables, { codec: like, kvHeads, headDim }: TablesShape) {
    const { bytes, device, deviceIndex } = addon().describeTables(handle)
    this.#handle = handle
    this.codec = codec(like)
    this.kvHeads = kvHeads
    this.headDim = headDim
    this.bytes = bytes
    this.device = device as Exclude<DeviceName, 'auto'>
    this.deviceIndex = deviceIndex
  }

  /**
   * @param tables float32 [kvHeads][groups][centroids][groupChannels]; copied
   * @throws {RangeError} `ERR_COUPLET_NOT_FINITE` for a NaN or an infinity
   */
  static async prepare(tables: Float32Array, shape: TablesShape): Promise<PreparedTables> {
    return new PreparedTables(await addon().prepareTables(preparation(tables, shape)), shape)
  }

  /** {@link prepare}, blocking. */
  static prepareSync(tables: Float32Array, shape: TablesShape): PreparedTables {
    return new PreparedTables(addon().prepareTablesSync(preparation(tables, shape)), shape)
  }

  /** Frees them, when the calls under way are over. Twice is harmless. */
  dispose(): void {
    addon().disposeTables(this.#handle)
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}

function preparation(tables: Float32Array, shape: TablesShape): NativeTablesArguments {
  requireObject(shape, 'shape')
  const { kvHeads, headDim, metric } = shape
  const { groupChannels, codeBits, centroids } = codec(shape.codec)
  requireInteger(kvHeads, 'kvHeads', 1)
  requireInteger(headDim, 'headDim', 8, 256)
  requireArray(tables, 'tables', Float32Array, kvHeads * headDim * centroids)
  if (metric !== undefined) requireArray(metric, 'metric', Float32Array, kvHeads * headDim * groupChannels)
  return { groupChannels, codeBits, kvHeads, headDim, tables, metric, ...deviceOf(shape, []) }
}

/** @internal Floats are checked and handed on, tables prepared are handed on. */
export function tablesOf(tables: Float32Array | PreparedTables, leastLength: number): Float32Array | NativeTables {
  if (tables instanceof PreparedTables) return handleOf(tables)
  requireArray(tables, 'tables', Float32Array, leastLength)
  return tables
}

import type { NativeDevice, NativeMemory, NativePlace } from './device'
import type { Handle } from './handle'

export type NativeTables = Handle<'tables'>

/** Members that every long call takes. */
export interface NativeControl {
  /** One element over a SharedArrayBuffer; the call stops soon after it becomes non-zero. */
  cancel?: Int32Array | undefined
  /** At most every 50 ms, and once with done === total. Promise forms only. */
  onProgress?: ((done: number, total: number, problem: number, iteration: number) => void) | undefined
}

/** What a call on a device takes. */
export interface NativeDeviceCall extends NativeDevice {
  /** A cudaStream_t. */
  stream?: bigint | undefined
}

/** couplet_kmeans_params (native/abi/operations.h); strides in elements. */
export interface NativeKmeansArguments extends NativeControl, NativeDeviceCall {
  problems: number
  pointCount: number
  channels: number
  centroidCount: number
  points: Float32Array | NativeMemory
  problemStride: number
  pointStride: number
  weights?: Float32Array | NativeMemory | undefined
  weightProblemStride: number
  weightPointStride: number
  weightSharing: number
  maxIterations: number
  tolerance: number
  seed: number | bigint
  threads?: number | undefined
  /** Out: [problems][centroidCount][channels]. */
  centroids: Float32Array | NativeMemory
  /** Out: [problems]. */
  inertia: Float64Array
  /** Out: [problems]. */
  iterations: Int32Array
  /** Out: [problems][pointCount]. */
  assignments?: Int32Array | undefined
}

/** couplet_table_params. */
export interface NativeTablesArguments extends NativeDevice {
  groupChannels: number
  codeBits: number
  kvHeads: number
  headDim: number
  /** [kvHeads][groups][centroids][groupChannels] */
  tables: Float32Array
  /** [kvHeads][groups][groupChannels][groupChannels] */
  metric?: Float32Array | undefined
}

/** couplet_encode_params and couplet_decode_params, and the table_params of their table; strides in elements. */
export interface NativeCodesArguments extends Omit<NativeTablesArguments, 'tables'>, NativeControl, NativeDeviceCall {
  tokens: number
  pageTokens?: number | undefined
  firstToken?: number | undefined
  tokenStride: number
  headStride: number
  threads?: number | undefined
  tables: Float32Array | NativeTables
  /** With a stream a call only enqueues; rows and codes are then memory of the device, and tables prepared. */
  dtype: 'float32' | 'float16' | 'bfloat16'
  /** In for encode, out for decode; a Uint16Array holds the bits of float16 or bfloat16. */
  rows: Float32Array | Uint16Array | NativeMemory
  /** Out for encode, in for decode: [pages][kvHeads][page bytes]. */
  codes: Uint8Array | NativeMemory
}

export type NativeCodesShape = Pick<NativeCodesArguments, 'groupChannels' | 'codeBits' | 'headDim' | 'kvHeads' | 'tokens' | 'pageTokens'>

/** What native/binding/kmeans.cc and codes.cc export. Results go into the arrays of the arguments. */
export interface OperationsAddon {
  /** Napi::Value codes_bytes(const Napi::CallbackInfo& info) */
  codesBytes(shape: NativeCodesShape): number
  /** Napi::Value promise_form<KmeansWorker>(const Napi::CallbackInfo& info) */
  kmeans(options: NativeKmeansArguments): Promise<void>
  /** Napi::Value sync_form<KmeansWorker>(const Napi::CallbackInfo& info) */
  kmeansSync(options: NativeKmeansArguments): void
  /** Napi::Value promise_form<EncodeWorker>(const Napi::CallbackInfo& info) */
  encode(options: NativeCodesArguments): Promise<void>
  /** Napi::Value sync_form<EncodeWorker>(const Napi::CallbackInfo& info) */
  encodeSync(options: NativeCodesArguments): void
  /** Napi::Value promise_form<DecodeWorker>(const Napi::CallbackInfo& info) */
  decode(options: NativeCodesArguments): Promise<void>
  /** Napi::Value sync_form<DecodeWorker>(const Napi::CallbackInfo& info) */
  decodeSync(options: NativeCodesArguments): void
  /** Napi::Value promise_form<PrepareWorker>(const Napi::CallbackInfo& info) */
  prepareTables(options: NativeTablesArguments): Promise<NativeTables>
  /** Napi::Value sync_form<PrepareWorker>(const Napi::CallbackInfo& info) */
  prepareTablesSync(options: NativeTablesArguments): NativeTables
  /** Napi::Value describe_tables(const Napi::CallbackInfo& info) */
  describeTables(tables: NativeTables): NativePlace
  /** Napi::Value dispose_tables(const Napi::CallbackInfo& info) */
  disposeTables(tables: NativeTables): void
}

/** A backend that this process has, or why it has it not. */
export type BackendState = { available: true; variant: string } | { available: false; reason: string }

export interface NativeCapabilities {
  version: string
  abi: number
  layout: number
  isa: string
  cores: number
  backends: Record<'cpu' | 'cuda', BackendState>
}

/** Members that every long call takes. */
export interface NativeControl {
  /** One element over a SharedArrayBuffer; the call stops soon after it becomes non-zero. */
  cancel?: Int32Array | undefined
  /** At most every 50 ms, and once with done === total. Promise forms only. */
  onProgress?: ((done: number, total: number, problem: number, iteration: number) => void) | undefined
}

/** couplet_kmeans_params (native/abi/operations.h); strides in elements. */
export interface NativeKmeansArguments extends NativeControl {
  problems: number
  pointCount: number
  channels: number
  centroidCount: number
  points: Float32Array
  problemStride: number
  pointStride: number
  weights?: Float32Array | undefined
  weightProblemStride: number
  weightPointStride: number
  weightSharing: number
  maxIterations: number
  tolerance: number
  seed: number | bigint
  threads?: number | undefined
  device?: string | undefined
  /** Out: [problems][centroidCount][channels]. */
  centroids: Float32Array
  /** Out: [problems]. */
  inertia: Float64Array
  /** Out: [problems]. */
  iterations: Int32Array
  /** Out: [problems][pointCount]. */
  assignments?: Int32Array | undefined
}

/** couplet_encode_params and couplet_decode_params, and the table_params of their table; strides in elements. */
export interface NativeCodesArguments extends NativeControl {
  groupChannels: number
  codeBits: number
  tokens: number
  kvHeads: number
  headDim: number
  pageTokens?: number | undefined
  firstToken?: number | undefined
  tokenStride: number
  headStride: number
  threads?: number | undefined
  device?: string | undefined
  /** [kvHeads][groups][centroids][groupChannels] */
  tables: Float32Array
  /** In for encode, out for decode; a Uint16Array holds the bits of float16. */
  rows: Float32Array | Uint16Array
  /** Out for encode, in for decode: [pages][kvHeads][page bytes]. */
  codes: Uint8Array
}

export type NativeCodesShape = Pick<NativeCodesArguments, 'groupChannels' | 'codeBits' | 'headDim' | 'kvHeads' | 'tokens' | 'pageTokens'>

/** What native/binding/operations.cc exports. Results go into the typed arrays of the arguments. */
export interface OperationsAddon {
  /** COUPLET_VERSION: the package version that the addon was built for. */
  readonly version: string
  /** Napi::Value capabilities(const Napi::CallbackInfo& info) */
  capabilities(): NativeCapabilities
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
}

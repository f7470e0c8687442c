import type { NativeStep } from './cache'

declare const tag: unique symbol
/** A session of couplet's own over a rewritten graph. */
export interface NativeSession { readonly [tag]: 'session' }
/** A sample of keys and values that runs add to. */
export interface NativeCapture { readonly [tag]: 'capture' }

/** An input of the graph; `data` has as many elements as `dims` say. */
export interface NativeFeed {
  name: string
  /** TensorProto.DataType: that of `data`, or whatever the graph asks for where there are no elements. */
  type: number
  dims: number[]
  data: BigInt64Array | Float32Array
}

export interface NativeSessionArguments {
  library: string
  /** ModelProto */
  model: Uint8Array
  /** Where the model's external data lies; '' where it has none. */
  folder: string
  threads: number
  /** Whether nodes run on the CUDA execution provider, and on which device. */
  cuda?: boolean | undefined
  deviceIndex?: number | undefined
}

export interface NativeRunArguments {
  session: NativeSession
  /** Absent for a graph without couplet.Attention. */
  step?: NativeStep | undefined
  feeds: NativeFeed[]
  /** Names of outputs that are wanted. */
  outputs: string[]
  /** The output that comes as float32 [rows][columns][vocabulary], whatever the graph's type; '' for none. */
  logits: string
  /** Keep the last column of the logits only. */
  lastColumn: boolean
  capture?: NativeCapture | undefined
  /** One element over a SharedArrayBuffer; non-zero ends the run at its next layer. */
  cancel?: Int32Array | undefined
}

export interface NativeOutput {
  name: string
  /** TensorProto.DataType */
  type: number
  dims: number[]
  data: ArrayBuffer
}

export interface NativeCaptureArguments {
  layers: number
  queryHeads: number
  kvHeads: number
  headDim: number
  /** Tokens kept at most. */
  points: number
  seed: number | bigint
  /** Out: [points][layers][kvHeads][headDim]. */
  keys: Float32Array
  values: Float32Array
  /** Out: [points][layers][kvHeads]; absent with valueWeights. */
  keyWeights?: Float32Array | undefined
  valueWeights?: Float32Array | undefined
}

/** What native/binding/onnxruntime.cc exports. */
export interface OnnxruntimeAddon {
  /** Napi::Value open_onnxruntime(const Napi::CallbackInfo& info): the library's version */
  openOnnxruntime(options: { library: string }): string
  /** Napi::Value list_providers(const Napi::CallbackInfo& info): execution providers that the build knows */
  listProviders(options: { library: string }): string[]
  /** Napi::Value check_cuda_provider(const Napi::CallbackInfo& info): throws what createSession would for `cuda` */
  checkCudaProvider(options: { library: string; deviceIndex: number }): void
  /** Napi::Value create_session(const Napi::CallbackInfo& info) */
  createSession(options: NativeSessionArguments): Promise<NativeSession>
  /** Napi::Value run_session(const Napi::CallbackInfo& info) */
  runSession(options: NativeRunArguments): Promise<NativeOutput[]>
  /** Napi::Value interrupt_session(const Napi::CallbackInfo& info): ends the runs that were given `cancel` at their next node */
  interruptSession(session: NativeSession, cancel: Int32Array): void
  /** Napi::Value dispose_session(const Napi::CallbackInfo& info) */
  disposeSession(session: NativeSession): void
  /** Napi::Value create_capture(const Napi::CallbackInfo& info) */
  createCapture(options: NativeCaptureArguments): NativeCapture
  /** Napi::Value capture_tokens(const Napi::CallbackInfo& info) */
  captureTokens(capture: NativeCapture): { seen: number; kept: number }
}

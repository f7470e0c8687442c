// The parts of @huggingface/transformers 4 and of onnxruntime-common that the plug touches, as shapes: couplet's own
// declarations then need neither package to be installed.

/** onnxruntime-common's Tensor. */
export interface OrtTensor {
  readonly type: string
  readonly dims: readonly number[]
  readonly data: unknown
  readonly location: string
}

/** The class of such tensors. */
export type OrtTensorClass = new (type: string, data: ArrayLike<number> | ArrayLike<bigint>, dims: readonly number[]) => OrtTensor

/** Name, element type and shape of one input or output; symbolic dimensions are strings. */
export interface ValueMetadata {
  readonly name: string
  readonly isTensor: boolean
  readonly type?: string
  readonly shape?: readonly (number | string)[]
}

/** What transformers.js asks of a session: onnxruntime's InferenceSession, or couplet's stand-in for it. */
export interface ModelSession {
  readonly inputNames: readonly string[]
  readonly outputNames: readonly string[]
  readonly inputMetadata: readonly ValueMetadata[]
  readonly outputMetadata: readonly ValueMetadata[]
  /** Set by transformers.js: what from_pretrained was asked for. */
  readonly config?: { readonly dtype?: string; readonly device?: string } | undefined
  run(feeds: Record<string, OrtTensor>, ...options: unknown[]): Promise<Record<string, OrtTensor>>
  release(): Promise<void>
}

/** Arguments of generate() that the plug reads; all others pass through. */
export interface GenerateOptions {
  /** Ends this call early: it rejects with the signal's reason. */
  signal?: AbortSignal
  generation_config?: unknown
  [name: string]: unknown
}

/** A loaded model of @huggingface/transformers 4: PreTrainedModel. */
export interface PretrainedModel {
  sessions: Record<string, unknown>
  readonly config: object
  generate(options: GenerateOptions): Promise<unknown>
}

/** The module '@huggingface/transformers'. */
export interface TransformersModule {
  readonly env: { readonly version: string; readonly localModelPath: string; readonly cacheDir: string | null }
  readonly PreTrainedModel: abstract new (...args: never) => unknown
}

/** The module 'onnxruntime-node'. */
export interface OnnxruntimeModule {
  readonly InferenceSession: unknown
  readonly Tensor: OrtTensorClass
}

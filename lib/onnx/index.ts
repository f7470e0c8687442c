/**
 * The plug into onnxruntime-node: decoder models in the ONNX format, their attention computed on packed codes.
 * @module onnx
 */
export type { CaptureOptions, Sample } from './capture'
export { Capture } from './capture'
export type {
  DecoderModelOptions, ExecutionProvider, ModelRow, ModelRunOptions, ModelRunResult, ModelShape, ModelTensor, OutputArray, ProviderName,
} from './model'
export { modelShape } from './decoder'
export { DecoderModel } from './model'

import { requireObject } from './arguments'
import type { CaptureActivationsOptions } from './calibrate/capture'
import { captureActivations, checkCapture } from './calibrate/capture'
import type { LearnOptions } from './calibrate/learn'
import { codecsOf, learnCodebook } from './calibrate/learn'
import type { Codebook } from './codebook'
import { DecoderModel } from './onnx/model'

export type { CalibrationProgress, Captured, CaptureActivationsOptions, WeightKind } from './calibrate/capture'
export { captureActivations } from './calibrate/capture'
export type { LearnOptions } from './calibrate/learn'
export { learnCodebook } from './calibrate/learn'
export type { Activations, SideActivations } from './calibrate/sample'
export type { TextInput, Texts } from './calibrate/text'

export interface CalibrateOptions extends Omit<CaptureActivationsOptions, 'directory'>, LearnOptions {
  /** Directory of the model (tokenizer.json, onnx/model.onnx). */
  model: string
}

export interface Calibrated {
  codebook: Codebook
}

/**
 * Learns a codebook for a model from a text: `captureActivations`, then `learnCodebook`.
 *
 * @example
 * const { codebook } = await calibrate({ model: 'models/tiny-llama-bytes', text, codec: 'cq-8c8b', weights: 'attention' })
 * await codebook.save('tiny.cq-8c8b.safetensors')
 */
export async function calibrate(options: CalibrateOptions): Promise<Calibrated> {
  requireObject(options, 'options')
  checkCapture(options)
  using model = await DecoderModel.load(options.model, options.threads === undefined ? {} : { threads: options.threads })
  codecsOf(options.codec, model.shape.headDim) // before the text is run, which may take long
  using captured = await captureActivations(model, { ...options, directory: options.model })
  return { codebook: await learnCodebook(captured, options) }
}

import { stat } from 'node:fs/promises'
import { requireObject, requireText } from './arguments'
import type { CaptureActivationsOptions } from './calibrate/capture'
import { capture, checkCapture, judgedChunks, memoryStores } from './calibrate/capture'
import type { CalibrationSettings } from './calibrate/checkpoint'
import { CalibrationCheckpoint } from './calibrate/checkpoint'
import type { LearnedTables, LearnOptions } from './calibrate/learn'
import { codebookOf, codecsOf, learnSides } from './calibrate/learn'
import type { CalibrationReport } from './calibrate/report'
import { Reporter } from './calibrate/report'
import type { Texts } from './calibrate/text'
import { evenChunks } from './calibrate/text'
import type { Codebook } from './codebook'
import { rangeError } from './errors'
import { DecoderModel } from './onnx/model'

export type { CalibrationProgress, Captured, CaptureActivationsOptions, WeightKind } from './calibrate/capture'
export { captureActivations } from './calibrate/capture'
export type { LearnOptions } from './calibrate/learn'
export { learnCodebook } from './calibrate/learn'
export type { CalibrationReport, CalibrationWarning, LayerError, PredictedText, SideError, SufferingPlace } from './calibrate/report'
export type { Activations, SideActivations } from './calibrate/sample'
export type { TextInput, Texts } from './calibrate/text'

export interface CalibrateOptions extends Omit<CaptureActivationsOptions, 'directory'>, LearnOptions {
  /** Directory of the model (tokenizer.json, onnx/model.onnx). */
  model: string
  /** A text such as the codebook will meet: the report says how far it is from the calibration text, and what codes cost on it. */
  evalText?: Texts
  /**
   * Folder that keeps the state, made when it is not there. A calibration of the same model, text and options goes on from it, after a crash
   * as well, and gives the same codebook byte for byte. The sample then lies there and not in memory: points * layers * 2 * kvHeads *
   * headDim * 4 bytes and an eighth more (twice that with fisher weights), of which one layer's side is read at a time. It stays when all is done.
   */
  checkpoint?: string
}

export interface Calibrated {
  codebook: Codebook
  /** What codes will cost, and what to doubt. */
  report: CalibrationReport
}

/**
 * Learns a codebook for a model from a text, and judges it by chunks of the text that it has not seen.
 *
 * @throws {RangeError} `ERR_COUPLET_INVALID_ARGUMENT` for a text without a token, and for a checkpoint of another calibration
 * @throws {CoupletError} `ERR_COUPLET_UNSUPPORTED_MODEL` for fisher weights of a graph through which couplet cannot compute gradients
 * @example
 * const { codebook, report } = await calibrate({ model: 'models/tiny-llama-bytes', text, codec: 'cq-8c8b', weights: 'attention' })
 * for (const { message } of report.warnings) console.warn(message)
 * await codebook.save('tiny.cq-8c8b.safetensors')
 */
export async function calibrate(options: CalibrateOptions): Promise<Calibrated> {
  requireObject(options, 'options')
  const { length, points } = checkCapture(options)
  if (options.checkpoint !== undefined) requireText(options.checkpoint, 'checkpoint')
  using model = await DecoderModel.load(options.model, options.threads === undefined ? {} : { threads: options.threads })
  const codecs = codecsOf(options.codec, model.shape.headDim) // before the text is run, which may take long
  const reading = { directory: options.model, length, signal: options.signal }
  const evalChunks = options.evalText === undefined ? undefined : await evenChunks(options.evalText, reading, judgedChunks)
  if (evalChunks?.length === 0) throw rangeError('Expected a text of at least two tokens for `evalText` but received a shorter one')
  const checkpoint = options.checkpoint === undefined ? undefined : await CalibrationCheckpoint.open(options.checkpoint, await settingsOf(model, options))
  using captured = await capture(model, { ...options, directory: options.model }, checkpoint ?? memoryStores(points), checkpoint)

  const tables: LearnedTables = { key: [], value: [] }
  const reporter = new Reporter(captured, options)
  const { kvHeads, headDim } = model.shape
  const readKnown = async (layer: number, side: 'key' | 'value') => checkpoint?.readTable(layer, side, kvHeads * headDim * codecs[side].centroids)
  for await (const learned of learnSides(captured, options, readKnown)) {
    if (!learned.known) await checkpoint?.saveTable(learned.layer, learned.side, learned.table)
    tables[learned.side].push(learned.table)
    await reporter.add(learned)
  }
  const codebook = codebookOf(captured, options, tables)
  return { codebook, report: await reporter.report(codebook, model, evalChunks) }
}

/** All that decides what a codebook comes out as, but for the text. */
async function settingsOf(model: DecoderModel, options: CalibrateOptions): Promise<CalibrationSettings> {
  const { seed, ...capturing } = checkCapture(options)
  const { iterations = 100, device = 'cpu', gradients } = options
  const codecs = codecsOf(options.codec, model.shape.headDim)
  const file = gradients === undefined ? undefined : await stat(gradients)
  return {
    model: model.fingerprint, ...capturing, seed: String(seed), key: codecs.key.name, value: codecs.value.name, iterations, device,
    gradients: file === undefined ? 'none' : `${file.size} bytes of ${file.mtime.toISOString()}`,
  }
}

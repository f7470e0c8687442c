import { stat } from 'node:fs/promises'
import type { ChooseOptions } from './allocate/choose'
import { checkChoice, chooseCodecs } from './allocate/choose'
import { requireObject, requireText } from './arguments'
import type { CaptureActivationsOptions, Captured, CommonOptions } from './calibrate/capture'
import { capture, checkCapture, judgedChunks, memoryStores } from './calibrate/capture'
import type { CalibrationSettings, ChosenCodecs } from './calibrate/checkpoint'
import { CalibrationCheckpoint } from './calibrate/checkpoint'
import type { LearnedSide, LearnOptions } from './calibrate/learn'
import { codebookOf, codecsOf, learnSides } from './calibrate/learn'
import type { TriedRecipe } from './calibrate/recipe'
import { bestOf, isBetter } from './calibrate/recipe'
import type { CalibrationReport } from './calibrate/report'
import { Reporter } from './calibrate/report'
import type { Texts } from './calibrate/text'
import { evenChunks } from './calibrate/text'
import type { Codebook } from './codebook'
import { tableElements } from './codebook-file'
import { commonCodec } from './codec'
import type { DeviceOptions } from './device'
import { codeOf, rangeError, throwExpected } from './errors'
import { DecoderModel } from './onnx/model'

export type { ChooseOptions, Chosen } from './allocate/choose'
export { chooseCodecs } from './allocate/choose'
export type { Sensitivity } from './allocate/sensitivity'
export type { CalibrationProgress, Captured, CaptureActivationsOptions, WeightKind } from './calibrate/capture'
export { captureActivations } from './calibrate/capture'
export type { LearnOptions } from './calibrate/learn'
export { learnCodebook } from './calibrate/learn'
export type { CalibrationReport, CalibrationWarning, LayerError, PredictedText, SideError, SufferingPlace } from './calibrate/report'
export type { TriedRecipe } from './calibrate/recipe'
export type { Activations, SideActivations } from './calibrate/sample'
export type { TransformStep } from './transform/learn'
export type { TextInput, Texts } from './calibrate/text'

export interface CalibrateOptions extends Omit<CaptureActivationsOptions, 'directory'>, Omit<LearnOptions, 'codec' | 'chosen'> {
  /** Directory of the model (tokenizer.json, onnx/model.onnx). */
  model: string
  /** Such as `'cq-8c8b'`, one for each side, or by layer and part; or `bits`. */
  codec?: LearnOptions['codec'] | undefined
  /** In place of `codec`: what codes may take, in bits by channel. Codecs are then chosen by layer, side and kv head ({@link chooseCodecs}). */
  bits?: number | undefined
  /** How they are chosen. */
  choose?: Omit<ChooseOptions, 'bits' | 'transforms' | keyof CommonOptions | keyof DeviceOptions> | undefined
  /** A text such as the codebook will meet: the report says how far it is from the calibration text, and what codes cost on it. */
  evalText?: Texts
  /**
   * Folder that keeps the state, made when it is not there. A calibration of the same model, text and options goes on from it, after a crash
   * as well, and gives the same codebook byte for byte. The sample then lies there and not in memory: points * layers * 2 * kvHeads *
   * headDim * 4 bytes and an eighth more (twice that with fisher weights), of which one layer's side is read at a time. It stays when all is done.
   */
  checkpoint?: string
  /**
   * `plain`: the weights and transforms that are asked for. `best`: fisher and attention weights (the latter alone where couplet cannot compute
   * the graph's gradients), with and without the transforms that they allow, and of all that what predicts the chunks held out best. Takes some
   * six times as long, and keeps one sample at a time. Default 'plain'.
   */
  recipe?: 'plain' | 'best'
}

export interface Calibrated {
  codebook: Codebook
  /** What codes will cost, and what to doubt. */
  report: CalibrationReport
  /** What the recipe `best` compared; the codebook is that of the least `codedLoss`. */
  tried?: TriedRecipe[]
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
  const { recipe = 'plain' } = options
  if (!['plain', 'best'].includes(recipe)) throwExpected('"plain" or "best"', 'recipe', recipe)
  return recipe === 'plain' ? calibrateOnce(options) : calibrateBest(options)
}

/** With one kind of weights after the other. */
async function calibrateBest({ checkpoint, ...options }: CalibrateOptions): Promise<Calibrated> {
  let best: Calibrated | undefined
  const tried: TriedRecipe[] = []
  for (const weights of ['fisher', 'attention'] as const) {
    const { gradients, ...rest } = options
    const place = checkpoint === undefined ? {} : { checkpoint: `${checkpoint}.${weights}` }
    const given = weights === 'fisher' && gradients !== undefined ? { gradients } : {}
    const one = await calibrateOnce({ ...rest, ...place, ...given, weights }).catch((error: unknown) => {
      if (weights === 'fisher' && codeOf(error) === 'ERR_COUPLET_UNSUPPORTED_MODEL') return undefined
      throw error
    })
    if (one === undefined) continue
    tried.push(...one.tried!)
    const winner = best === undefined || isBetter(leastOf(one.tried!), leastOf(best.tried!)) ? one : best
    for (const loser of [one, best]) if (loser !== winner) loser?.codebook.dispose()
    best = winner
  }
  return { ...best!, tried }
}

const leastOf = (tried: readonly TriedRecipe[]): TriedRecipe => tried.reduce((a, b) => (isBetter(b, a) ? b : a))

async function calibrateOnce(options: CalibrateOptions): Promise<Calibrated> {
  const { length, points } = checkCapture(options)
  if (options.checkpoint !== undefined) requireText(options.checkpoint, 'checkpoint')
  using model = await DecoderModel.load(options.model, options.threads === undefined ? {} : { threads: options.threads })
  const choice = checkCodecs(options, model) // before the text is run, which may take long
  const reading = { directory: options.model, length, signal: options.signal }
  const evalChunks = options.evalText === undefined ? undefined : await evenChunks(options.evalText, reading, judgedChunks)
  if (evalChunks?.length === 0) throw rangeError('Expected a text of at least two tokens for `evalText` but received a shorter one')
  const checkpoint = options.checkpoint === undefined ? undefined : await CalibrationCheckpoint.open(options.checkpoint, await settingsOf(model, options))
  using captured = await capture(model, { ...options, directory: options.model }, checkpoint ?? memoryStores(points), checkpoint)

  const found = choice && await chosenCodecs(captured, choice, checkpoint)
  const learning: LearnOptions = { ...options, codec: found?.codecs ?? options.codec!, chosen: found?.chosen }
  const codecs = codecsOf(learning.codec, model.shape)
  const reporter = new Reporter(captured, options)
  if (options.recipe === 'best') {
    const { learned, tried } = await bestOf(captured, learning)
    for (const side of learned) await reporter.add(side)
    const codebook = codebookOf(captured, learning, learned)
    return { codebook, report: await reporter.report(codebook, model, evalChunks), tried }
  }
  const learned: LearnedSide[] = []
  const readKnown = async (layer: number, side: 'key' | 'value') =>
    checkpoint?.readTable(layer, side, tableElements(codecs[layer]!, model.shape.headDim, side))
  for await (const side of learnSides(captured, learning, readKnown)) {
    if (!side.known) await checkpoint?.saveTable(side.layer, side.side, side.table)
    learned.push(side)
    await reporter.add(side)
  }
  const codebook = codebookOf(captured, learning, learned)
  return { codebook, report: await reporter.report(codebook, model, evalChunks) }
}

/** How codecs are to be chosen; undefined when they are given. */
function checkCodecs(options: CalibrateOptions, { shape }: DecoderModel): ChooseOptions | undefined {
  const { bits, choose, codec } = options
  if (bits === undefined) {
    if (choose !== undefined) throwExpected('a number beside `choose`', 'bits', bits)
    codecsOf(codec, shape)
    return undefined
  }
  if (codec !== undefined) throwExpected('either `bits` or `codec`', 'codec', codec)
  const choice = { ...options, iterations: undefined, ...choose, bits }
  checkChoice(choice, shape.headDim)
  return choice
}

/** Chosen once, and kept by the checkpoint. */
async function chosenCodecs(captured: Captured, choice: ChooseOptions, checkpoint: CalibrationCheckpoint | undefined): Promise<ChosenCodecs> {
  const known = await checkpoint?.readChosen()
  if (known !== undefined) return known
  const found = await chooseCodecs(captured, choice)
  await checkpoint?.saveChosen(found)
  return found
}

/** All that decides what a codebook comes out as, but for the text. */
async function settingsOf(model: DecoderModel, options: CalibrateOptions): Promise<CalibrationSettings> {
  const { seed, ...capturing } = checkCapture(options)
  const { iterations = 100, device = 'cpu', gradients, recipe = 'plain', transforms = [] } = options
  const choice = checkCodecs(options, model)
  const file = gradients === undefined ? undefined : await stat(gradients)
  return {
    model: model.fingerprint, ...capturing, seed: String(seed), iterations, device, recipe, transforms: transforms.join(' '),
    ...(choice ? choiceSettings(choice, model) : codecSettings(options.codec, model)),
    gradients: file === undefined ? 'none' : `${file.size} bytes of ${file.mtime.toISOString()}`,
  }
}

function codecSettings(codec: LearnOptions['codec'] | undefined, { shape }: DecoderModel): CalibrationSettings {
  const codecs = codecsOf(codec, shape)
  const [key, value] = (['keyCodec', 'valueCodec'] as const).map((side) =>
    commonCodec(codecs, side)?.name ?? codecs.map((parts) => parts.map((part) => `${part.heads} ${part[side].name}`).join('+')).join('|'))
  return { key: key!, value: value! }
}

function choiceSettings(choice: ChooseOptions, { shape }: DecoderModel): CalibrationSettings {
  const { bits, per, measure, sinks, window, iterations, candidates } = checkChoice(choice, shape.headDim)
  return { bits, per, measure, sinks, window, tried: iterations, candidates: candidates.map(({ name }) => name).join() }
}

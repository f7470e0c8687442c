import { stat } from 'node:fs/promises'
import type { ChooseOptions } from './allocate/choose'
import { checkChoice, chooseCodecs } from './allocate/choose'
import { requireBoolean, requireObject } from './arguments'
import type { CaptureActivationsOptions, Captured, CommonOptions } from './calibrate/capture'
import { capture, checkCapture, judgedChunks, memoryStores } from './calibrate/capture'
import type { CalibrationSettings, ChosenCodecs } from './calibrate/checkpoint'
import { CalibrationCheckpoint, whileCheckpointLocked } from './calibrate/checkpoint'
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
import type { Tuned, TuneOptions } from './tune'
import { checkTune, tuneChunks } from './tune'

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
   * the graph's gradients), with and without the transforms that they allow, and of all that what predicts the chunks held out best, tuned. Takes
   * some five times as long, and keeps one sample at a time. Default 'plain'.
   */
  recipe?: 'plain' | 'best'
  /**
   * How the recipe `best` ends: as {@link tune}, on the chunks that were learned from, judged by those held out. By default every token is coded
   * (with `bits`: sinks and window are those of `choose`), steps take each chunk 4 times and are 280 at most, and there are 14 judgements.
   * `false`: it does not. Nor does it where the graph's gradients cannot be computed, or the text is too short, unless it is asked for here.
   */
  tune?: false | RecipeTuning | undefined
}

export type RecipeTuning = Pick<TuneOptions, 'batch' | 'together' | 'steps' | 'rate' | 'window' | 'sinks' | 'checkEvery' | 'patience'>

export interface Calibrated {
  codebook: Codebook
  /** What codes will cost, and what to doubt. */
  report: CalibrationReport
  /** What the recipe `best` compared; the codebook is that of the least `codedLoss`, tuned. */
  tried?: TriedRecipe[]
  /** What tuning came to: KL divergence of the chunks held out. */
  tuned?: Omit<Tuned, 'codebook'>
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
  const { recipe = 'plain', tune } = options
  if (!['plain', 'best'].includes(recipe)) throwExpected('"plain" or "best"', 'recipe', recipe)
  if (tune !== undefined && tune !== false) requireObject(tune, 'tune')
  if (tune !== undefined && recipe === 'plain') throw rangeError('Expected the recipe "best" beside `tune` but received "plain"')
  const run = async () => recipe === 'plain' ? (await calibrateOnce(options)).result! : calibrateBest(options)
  return options.checkpoint === undefined ? run() : whileCheckpointLocked(options.checkpoint, run)
}

/** With one kind of weights after the other. */
async function calibrateBest({ checkpoint, ...options }: CalibrateOptions): Promise<Calibrated> {
  let best: Calibrated | undefined
  const tried: TriedRecipe[] = []
  for (const weights of ['fisher', 'attention'] as const) {
    const { gradients, ...rest } = options
    const place = checkpoint === undefined ? {} : { checkpoint: `${checkpoint}.${weights}` }
    const given = weights === 'fisher' && gradients !== undefined ? { gradients } : {}
    const attempt = await calibrateOnce({ ...rest, ...place, ...given, weights }, tried).catch((error: unknown) => {
      if (weights === 'fisher' && codeOf(error) === 'ERR_COUPLET_UNSUPPORTED_MODEL') return undefined
      throw error
    })
    if (attempt === undefined) continue
    tried.push(...attempt.tried!)
    if (attempt.result === undefined) continue
    best?.codebook.dispose()
    best = attempt.result
  }
  return { ...best!, tried }
}

interface Attempt {
  /** Undefined when something else was better before it. */
  result?: Calibrated
  tried?: TriedRecipe[]
}

/** @param before what the recipe `best` has tried already: tuned and reported is only what is better */
async function calibrateOnce(options: CalibrateOptions, before: readonly TriedRecipe[] = []): Promise<Attempt> {
  const { length, points } = checkCapture(options)
  if (options.levels !== undefined) requireBoolean(options.levels, 'levels')
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
    const { best, learned, tried } = await bestOf(captured, learning)
    if (before.some((one) => !isBetter(best, one))) return { tried }
    const untuned = codebookOf(captured, learning, learned)
    const { codebook, ...tuned } = await tuneBest(captured, untuned, options, choice) ?? { codebook: untuned }
    if (codebook !== untuned) untuned.dispose()
    for (const side of learned) await reporter.add({ ...side, table: side.side === 'key' ? codebook.keyTable(side.layer) : codebook.valueTable(side.layer) })
    const report = await reporter.report(codebook, model, evalChunks)
    return { result: { codebook, report, ...('steps' in tuned && { tuned }) }, tried }
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
  return { result: { codebook, report: await reporter.report(codebook, model, evalChunks) } }
}

/** Undefined where it cannot be tuned and nobody has asked that it be. */
async function tuneBest(captured: Captured, codebook: Codebook, options: CalibrateOptions, choice: ChooseOptions | undefined): Promise<Tuned | undefined> {
  const { tune, levels = true, threads, signal, onProgress } = options
  if (tune === false) return undefined
  const { length, seed } = checkCapture(options)
  const whole = (chunks: readonly (readonly number[])[]) => chunks.filter((chunk) => chunk.length === length)
  const [learned, heldOut] = [whole(captured.learnedChunks), whole(captured.heldOutChunks)]
  if (learned.length === 0 || heldOut.length === 0) {
    if (tune === undefined) return undefined
    throw rangeError(`Expected a text with chunks of ${length} tokens to learn from and to hold out for \`tune\` but received a shorter one`)
  }
  const { batch = 4 } = tune ?? {}
  const { steps = Math.min(280, Math.ceil((4 * learned.length) / batch)) } = tune ?? {}
  const { window = 0, sinks = 0 } = choice ? checkChoice(choice, captured.model.shape.headDim) : {}
  const plan = checkTune({ window, sinks, steps, checkEvery: Math.ceil(steps / 14), seed: Number(BigInt.asUintN(53, BigInt(seed))), length, levels, ...tune })
  const source = { model: captured.model, codebook, texts: [...learned, ...heldOut], heldOut: heldOut.length, text: captured.text }
  const checkpoint = options.checkpoint === undefined ? {} : { checkpoint: `${options.checkpoint}.tune` }
  return tuneChunks(source, plan, {
    ...checkpoint, ...(threads !== undefined && { threads }), ...(signal && { signal }),
    onProgress: ({ done, total }) => onProgress?.({ phase: 'tune', done, total }),
  }).catch((error: unknown) => {
    if (tune === undefined && codeOf(error) === 'ERR_COUPLET_UNSUPPORTED_MODEL') return undefined
    throw error
  })
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
  const { iterations = 100, device = 'cpu', gradients, recipe = 'plain', transforms = [], levels = true } = options
  const choice = checkCodecs(options, model)
  const file = gradients === undefined ? undefined : await stat(gradients)
  return {
    model: model.fingerprint, ...capturing, seed: String(seed), iterations, device, recipe, transforms: transforms.join(' '), levels: Number(levels),
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

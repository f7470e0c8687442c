/** What a calibration says of itself: what codes lose on text that nothing was learned from, where, and what to doubt. */
import type { Codebook } from '../codebook'
import type { SidePart } from '../codec'
import { measure } from '../evaluate'
import type { Side } from '../gradient/attention'
import { sides } from '../gradient/attention'
import { DecoderModel } from '../onnx/model'
import type { SideTransforms } from '../transform/learn'
import type { Captured, CommonOptions, WeightKind } from './capture'
import { runForward } from './capture'
import { CodedError } from './error'
import type { LearnedSide } from './learn'
import { spreadWeights } from './learn'
import type { Activations, LayerRows, SideActivations } from './sample'

/**
 * Squared error of codes as a share of the variance of what they code (0: nothing is lost; 1: as if every token had the mean), by the
 * weights that were learned with.
 */
export interface SideError {
  /** Of the tokens that centroids were learned from. */
  learned: number
  /** Of those held out; undefined when there are none. */
  heldOut?: number
}

export interface LayerError extends SideError {
  /** Of each kv head; of the tokens held out where there are any. */
  heads: number[]
}

/** A side of a layer, or of one kv head in it, that loses half as much again as the median layer, or more. */
export interface SufferingPlace {
  layer: number
  side: 'key' | 'value'
  /** One that stands out in its layer; undefined: the whole layer. */
  kvHead?: number
  error: number
  /** Of all layers on this side. */
  median: number
}

/** Mean loss of next tokens, and exp of it. */
export interface PredictedText {
  tokens: number
  /** In full precision. */
  full: { loss: number; perplexity: number }
  /** With the cache coded as `couplet eval` has it by default: a window of 32 tokens and 4 sinks. */
  coded: { loss: number; perplexity: number }
  /** What codes add to the loss, as a mean over chunks, and its standard error; that is undefined for one chunk. */
  added: { loss: number; standardError?: number }
}

export interface CalibrationWarning {
  code: 'NOTHING_HELD_OUT' | 'FEW_POINTS' | 'UNLIKE_TEXT'
  message: string
}

export interface CalibrationReport {
  /** 'mixed' where they differ. */
  codec: { key: string; value: string }
  weights: WeightKind
  /** `heldOut` and `learned` count those that were sampled. */
  tokens: { run: number; learned: number; heldOut: number }
  /** Tokens learned from, for each centroid of the largest codec. */
  pointsPerCentroid: { key: number; value: number }
  /** Means over layers. */
  error: { key: SideError; value: SideError }
  layers: { key: LayerError; value: LayerError }[]
  /** Worst first. */
  suffering: SufferingPlace[]
  /** Text held out, predicted; at most 8 chunks of it. */
  expected?: PredictedText
  /** Of `evalText`. */
  evaluation?: PredictedText & {
    /**
     * Coded error on that text over that on the text held out, without weights, each the mean over layers and sides. About 1: alike;
     * undefined when nothing was held out.
     */
    distance?: number
  }
  warnings: CalibrationWarning[]
}

/** Below this many points a centroid, more text pays (docs/calibration.md has the figures). */
const enoughPoints = 64

/** From this distance on a text counts as unlike; other texts of one kind were found at 1.2 (docs/calibration.md). */
const unlike = 1.5

/** From this many times the median error on a layer suffers; a head as well, when it has as many times the error of its layer. */
const suffers = 1.5

interface MeasuredSide {
  parts: readonly SidePart[]
  table: Float32Array
  transforms: SideTransforms
  error: LayerError
  /** Without weights; of the tokens held out. */
  plain: number | undefined
}

/** Collects what a report needs while layers are learned. */
export class Reporter {
  readonly #captured: Captured
  readonly #options: Pick<CommonOptions, 'threads' | 'signal' | 'onProgress'>
  readonly #measured: Record<Side, MeasuredSide[]> = { key: [], value: [] }

  constructor(captured: Captured, options: Pick<CommonOptions, 'threads' | 'signal' | 'onProgress'>) {
    this.#captured = captured
    this.#options = options
  }

  /** Layers in ascending order. */
  async add(coded: Pick<LearnedSide, 'layer' | 'side' | 'parts' | 'table' | 'transforms'>): Promise<void> {
    const { layer, side, parts, table, transforms } = coded
    const { sample, heldOut } = this.#captured
    const measured = async (of: Activations, weighted: boolean) => {
      const { rows, weights } = await of.side(layer, side)
      const error = this.#emptyError(coded)
      await this.#accumulate(error, { rows, weights: weighted ? weights : undefined }, of.tokensKept)
      return error
    }
    const learned = await measured(sample, true)
    const judged = heldOut && await measured(heldOut, true)
    const plain = heldOut && (this.#captured.weights === 'uniform' ? judged : await measured(heldOut, false))
    const error = { learned: learned.share, ...(judged && { heldOut: judged.share }), heads: (judged ?? learned).headShares }
    this.#measured[side].push({ parts, table, transforms, error, plain: plain?.share })
  }

  /**
   * Runs the text held out, and `evalChunks`, without codes and with them.
   * @param full the model without codes; it is disposed before the one with codes is loaded
   */
  async report(codebook: Codebook, full: DecoderModel, evalChunks: readonly (readonly number[])[] | undefined): Promise<CalibrationReport> {
    const { weights, tokens: run, sample, heldOut, heldOutChunks } = this.#captured
    const { key, value } = this.#measured
    const distance = evalChunks && heldOut ? await this.#distance(full, evalChunks) : undefined
    const [expected, evaluation] = await this.#predict(codebook, full, [predictable(heldOutChunks), predictable(evalChunks ?? [])])
    const centroids = (measured: readonly MeasuredSide[]) => measured.flatMap(({ parts }) => parts.map(({ codec }) => codec.centroids))
    const points = (measured: readonly MeasuredSide[]) => sample.tokensKept / Math.max(...centroids(measured))
    const report: Omit<CalibrationReport, 'warnings'> = {
      codec: { key: codebook.keyCodec?.name ?? 'mixed', value: codebook.valueCodec?.name ?? 'mixed' },
      weights,
      tokens: { run, learned: sample.tokensKept, heldOut: heldOut?.tokensKept ?? 0 },
      pointsPerCentroid: { key: points(key), value: points(value) },
      error: { key: meanError(key), value: meanError(value) },
      layers: key.map(({ error }, layer) => ({ key: error, value: value[layer]!.error })),
      suffering: sides.flatMap((side) => suffering(side, this.#measured[side].map(({ error }) => error)))
        .sort((a, b) => b.error / b.median - a.error / a.median),
      ...(expected && { expected }),
      ...(evaluation && { evaluation: { ...evaluation, ...(distance !== undefined && { distance }) } }),
    }
    return { ...report, warnings: warningsOf(report) }
  }

  async #distance(model: DecoderModel, texts: readonly (readonly number[])[]): Promise<number> {
    const errors = sides.flatMap((side) => this.#measured[side].map((measured, layer) =>
      ({ layer, side, plain: measured.plain!, error: this.#emptyError(measured) })))
    for (const tokens of texts) {
      const { rows } = await runForward(model, tokens, 'uniform', this.#options.signal)
      for (const { layer, side, error } of errors) {
        const { kvHeads, headDim } = model.shape
        const given = { rows: contiguous(rows[side][layer]!, tokens.length, kvHeads * headDim), weights: undefined }
        await this.#accumulate(error, given, tokens.length)
      }
    }
    const heldOut = mean(errors.map(({ plain }) => plain))
    return heldOut > 0 ? mean(errors.map(({ error }) => error.share)) / heldOut : 1
  }

  async #predict(codebook: Codebook, full: DecoderModel, texts: readonly (readonly (readonly number[])[])[]): Promise<(PredictedText | undefined)[]> {
    const { threads, signal, onProgress } = this.#options
    const total = 2 * texts.flat().length
    let done = 0
    const progress = () => onProgress?.({ phase: 'predict', done: ++done, total })
    const lossesBy = async (model: DecoderModel) => {
      const losses = []
      for (const chunks of texts) losses.push(chunks.length === 0 ? undefined : await measure(model, chunks, signal, progress))
      return losses
    }
    if (total === 0) return texts.map(() => undefined)
    const exact = await lossesBy(full)
    const file = full.file
    full.dispose()
    using model = await DecoderModel.load(file, { codebook, ...(threads !== undefined && { threads }) })
    const coded = await lossesBy(model)
    const figures = (loss: number) => ({ loss, perplexity: Math.exp(loss) })
    return exact.map((one, i) => one && {
      tokens: one.tokens, full: figures(one.loss), coded: figures(coded[i]!.loss), added: addedLoss(one.losses, coded[i]!.losses),
    })
  }

  #emptyError(coded: Pick<LearnedSide, 'parts' | 'table' | 'transforms'>): CodedError {
    const { kvHeads, headDim } = this.#captured.model.shape
    return new CodedError({ kvHeads, headDim, parts: coded.parts, table: coded.table, transforms: coded.transforms, threads: this.#options.threads })
  }

  async #accumulate(error: CodedError, side: SideActivations, tokens: number): Promise<void> {
    const { rows, weights } = await error.mixed(side, tokens)
    const spread = spreadWeights(weights, { tokens, ...this.#captured.model.shape }, error.parts)
    await error.add({ rows, weights: spread }, tokens, this.#options.signal)
  }
}

/** A chunk of one token has no next one. */
const predictable = (texts: readonly (readonly number[])[]) => texts.filter(({ length }) => length > 1)

function meanError(measured: readonly MeasuredSide[]): SideError {
  const learned = mean(measured.map(({ error }) => error.learned))
  const heldOut = measured.map(({ error }) => error.heldOut)
  return heldOut.every((share) => share !== undefined) ? { learned, heldOut: mean(heldOut) } : { learned }
}

function addedLoss(exact: readonly number[], coded: readonly number[]): PredictedText['added'] {
  const added = coded.map((loss, chunk) => loss - exact[chunk]!)
  const loss = mean(added)
  const { length } = added
  return length === 1 ? { loss } : { loss, standardError: Math.sqrt(added.reduce((sum, one) => sum + (one - loss) ** 2, 0) / (length - 1) / length) }
}

function suffering(side: Side, layers: readonly LayerError[]): SufferingPlace[] {
  const errors = layers.map(({ learned, heldOut }) => heldOut ?? learned)
  const usual = median(errors)
  return layers.flatMap(({ heads }, layer) => {
    const ofLayer = errors[layer]!
    const places: SufferingPlace[] = ofLayer > suffers * usual ? [{ layer, side, error: ofLayer, median: usual }] : []
    heads.forEach((error, kvHead) => {
      if (error > suffers * Math.max(usual, ofLayer)) places.push({ layer, side, kvHead, error, median: usual })
    })
    return places
  })
}

function warningsOf({ tokens, pointsPerCentroid, evaluation }: Omit<CalibrationReport, 'warnings'>): CalibrationWarning[] {
  const warnings: CalibrationWarning[] = []
  if (tokens.heldOut === 0) {
    warnings.push({ code: 'NOTHING_HELD_OUT', message: `The text of ${tokens.run} tokens has too few chunks to hold any out, so what codes lose on other text is not known` })
  }
  const points = Math.min(pointsPerCentroid.key, pointsPerCentroid.value)
  if (points < enoughPoints) {
    warnings.push({
      code: 'FEW_POINTS',
      message: `${points.toFixed(1)} points a centroid are few: ${Math.ceil(tokens.learned * enoughPoints / points)} tokens learned from would make ${enoughPoints}`,
    })
  }
  if (evaluation?.distance !== undefined && evaluation.distance >= unlike) {
    warnings.push({
      code: 'UNLIKE_TEXT',
      message: `Codes lose ${evaluation.distance.toFixed(2)} times as much of the evaluation text as of the text held out: it is unlike the text that was learned from`,
    })
  }
  return warnings
}

function contiguous({ data, offset, tokenStride }: LayerRows, tokens: number, width: number): Float32Array {
  const rows = new Float32Array(tokens * width)
  for (let token = 0; token < tokens; token++) rows.set(data.subarray(offset + token * tokenStride, offset + token * tokenStride + width), token * width)
  return rows
}

function mean(values: readonly number[]): number {
  return values.reduce((sum, value) => sum + value, 0) / values.length
}

function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b)
  return (sorted[Math.floor((sorted.length - 1) / 2)]! + sorted[Math.ceil((sorted.length - 1) / 2)]!) / 2
}

import { requireCallOptions, requireInteger, requireObject } from '../arguments'
import type { Captured, CommonOptions } from '../calibrate/capture'
import { requireModel } from '../calibrate/capture'
import { checkTransforms } from '../calibrate/learn'
import type { LearnedFrom } from '../codebook-metadata'
import type { Codec, CodecLike, HeadCodecs, LayerCodecs } from '../codec'
import { codecsFor } from '../codec'
import { codesBytes } from '../codes'
import type { DeviceOptions } from '../device'
import { rangeError, throwExpected } from '../errors'
import type { Side } from '../gradient/attention'
import type { TransformStep } from '../transform/learn'
import { allocate } from './allocate'
import type { Sensitivity } from './sensitivity'
import { measureSensitivity } from './sensitivity'

/** Tokens of a page (native/abi/layout.h). */
const pageTokens = 64

const usualCandidates = ['2c8b', '4c8b', '8c12b', '8c10b', '8c8b', '16c12b', '16c8b']

export interface ChooseOptions extends CommonOptions, DeviceOptions {
  /** What codes may take, in bits by channel: pages with their padding, mean over layers, sides and heads. */
  bits: number
  /** Codecs to choose from. Default 2c8b, 4c8b, 8c12b, 8c10b, 8c8b, 16c12b and 16c8b, as far as they fit the model. */
  candidates?: readonly CodecLike[] | undefined
  /**
   * Whether kv heads of a layer may differ; each run of heads that are alike is a call of its own in every step. 'layer' measures all heads of a layer
   * at once, kvHeads times as fast. Default 'head'.
   */
  per?: 'head' | 'layer' | undefined
  /**
   * What a codec costs: `divergence` runs the model on the chunks that `captured` holds out, with one head's keys or values coded at a time; `fisher`
   * takes the weights of the tokens held out, in a fraction of the time, and is less exact (docs/decisions/0006). Default 'divergence'.
   */
  measure?: 'divergence' | 'fisher' | undefined
  /** As the codebook will be used; default 4 and 32. Both 0: every token is read from codes. `fisher` knows nothing of them. */
  sinks?: number | undefined
  window?: number | undefined
  /** Lloyd iterations for the tables to measure with. Default 25. */
  iterations?: number | undefined
  /** Steps beside the tables that the codebook will have (docs/codebook.md): codecs are measured with them. Default none. */
  transforms?: readonly TransformStep[] | undefined
}

export interface Chosen {
  /** For `learnCodebook`, as `codec`. */
  readonly codecs: LayerCodecs
  /** For `learnCodebook` as well: what codes take, never more than was asked for, and the sum of what was measured. */
  readonly chosen: NonNullable<LearnedFrom['chosen']>
  readonly sensitivities: readonly Sensitivity[]
}

/**
 * Codecs by layer, side and kv head for a budget: measures what each of them costs on text that nothing is learned from, then makes the sum
 * the least that the budget allows. Tables of all candidates are learned on the way, and dropped.
 *
 * @throws {RangeError} `ERR_COUPLET_INVALID_ARGUMENT` for a budget below the smallest candidate, or a text of which nothing was held out
 * @example
 * const { codecs, chosen } = await chooseCodecs(captured, { bits: 1.25 })
 * const codebook = await learnCodebook(captured, { codec: codecs, chosen })
 */
export async function chooseCodecs(captured: Captured, options: ChooseOptions): Promise<Chosen> {
  requireObject(captured, 'captured')
  requireModel(captured.model)
  const { kvHeads, headDim } = captured.model.shape
  const choice = checkChoice(options, headDim)
  const transforms = checkTransforms(options.transforms, captured)
  const sensitivities = await measureSensitivity(captured, { ...options, ...choice, transforms })
  return chooseFrom(sensitivities, { ...choice, kvHeads, headDim })
}

/** Options with their defaults. */
export interface Choice {
  bits: number
  per: 'head' | 'layer'
  measure: 'divergence' | 'fisher'
  sinks: number
  window: number
  iterations: number
  candidates: readonly Codec[]
}

/** {@link chooseCodecs} of what has been measured already. */
export function chooseFrom(sensitivities: readonly Sensitivity[], choice: Choice & { kvHeads: number; headDim: number }): Chosen {
  const { bits: budget, candidates, measure, sinks, window, kvHeads, headDim } = choice
  const pageBytes = candidates.map((codec) => codesBytes({ codec, tokens: pageTokens, kvHeads: 1, headDim }))
  const channels = sensitivities.reduce((sum, { heads }) => sum + heads, 0) * headDim * pageTokens
  const choices = sensitivities.map(({ heads, losses }) => losses.map((loss, index) => ({ cost: heads * pageBytes[index]!, loss })))
  const taken = allocate(choices, Math.floor(budget * channels / 8))
  const codecOf = new Map(sensitivities.flatMap(({ layer, side, firstHead, heads }, index) =>
    Array.from({ length: heads }, (_, head) => [placeOf({ layer, side, head: firstHead + head }), candidates[taken[index]!]!])))
  const layers = sensitivities.at(-1)!.layer + 1
  const codecs = Array.from({ length: layers }, (_, layer) => mergedParts(Array.from({ length: kvHeads }, (_, head) => ({
    keyCodec: codecOf.get(placeOf({ layer, side: 'key', head }))!,
    valueCodec: codecOf.get(placeOf({ layer, side: 'value', head }))!,
  }))))
  const sum = (of: 'cost' | 'loss') => taken.reduce((total, index, piece) => total + choices[piece]![index]![of], 0)
  const names = candidates.map(({ name }) => name)
  const chosenBy = { budget, bits: sum('cost') * 8 / channels, loss: sum('loss'), measure, sinks, window, candidates: names }
  return { codecs, chosen: chosenBy, sensitivities }
}

const placeOf = ({ layer, side, head }: { layer: number; side: Side; head: number }): string => `${layer} ${side} ${head}`

/** Neighbouring heads that are alike as one part. */
function mergedParts(heads: readonly Pick<HeadCodecs, 'keyCodec' | 'valueCodec'>[]): HeadCodecs[] {
  const parts: HeadCodecs[] = []
  heads.forEach(({ keyCodec, valueCodec }, head) => {
    const last = parts.at(-1)
    if (last?.keyCodec.name === keyCodec.name && last.valueCodec.name === valueCodec.name) parts[parts.length - 1] = { ...last, heads: last.heads + 1 }
    else parts.push({ firstHead: head, heads: 1, keyCodec, valueCodec })
  })
  return parts
}

export function checkChoice(options: ChooseOptions, headDim: number): Choice {
  requireObject(options, 'options')
  requireCallOptions(options)
  const { bits, per = 'head', measure = 'divergence', sinks = 4, window = 32, iterations = 25 } = options
  if (typeof bits !== 'number' || !(bits > 0 && bits <= 12)) throwExpected('a number above 0, at most 12', 'bits', bits, typeof bits === 'number')
  if (!['head', 'layer'].includes(per)) throwExpected('"head" or "layer"', 'per', per)
  if (!['divergence', 'fisher'].includes(measure)) throwExpected('"divergence" or "fisher"', 'measure', measure)
  requireInteger(sinks, 'sinks', 0)
  requireInteger(window, 'window', 0)
  requireInteger(iterations, 'iterations', 0)
  const candidates = codecsFor(headDim, options.candidates, usualCandidates, 'candidates')
  if (candidates.length === 0 || candidates.length > 255) throwExpected('1 to 255 codecs', 'candidates', candidates.length, true)
  const least = Math.min(...candidates.map((codec) => codesBytes({ codec, tokens: pageTokens, kvHeads: 1, headDim }) * 8 / headDim / pageTokens))
  if (least > bits) throw rangeError(`Expected at least ${least}, which the smallest of the candidates takes, for \`bits\` but received ${bits}`)
  return { bits, per, measure, sinks, window, iterations, candidates }
}

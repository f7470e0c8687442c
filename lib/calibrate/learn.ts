import { requireBoolean, requireCallOptions, requireObject, resultArray } from '../arguments'
import { Codebook } from '../codebook'
import type { CodebookShape, LearnedFrom } from '../codebook-metadata'
import { readShape } from '../codebook-metadata'
import type { Codec, HeadCodecsLike, LayerCodecs, SidePart } from '../codec'
import { codec as parseCodec, sideParts } from '../codec'
import type { DeviceOptions } from '../device'
import { rangeError, throwExpected } from '../errors'
import type { Side } from '../gradient/attention'
import { sides } from '../gradient/attention'
import type { Transforms } from '../codebook-transforms'
import { kmeans } from '../kmeans'
import { enterSide, measureSide, unmeasured } from '../transform/apply'
import type { SideTransforms, TransformSource, TransformStep } from '../transform/learn'
import { alternatives, learnTransforms, needsGradients, transformSteps } from '../transform/learn'
import { levelsOf, onLevels } from '../transform/levels'
import type { Captured, CommonOptions } from './capture'
import { requireModel } from './capture'
import type { SideActivations } from './sample'

/** `device` is where centroids are learned; a text is run on the CPU in any case. */
export interface LearnOptions extends CommonOptions, DeviceOptions {
  /** Such as `'cq-8c8b'`, one for each side, or for every layer those of its parts, as `chooseCodecs` gives them. */
  codec: string | Codec | { key: string | Codec; value: string | Codec } | readonly (readonly HeadCodecsLike[])[]
  /** Lloyd iterations at most. Default 100. */
  iterations?: number
  /** How the codecs were chosen, for the codebook's metadata: what `chooseCodecs` says. */
  chosen?: LearnedFrom['chosen'] | undefined
  /**
   * Steps beside the tables (docs/codebook.md), learned from the same sample; default none. `key.metric` and `value.metric` need fisher weights,
   * `value.mix` makes the latter needless; `key.group` and `value.mix` learn from gradients where there are some. `key.smooth` is another metric of keys,
   * and `value.hadamard` another way to mix values, neither of which was better (docs/algorithm.md).
   */
  transforms?: readonly TransformStep[]
  /**
   * Whether centroids of values end on 128 evenly spaced levels in each channel of their group (`value.levels`), where kernels read that faster:
   * cq-8c8b. It costs less than two seeds differ by (docs/decisions/0005-transforms.md). Default true.
   */
  levels?: boolean | undefined
}

/** Shape of the rows of one layer and side. */
export interface SideShape {
  tokens: number
  kvHeads: number
  headDim: number
}

/**
 * Learns one codebook from captured activations, a layer and side after the other: a batch of weighted k-means problems, a problem
 * being a (kv head, group).
 */
export async function learnCodebook(captured: Captured, options: LearnOptions): Promise<Codebook> {
  requireObject(captured, 'captured')
  requireObject(options, 'options')
  requireModel(captured.model)
  const learned: LearnedSide[] = []
  for await (const side of learnSides(captured, options)) learned.push(side)
  return codebookOf(captured, options, learned)
}

export interface LearnedSide {
  layer: number
  side: Side
  parts: readonly SidePart[]
  /** The parts one after another, float32 [heads][groups][centroids][groupChannels]. */
  table: Float32Array
  transforms: SideTransforms
  /** Whether somebody had it already. */
  known: boolean
}

/** Tables layer by layer, the key side before the value side. `readKnown`: gives those that somebody has already. */
export async function* learnSides(captured: Captured, options: LearnOptions,
  readKnown?: (layer: number, side: Side) => Promise<Float32Array | undefined>): AsyncGenerator<LearnedSide> {
  requireCallOptions(options)
  const { levels = true } = options
  requireBoolean(levels, 'levels')
  const { sample, model } = captured
  const { layers, kvHeads, headDim, rotary } = model.shape
  const codecs = codecsOf(options.codec, model.shape)
  const steps = checkTransforms(options.transforms, captured)
  const shape = { tokens: sample.tokensKept, kvHeads, headDim }
  for (let layer = 0; layer < layers; layer++) {
    for (const side of sides) {
      const place = 2 * layer + (side === 'key' ? 0 : 1)
      const report = (share: number) => options.onProgress?.({ phase: 'learn', done: place + share, total: 2 * layers })
      const parts = sideParts(codecs[layer]!, side)
      const known = await readKnown?.(layer, side)
      const activations = known === undefined || steps.length > 0 ? await sample.side(layer, side) : undefined
      const transforms = activations ? await transformsOf(activations, { ...shape, parts, rotary }, side, steps) : {}
      const learned = known ?? await learnParts(activations!, { ...shape, parts, transforms }, options, report)
      const table = levels && side === 'value' ? onLevels(learned, parts, headDim) : learned
      yield { layer, side, parts, table, transforms, known: known !== undefined }
      report(1)
    }
  }
}

/** What the steps make of a side: nothing where there are none. */
export async function transformsOf(activations: SideActivations, place: SideShape & Pick<TransformSource, 'parts' | 'rotary'>, side: Side,
  steps: readonly TransformStep[]): Promise<SideTransforms> {
  return steps.length > 0 ? learnTransforms({ ...place, rows: activations.rows, gradients: gradientsOf(activations, place) }, side, steps) : {}
}

/** Weights of channels are gradients, as WeightWidth has it. */
function gradientsOf({ rows, weights }: SideActivations, { tokens, kvHeads }: SideShape): Float32Array | undefined {
  return weights && weights.length === rows.length && weights.length !== tokens * kvHeads ? weights : undefined
}

export function checkTransforms(steps: readonly TransformStep[] = [], { weights }: Captured): readonly TransformStep[] {
  const given: unknown = steps
  if (!Array.isArray(given)) throwExpected('an array', 'transforms', given)
  for (const step of steps) {
    if (!transformSteps.includes(step))
      throwExpected(transformSteps.map((name) => JSON.stringify(name)).join(', '), 'transforms', step, typeof step === 'string')
    if (needsGradients(step) && weights !== 'fisher') throw rangeError(`Expected fisher weights for the transform "${step}" but received "${weights}"`)
  }
  for (const ways of alternatives) {
    const asked = ways.filter((step) => steps.includes(step))
    if (asked.length > 1) throwExpected(`one of ${asked.map((step) => JSON.stringify(step)).join(' and ')}`, 'transforms', steps.join(), true)
  }
  return steps
}

interface PartsShape extends SideShape {
  parts: readonly SidePart[]
  transforms: SideTransforms
}

/** Every part gets what one codec for all heads would have given it. */
export async function learnParts(activations: SideActivations, { parts, transforms, ...shape }: PartsShape, options: Omit<LearnOptions, 'codec'>,
  onShare?: (share: number) => void): Promise<Float32Array> {
  const mixed = await enterSide(activations, transforms, shape)
  const table = new Float32Array(parts.reduce((sum, { heads, codec }) => sum + heads * shape.headDim * codec.centroids, 0))
  let [at, matrix] = [0, 0]
  for (const part of parts) {
    const metric = transforms.metric?.subarray(matrix, matrix += part.heads * shape.headDim * part.codec.groupChannels)
    const report = (share: number) => { onShare?.((part.firstHead + share * part.heads) / shape.kvHeads) }
    const learned = await learnMeasured(mixed, { ...shape, ...part, metric }, options, report)
    table.set(learned, at)
    at += learned.length
  }
  return table
}

/** Centroids by which rows are near that are so under the metric. */
async function learnMeasured(activations: SideActivations, { metric, ...place }: SideShape & SidePart & { metric: Float32Array | undefined },
  options: Omit<LearnOptions, 'codec'>, onShare: (share: number) => void): Promise<Float32Array> {
  if (metric === undefined) return learnTable(activations, place, options, onShare)
  const { groupChannels } = place.codec
  const own = { tokens: place.tokens, kvHeads: place.heads, headDim: place.headDim }
  const measured = await measureSide(headsOf(activations, place), metric, { ...own, groupChannels })
  return unmeasured(await learnTable(measured, { ...own, firstHead: 0, heads: place.heads, codec: place.codec }, options, onShare), metric, groupChannels)
}

/** Rows and gradients of some heads alone. */
function headsOf({ rows, weights }: SideActivations, { tokens, kvHeads, firstHead, heads }: SideShape & SidePart): SideActivations {
  if (heads === kvHeads) return { rows, weights }
  const take = (data: Float32Array): Float32Array => {
    const width = data.length / tokens / kvHeads
    const out = resultArray(undefined, Float32Array, tokens * heads * width)
    for (let token = 0; token < tokens; token++) {
      const from = (token * kvHeads + firstHead) * width
      out.set(data.subarray(from, from + heads * width), token * heads * width)
    }
    return out
  }
  return { rows: take(rows), weights: weights && take(weights) }
}

/** Centroids of some heads of one side of a layer, float32 [heads][groups][centroids][groupChannels]. */
export async function learnTable(activations: SideActivations, place: SideShape & SidePart, options: Omit<LearnOptions, 'codec'>,
  onShare?: (share: number) => void): Promise<Float32Array> {
  const { tokens, kvHeads, headDim, firstHead, heads, codec } = place
  const { iterations = 100, seed = 0, threads, signal, device, deviceIndex } = options
  const { groupChannels, centroids } = codec
  const groups = headDim / groupChannels
  const weights = groupWeights(activations.weights, { tokens, kvHeads, headDim }, groupChannels)
  const weightGroups = weights ? weights.length / (tokens * kvHeads) : 1
  const result = await kmeans(activations.rows.subarray(firstHead * headDim), {
    problems: heads * groups,
    points: tokens,
    channels: groupChannels,
    centroids,
    iterations,
    seed,
    device,
    deviceIndex,
    // Rows are [token][kvHead][headDim]: consecutive groups are consecutive problems.
    layout: {
      problemStride: groupChannels,
      pointStride: kvHeads * headDim,
      weightProblemStride: 1,
      weightPointStride: kvHeads * weightGroups,
      weightSharing: groups / weightGroups,
    },
    ...(weights && { weights: weights.subarray(firstHead * weightGroups) }),
    ...(threads !== undefined && { threads }),
    ...(signal && { signal }),
    ...(onShare && { onProgress: ({ done, total }) => { onShare(done / total) } }),
  })
  return result.centroids
}

/** The codebook of tables that were learned from `captured`. */
export function codebookOf({ model, weights, tokens, text }: Captured, options: LearnOptions, learned: readonly LearnedSide[]): Codebook {
  const { iterations = 100, seed = 0, chosen, levels = true } = options
  const { kvHeads, headDim, rotary } = model.shape
  const codecs = codecsOf(options.codec, model.shape)
  const ofSide = (side: Side) => learned.filter((one) => one.side === side)
  const tables = (side: Side) => ofSide(side).map(({ table }) => table)
  const every = <Member extends keyof SideTransforms>(side: Side, member: Member) => {
    const arrays = ofSide(side).flatMap(({ transforms }) => transforms[member] ?? [])
    return arrays.length > 0 ? arrays : undefined
  }
  const transforms: Transforms = Object.fromEntries(Object.entries({
    'key.group': every('key', 'order'),
    'key.metric': every('key', 'metric'), 'value.metric': every('value', 'metric'), 'value.mix': every('value', 'mix'), 'value.unmix': every('value', 'unmix'),
  }).filter(([, arrays]) => arrays))
  return Codebook.fromTables({
    keyTables: tables('key'), valueTables: tables('value'), codecs, transforms, kvHeads, headDim,
    metadata: {
      rotary, model: model.fingerprint,
      learned: { weights, iterations, seed: String(seed), tokens, text, ...(levels && levelsOf(codecs)), ...(chosen && { chosen }) },
    },
  })
}

/** Weights of heads as they are; squares of gradients summed over each group, [tokens][kvHeads][groups]. */
export function groupWeights(weights: Float32Array | undefined, { tokens, kvHeads }: SideShape, groupChannels: number): Float32Array | undefined {
  if (weights === undefined || weights.length === tokens * kvHeads) return weights
  const sums = resultArray(undefined, Float32Array, weights.length / groupChannels)
  for (let group = 0; group < sums.length; group++) {
    for (let channel = 0; channel < groupChannels; channel++) sums[group]! += weights[group * groupChannels + channel]! ** 2
  }
  return sums
}

/** For every channel the weight of its group, float32 [tokens][kvHeads][headDim]: squares of gradients, summed. Weights of heads stay as they are. */
export function spreadWeights(weights: Float32Array | undefined, shape: SideShape, parts: readonly SidePart[]): Float32Array | undefined {
  const { tokens, kvHeads, headDim } = shape
  if (weights === undefined || weights.length === tokens * kvHeads) return weights
  const spread = resultArray(undefined, Float32Array, weights.length)
  const channelsOf = parts.flatMap(({ heads, codec }) => Array.from({ length: heads }, () => codec.groupChannels))
  for (let row = 0; row < tokens * kvHeads; row++) {
    const channels = channelsOf[row % kvHeads]!
    for (let first = row * headDim; first < (row + 1) * headDim; first += channels) {
      let sum = 0
      for (let channel = first; channel < first + channels; channel++) sum += weights[channel]! ** 2
      spread.fill(sum, first, first + channels)
    }
  }
  return spread
}

/** @throws {TypeError | RangeError} `ERR_COUPLET_INVALID_ARGUMENT` for codecs that do not fit the model */
export function codecsOf(given: LearnOptions['codec'] | null | undefined, model: Omit<CodebookShape, 'codecs' | 'transforms'>): LayerCodecs {
  const { layers, kvHeads, headDim } = model
  if (given === null || given === undefined) throwExpected('a codec', 'codec', given)
  const shape = { layers, kvHeads, headDim }
  if (isByPart(given)) return readShape({ ...shape, codecs: given }).codecs
  const { key, value } = typeof given === 'object' && 'key' in given ? given : { key: given, value: given }
  return readShape({ ...shape, keyCodec: parseCodec(key), valueCodec: parseCodec(value) }).codecs
}

function isByPart(codec: LearnOptions['codec']): codec is readonly (readonly HeadCodecsLike[])[] {
  return Array.isArray(codec)
}

/** Transforms of one layer and side from its activations (docs/algorithm.md, decision 5). */
import { setImmediate } from 'node:timers/promises'
import type { SidePart } from '../codec'
import type { RotaryPairs } from '../rotary-pairs'
import { balancedOrder } from './grouping'
import type { RowSet } from './matrix'
import { eigen, hadamard, identity, product, secondMoment, squareRoot, transposed } from './matrix'
import type { HeadMoments } from './pairs'
import { pairedOrder } from './pairs'

/**
 * Steps that can be learned. Each makes what a codebook has of its name; `key.smooth` makes a `key.metric` and `value.hadamard` a `value.mix`, of
 * which there is one: the largest magnitude of each channel decides, and nothing does. Mixing brings its inverse with it.
 */
export type TransformStep = 'key.group' | 'key.metric' | 'key.smooth' | 'value.metric' | 'value.mix' | 'value.hadamard'
export const transformSteps: readonly TransformStep[] = ['key.group', 'key.metric', 'key.smooth', 'value.metric', 'value.mix', 'value.hadamard']
/** Of which a codebook has one at most. */
export const alternatives: readonly (readonly TransformStep[])[] = [['key.metric', 'key.smooth'], ['value.mix', 'value.hadamard']]
export const needsGradients = (step: TransformStep): boolean => step.endsWith('.metric')

/** Rows of one layer and side, float32 [tokens][kvHeads][headDim], and the gradients of the loss by them where they are known. */
export interface TransformSource {
  rows: Float32Array
  gradients: Float32Array | undefined
  tokens: number
  kvHeads: number
  headDim: number
  /** They cover all heads. */
  parts: readonly SidePart[]
  /** How keys will be rotated; null: not at all. */
  rotary: RotaryPairs | null
}

/** What was learned for a layer and side: float32, heads first, as a codebook has it. An order comes before all else, and excludes mixing. */
export interface SideTransforms {
  /** [headDim]: channel order[c] of the model at place c, in all heads. */
  order?: Int32Array
  metric?: Float32Array
  mix?: Float32Array
  unmix?: Float32Array
}

/** Correlations of gradients are trusted by so much: a sample has noise, and matrices stay well-conditioned. */
const trust = 0.95

/** Of the steps those that belong to the side; a metric needs gradients, and mixed values need none: their directions are equally important. */
export async function learnTransforms(source: TransformSource, side: 'key' | 'value', steps: readonly TransformStep[]): Promise<SideTransforms> {
  const { kvHeads, headDim, gradients } = source
  const ofHeads = async <Learned>(learn: (head: number) => Learned): Promise<Learned[]> => {
    const learned: Learned[] = []
    for (let head = 0; head < kvHeads; head++) {
      learned.push(learn(head))
      await setImmediate() // a head of 128 channels takes a second
    }
    return learned
  }
  if (side === 'value' && steps.includes('value.mix')) {
    const mixings = await ofHeads((head) => learnMixing(source, head))
    return { mix: joined(mixings.map(({ mix }) => mix)), unmix: joined(mixings.map(({ unmix }) => unmix)) }
  }
  const order = side === 'key' && steps.includes('key.group')
    ? await pairedOrder(await ofHeads((head) => momentsOf(source, head)), headDim, source.rotary) : undefined
  const mixing = side === 'value' && steps.includes('value.hadamard') ? hadamard(headDim) : undefined
  const ofAllHeads = (matrix: Float64Array) => joined(Array.from({ length: kvHeads }, () => matrix))
  const entering: SideTransforms = {
    ...(order && { order }), ...(mixing && { mix: ofAllHeads(mixing.matrix), unmix: ofAllHeads(mixing.inverse) }),
  }
  if (side === 'key' && steps.includes('key.smooth')) return { ...entering, metric: joined(await ofHeads((head) => smoothing(source, head, order))) }
  if (!steps.includes(`${side}.metric`) || gradients === undefined) return entering
  const metricOf = (head: number) => {
    const weights = importance(rowsOf(source, gradients, head), headDim)
    const entered = order ? reordered(weights, order) : mixing ? within(weights, mixing.inverse, headDim) : weights
    return learnMetric(entered, headDim, codecOf(source, head).groupChannels)
  }
  return { ...entering, metric: joined(await ofHeads(metricOf)) }
}

/** Smoothing as a metric: channels over the square root of their largest magnitude, [groups][groupChannels][groupChannels]. */
function smoothing(source: TransformSource, head: number, order: Int32Array | undefined): Float64Array {
  const { rows, headDim } = source
  const largest = new Float64Array(headDim)
  const { first, stride, count } = rowsOf(source, rows, head)
  for (let token = 0, at = first; token < count; token++, at += stride) {
    for (let channel = 0; channel < headDim; channel++) largest[channel] = Math.max(largest[channel]!, Math.abs(rows[at + channel]!))
  }
  const { groupChannels } = codecOf(source, head)
  const metric = new Float64Array(headDim * groupChannels)
  for (let place = 0; place < headDim; place++) {
    metric[place * groupChannels + (place % groupChannels)] = 1 / Math.sqrt(largest[order?.[place] ?? place]! || 1)
  }
  return metric
}

/** Gradients as they are, so that heads that matter more count for more. */
function momentsOf(source: TransformSource, head: number): HeadMoments {
  const { headDim, gradients, rows } = source
  const importance = gradients ? secondMoment(rowsOf(source, gradients, head), false) : identity(headDim)
  return {
    covariance: secondMoment(rowsOf(source, rows, head), true),
    importance: importance.map((entry, at) => entry * (at % (headDim + 1) === 0 ? 1 : trust)),
    codec: codecOf(source, head),
  }
}

/** The importance of rows that are mixed, where M' unmixes them: that of their gradients, g M'ᵀ. */
const within = (weights: Float64Array, inverse: Float64Array, size: number): Float64Array =>
  product(product(inverse, weights, size), transposed(inverse, size), size)

/** A matrix of channels in another order of them. */
function reordered(matrix: Float64Array, order: Int32Array): Float64Array {
  const size = order.length
  return matrix.map((_, at) => matrix[order[Math.floor(at / size)]! * size + order[at % size]!]!)
}

/** Square roots of the blocks of a head's importance that belong to one group: [groups][groupChannels][groupChannels]. */
function learnMetric(weights: Float64Array, headDim: number, groupChannels: number): Float64Array {
  const out = new Float64Array(headDim * groupChannels)
  for (let first = 0; first < headDim; first += groupChannels) {
    const block = new Float64Array(groupChannels ** 2)
    for (let i = 0; i < groupChannels; i++) {
      for (let j = 0; j < groupChannels; j++) block[i * groupChannels + j] = weights[(first + i) * headDim + first + j]!
    }
    out.set(squareRoot(block, groupChannels, 1e-4).root, first * groupChannels)
  }
  return out
}

/**
 * With W the importance (identity where gradients are not known) and C the covariance of a head's values, S = W^1/2: the
 * eigenvectors of S C S are directions that neither correlate nor share importance; a value enters as its coordinates along them. They are
 * then dealt out to groups so that codes of equally many bits have equally much to say.
 */
function learnMixing(source: TransformSource, head: number): { mix: Float64Array; unmix: Float64Array } {
  const { headDim, gradients, rows } = source
  const weights = gradients ? importance(rowsOf(source, gradients, head), headDim) : identity(headDim)
  const covariance = secondMoment(rowsOf(source, rows, head), true)
  const { root, inverse } = squareRoot(weights, headDim, 1e-4)
  const { values, vectors } = eigen(product(product(root, covariance, headDim), root, headDim), headDim)
  const order = balancedOrder(values, codecOf(source, head))
  const directions = new Float64Array(headDim ** 2)
  order.forEach((from, to) => { directions.set(vectors.subarray(from * headDim, (from + 1) * headDim), to * headDim) })
  // In columns: y = D S x and x = S^-1 D' y. Rows are mixed, so that both are transposed.
  return { mix: product(root, transposed(directions, headDim), headDim), unmix: product(directions, inverse, headDim) }
}

const codecOf = ({ parts }: TransformSource, head: number) => parts.find(({ firstHead, heads }) => head < firstHead + heads)!.codec

/** Mean of g gᵀ, its diagonal 1 on the average. */
function importance(gradients: RowSet, headDim: number): Float64Array {
  const moment = secondMoment(gradients, false)
  let mean = 0
  for (let i = 0; i < headDim; i++) mean += moment[i * headDim + i]! / headDim
  if (!(mean > 0)) return identity(headDim)
  return moment.map((entry, at) => (entry / mean) * (at % (headDim + 1) === 0 ? 1 : trust))
}

function rowsOf({ tokens, kvHeads, headDim }: TransformSource, data: Float32Array, head: number): RowSet {
  return { data, first: head * headDim, stride: kvHeads * headDim, count: tokens, channels: headDim }
}

function joined(parts: readonly Float64Array[]): Float32Array {
  const out = new Float32Array(parts.reduce((sum, { length }) => sum + length, 0))
  let at = 0
  for (const part of parts) {
    out.set(part, at)
    at += part.length
  }
  return out
}

import { requireCallOptions, requireObject, resultArray } from '../arguments'
import { Codebook } from '../codebook'
import { type Codec, codec as parseCodec } from '../codec'
import type { DeviceOptions } from '../device'
import { rangeError, throwExpected } from '../errors'
import type { Side } from '../gradient/attention'
import { sides } from '../gradient/attention'
import { kmeans } from '../kmeans'
import type { Captured, CommonOptions } from './capture'
import { requireModel } from './capture'
import type { SideActivations } from './sample'

/** `device` is where centroids are learned; a text is run on the CPU in any case. */
export interface LearnOptions extends CommonOptions, DeviceOptions {
  /** Such as `'cq-8c8b'`, or one for each side. */
  codec: string | Codec | { key: string | Codec; value: string | Codec }
  /** Lloyd iterations at most. Default 100. */
  iterations?: number
}

/** Shape of the rows of one layer and side. */
export interface SideShape {
  tokens: number
  kvHeads: number
  headDim: number
}

/** Centroids of one layer and side, float32 [kvHeads][groups][centroids][groupChannels]. */
export type LearnedTables = Record<Side, Float32Array[]>

/**
 * Learns one codebook from captured activations, a layer and side after the other: a batch of weighted k-means problems, a problem
 * being a (kv head, group).
 */
export async function learnCodebook(captured: Captured, options: LearnOptions): Promise<Codebook> {
  requireObject(captured, 'captured')
  requireObject(options, 'options')
  requireModel(captured.model)
  const tables: LearnedTables = { key: [], value: [] }
  for await (const { side, table } of learnSides(captured, options)) tables[side].push(table)
  return codebookOf(captured, options, tables)
}

export interface LearnedSide {
  layer: number
  side: Side
  codec: Codec
  /** float32 [kvHeads][groups][centroids][groupChannels] */
  table: Float32Array
  /** Whether somebody had it already. */
  known: boolean
}

/** Tables layer by layer, the key side before the value side. `readKnown`: gives those that somebody has already. */
export async function* learnSides(captured: Captured, options: LearnOptions,
  readKnown?: (layer: number, side: Side) => Promise<Float32Array | undefined>): AsyncGenerator<LearnedSide> {
  requireCallOptions(options)
  const { sample, model } = captured
  const { layers, kvHeads, headDim } = model.shape
  const codecs = codecsOf(options.codec, headDim)
  const shape = { tokens: sample.tokensKept, kvHeads, headDim }
  for (let layer = 0; layer < layers; layer++) {
    for (const side of sides) {
      const place = 2 * layer + (side === 'key' ? 0 : 1)
      const report = (share: number) => options.onProgress?.({ phase: 'learn', done: place + share, total: 2 * layers })
      const codec = codecs[side]
      const known = await readKnown?.(layer, side)
      const table = known ?? await learnTable(await sample.side(layer, side), { ...shape, codec }, options, report)
      yield { layer, side, codec, table, known: known !== undefined }
      report(1)
    }
  }
}

/** Centroids of one side of a layer, float32 [kvHeads][groups][centroids][groupChannels]. */
export async function learnTable(activations: SideActivations, { tokens, kvHeads, headDim, codec }: SideShape & { codec: Codec }, options: LearnOptions,
  onShare?: (share: number) => void): Promise<Float32Array> {
  const { iterations = 100, seed = 0, threads, signal, device, deviceIndex } = options
  const { groupChannels, centroids } = codec
  const groups = headDim / groupChannels
  const weights = groupWeights(activations.weights, { tokens, kvHeads, headDim }, groupChannels)
  const weightGroups = weights ? weights.length / (tokens * kvHeads) : 1
  const result = await kmeans(activations.rows, {
    problems: kvHeads * groups,
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
    ...(weights && { weights }),
    ...(threads !== undefined && { threads }),
    ...(signal && { signal }),
    ...(onShare && { onProgress: ({ done, total }) => { onShare(done / total) } }),
  })
  return result.centroids
}

/** The codebook of tables that were learned from `captured`. */
export function codebookOf({ model, weights, tokens, text }: Captured, { codec, iterations = 100, seed = 0 }: LearnOptions, tables: LearnedTables): Codebook {
  const { kvHeads, headDim, rotary } = model.shape
  const codecs = codecsOf(codec, headDim)
  return Codebook.fromTables({
    keyTables: tables.key, valueTables: tables.value, keyCodec: codecs.key, valueCodec: codecs.value, kvHeads, headDim,
    metadata: { formatVersion: 1, rotary, model: model.fingerprint, learned: { weights, iterations, seed: String(seed), tokens, text } },
  })
}

/** Weights of heads as they are; those of channels summed over each group, [tokens][kvHeads][groups]. */
export function groupWeights(weights: Float32Array | undefined, { tokens, kvHeads }: SideShape, groupChannels: number): Float32Array | undefined {
  if (weights === undefined || weights.length === tokens * kvHeads) return weights
  const sums = resultArray(undefined, Float32Array, weights.length / groupChannels)
  for (let group = 0; group < sums.length; group++) {
    for (let channel = 0; channel < groupChannels; channel++) sums[group]! += weights[group * groupChannels + channel]!
  }
  return sums
}

/** @throws {RangeError} `ERR_COUPLET_INVALID_ARGUMENT` for a codec whose groups do not divide headDim */
export function codecsOf(given: LearnOptions['codec'] | null, headDim: number): Record<Side, Codec> {
  const parse = (like: string | Codec): Codec => {
    const codec = parseCodec(like)
    if (headDim % codec.groupChannels !== 0)
      throw rangeError(`Expected a codec whose group channels divide headDim ${headDim} but received "${codec.name}"`)
    return codec
  }
  if (given === null) throwExpected('a codec', 'codec', given)
  if (typeof given === 'object' && 'key' in given) return { key: parse(given.key), value: parse(given.value) }
  const both = parse(given)
  return { key: both, value: both }
}

/** What codes lose of keys and values, and which codes are used. */
import type { Codebook } from '../codebook'
import type { Codec } from '../codec'
import { codesBytes, decode, encode } from '../codes'
import type { RowsShape } from '../transform/apply'
import { enterSide, leaveSide } from '../transform/apply'
import type { SideTransforms } from '../transform/learn'
import type { SampledRows } from './entropy'

export interface CodeUsage {
  /** Bits of a code; a mean over heads. */
  codeBits: number
  /** Entropy of a group's codes in bits, a mean over groups; of the observed shares, so too low by up to (centroids - 1) / (2 tokens) nats. */
  usedBits: number
  /** Shares of all centroids of all groups. */
  dead: number
  hot: number
  /** The largest share of tokens that one centroid has. */
  hottest: number
  /** Share of tokens that the most used centroids have: at 0, 1/32, 2/32, ... of all centroids; a mean over groups. */
  byRank: number[]
}

export interface CodedSide {
  /** Its name; several where heads differ. */
  codec: string
  /**
   * Of each kv head, the share of the variance that is lost: sum |x - decoded|^2 / sum |x - mean|^2 over the sample, x as it is coded
   * (mixed, where a codebook mixes values); 0 where nothing varies and nothing is lost.
   */
  headErrors: number[]
  usage: CodeUsage
}

/** A centroid is hot when it has more than this many times its even share, and dead when it has none. */
export const hotShare = 4
/** Steps of {@link CodeUsage.byRank}. */
export const rankSteps = 32

/** Tokens coded at once: bounds the memory of codes and of what they decode to. */
const batchTokens = 2048
const pageTokens = 64

/** Some heads of a layer, on one side. */
export interface CodedPart {
  firstHead: number
  heads: number
  codec: Codec
  /** float32 [heads][groups][centroids][groupChannels] */
  tables: Float32Array
  /** float32 [heads][groups][groupChannels][groupChannels] of what encode calls near; undefined: the plain distance. */
  metric?: Float32Array | undefined
}

/** How a codebook codes a layer and side. */
export interface SideCoding {
  parts: CodedPart[]
  /** What rows go through before they are coded, and back afterwards; metrics are in `parts`. */
  transforms: SideTransforms
}

export function codingOf(codebook: Codebook, layer: number, side: 'key' | 'value'): SideCoding {
  const parts = codebook.parts(layer).map(({ firstHead, heads, ...part }): CodedPart => side === 'key'
    ? { firstHead, heads, codec: part.keyCodec, tables: part.keyTable, metric: part.keyMetric }
    : { firstHead, heads, codec: part.valueCodec, tables: part.valueTable, metric: part.valueMetric })
  return { parts, transforms: sideTransforms(codebook, layer, side) }
}

/** The order of a codebook's keys, or the matrices of its values. */
export function sideTransforms(codebook: Codebook, layer: number, side: 'key' | 'value'): SideTransforms {
  const order = side === 'key' ? codebook.transform('key.group', layer) : undefined
  const [mix, unmix] = side === 'value' ? [codebook.transform('value.mix', layer), codebook.transform('value.unmix', layer)] : []
  return { ...(order && { order }), ...(mix && unmix && { mix, unmix }) }
}

export interface RowsOptions {
  kvHeads: number
  headDim: number
  threads?: number | undefined
  signal?: AbortSignal | undefined
}

export interface CodingOptions extends Pick<CodedPart, 'codec' | 'tables' | 'metric'> {
  threads?: number | undefined
  signal?: AbortSignal | undefined
}

export async function measureCoding(rows: SampledRows, { codec, tables, metric, threads, signal }: CodingOptions): Promise<CodedSide> {
  const { data, offset, tokens, tokenStride, kvHeads, headDim } = rows
  const groups = headDim / codec.groupChannels
  const shape = { codec, kvHeads, headDim, pageTokens }
  const call = { ...shape, tables, ...(threads !== undefined && { threads }), signal }
  const counts = new Uint32Array(kvHeads * groups * codec.centroids)
  const lost = new Float64Array(kvHeads)
  for (let first = 0; first < tokens; first += batchTokens) {
    const count = Math.min(batchTokens, tokens - first)
    const batch = data.subarray(offset + first * tokenStride)
    const codes = await encode(batch, { ...call, metric, tokens: count, tokenStride, headStride: headDim })
    const decoded = await decode(codes, { ...call, tokens: count })
    countCodes(counts, codes, { ...shape, tokens: count })
    addSquares(lost, (token, channel) => batch[token * tokenStride + channel]! - (decoded)[token * kvHeads * headDim + channel]!, count, headDim)
  }
  const spread = variances(rows)
  return {
    codec: codec.name,
    headErrors: Array.from(lost, (squares, head) => (squares === 0 ? 0 : squares / spread[head]!)),
    usage: usageOf(counts, codec, tokens),
  }
}

/** What codes stand for of rows float32 [tokens][kvHeads][headDim] of one layer and side. */
export async function throughCodes(rows: Float32Array, { parts, transforms }: SideCoding, options: RowsOptions): Promise<Float32Array> {
  const { kvHeads, headDim, threads, signal } = options
  const width = kvHeads * headDim
  const tokens = rows.length / width
  const entering = await enteringRows(rows, transforms, { tokens, kvHeads, headDim })
  const out = new Float32Array(rows.length)
  for (const { firstHead, heads, codec, tables, metric } of parts) {
    const shape = { codec, kvHeads: heads, headDim, tokens, tokenStride: width, headStride: headDim }
    const call = { ...shape, tables, signal, ...(threads !== undefined && { threads }) }
    const first = firstHead * headDim
    await decode(await encode(entering.subarray(first), { ...call, metric }), { ...call, out: out.subarray(first) })
  }
  return leaveSide(out, transforms, { tokens, kvHeads, headDim })
}

/** Rows [tokens][kvHeads][headDim] as they are coded; themselves without transforms. */
export async function enteringRows(rows: Float32Array, transforms: SideTransforms, shape: RowsShape): Promise<Float32Array> {
  return (await enterSide({ rows, weights: undefined }, transforms, shape)).rows
}

/** Of a layer's runs of heads, each as {@link measureCoding} gives it: usage is a mean over heads. */
export function mergeParts(parts: readonly CodedSide[]): CodedSide {
  const headErrors = parts.flatMap((part) => part.headErrors)
  const mean = (of: (usage: CodeUsage) => number) => parts.reduce((sum, part) => sum + of(part.usage) * part.headErrors.length / headErrors.length, 0)
  return {
    codec: [...new Set(parts.map(({ codec }) => codec))].join(', '),
    headErrors,
    usage: {
      codeBits: mean(({ codeBits }) => codeBits), usedBits: mean(({ usedBits }) => usedBits), dead: mean(({ dead }) => dead), hot: mean(({ hot }) => hot),
      hottest: Math.max(...parts.map(({ usage }) => usage.hottest)),
      byRank: Array.from({ length: rankSteps + 1 }, (_, step) => mean(({ byRank }) => byRank[step]!)),
    },
  }
}

function addSquares(sums: Float64Array, difference: (token: number, channel: number) => number, tokens: number, headDim: number): void {
  for (let token = 0; token < tokens; token++) {
    for (let channel = 0; channel < sums.length * headDim; channel++) sums[Math.floor(channel / headDim)]! += difference(token, channel) ** 2
  }
}

/** Sum over tokens and channels of squared distances from the mean, of each head. */
function variances({ data, offset, tokens, tokenStride, kvHeads, headDim }: SampledRows): Float64Array {
  const means = new Float64Array(kvHeads * headDim)
  for (let token = 0; token < tokens; token++) {
    for (let channel = 0; channel < means.length; channel++) means[channel]! += data[offset + token * tokenStride + channel]! / tokens
  }
  const sums = new Float64Array(kvHeads)
  addSquares(sums, (token, channel) => data[offset + token * tokenStride + channel]! - means[channel]!, tokens, headDim)
  return sums
}

interface PackedShape { codec: Codec; tokens: number; kvHeads: number; headDim: number; pageTokens: number }

/** Adds to [kvHeads][groups][centroids] how often each code stands in packed pages (docs/layout.md). */
export function countCodes(counts: Uint32Array, codes: Uint8Array, shape: PackedShape): void {
  const { codec: { groupChannels, codeBits, centroids }, tokens, kvHeads, headDim } = shape
  const pageBytes = codesBytes({ ...shape, tokens: shape.pageTokens, kvHeads: 1 })
  const groups = headDim / groupChannels
  const rowBytes = (shape.pageTokens * codeBits) / 8
  for (let page = 0; page * shape.pageTokens < tokens; page++) {
    const slots = Math.min(shape.pageTokens, tokens - page * shape.pageTokens)
    for (let line = 0; line < kvHeads * groups; line++) {
      const row = (page * kvHeads + Math.floor(line / groups)) * pageBytes + (line % groups) * rowBytes
      for (let slot = 0; slot < slots; slot++) {
        const bit = slot * codeBits
        const first = row + (bit >> 3)
        // A code of up to 12 bits lies within 3 bytes.
        const bytes = codes[first]! | ((codes[first + 1] ?? 0) << 8) | ((codes[first + 2] ?? 0) << 16)
        counts[line * centroids + ((bytes >> (bit & 7)) & (centroids - 1))]!++
      }
    }
  }
}

/** @param counts [groups of all heads][centroids], each group's adding up to `tokens` */
export function usageOf(counts: Uint32Array, { codeBits, centroids }: Pick<Codec, 'codeBits' | 'centroids'>, tokens: number): CodeUsage {
  const groups = counts.length / centroids
  const usage: CodeUsage = { codeBits, usedBits: 0, dead: 0, hot: 0, hottest: 0, byRank: new Array<number>(rankSteps + 1).fill(0) }
  for (let group = 0; group < groups; group++) {
    const sorted = counts.slice(group * centroids, (group + 1) * centroids).sort().reverse()
    let taken = 0
    let rank = 0
    usage.byRank.forEach((_, step) => {
      const upTo = (step * centroids) / rankSteps
      while (rank + 1 <= upTo) taken += sorted[rank++]!
      const part = rank < centroids ? sorted[rank]! * (upTo - rank) : 0 // between two ranks, when there are fewer centroids than steps
      usage.byRank[step]! += (taken + part) / tokens / groups
    })
    for (const count of sorted) {
      const share = count / tokens
      if (count > 0) usage.usedBits -= share * Math.log2(share) / groups
      else usage.dead += 1 / counts.length
      if (share * centroids > hotShare) usage.hot += 1 / counts.length
    }
    usage.hottest = Math.max(usage.hottest, sorted[0]! / tokens)
  }
  return usage
}

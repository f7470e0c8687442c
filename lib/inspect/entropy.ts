/** Entropies of neighbouring channels, estimated from histograms of a sample: the first figure of the CQ paper. */
import { shuffled } from '../shuffle'

/** Rows of one layer and side, [tokens][kvHeads][headDim]; token t begins at offset + t * tokenStride. */
export interface SampledRows {
  readonly data: Float32Array
  readonly offset: number
  readonly tokens: number
  readonly tokenStride: number
  readonly kvHeads: number
  readonly headDim: number
}

/** Bits of `channels` neighbouring channels, a mean over groups. */
export interface ChannelEntropy {
  channels: number
  /** The channels' own entropies, added up. */
  marginal: number
  /** Of all of them together. */
  joint: number
  /** What the joint estimate would be, were they independent: the same values, every channel's in an order of its own. */
  independent: number
}

/** Equal bins between a channel's least and greatest value. */
export const entropyBins = 16
/** Sizes of groups. */
export const coupledChannels = [1, 2, 3, 4] as const
/** Groups of a size, spread evenly over the channels: what is counted at most, however wide the layer is. */
export const mostGroups = 64

/** Orders of tokens that tear channels apart: one for each channel of a group, the first as it is. */
export function independentOrders(tokens: number, seed: number): readonly Uint32Array[] {
  return coupledChannels.map((_, place) => (place === 0 ? Uint32Array.from({ length: tokens }, (_, i) => i) : shuffled(tokens, seed, place)))
}

/**
 * Joint and marginal entropies of 1 to 4 neighbouring channels. An entropy is that of the observed shares plus Miller and Madow's
 * (occupied cells - 1) / (2 tokens) nats. What bias is left pulls towards log2(tokens) from above, and `independent` has it as `joint` does:
 * their difference says what channels know of one another.
 *
 * @param orders of {@link independentOrders}, for as many tokens
 */
export function channelEntropies(rows: SampledRows, orders: readonly Uint32Array[]): ChannelEntropy[] {
  const { tokens, kvHeads, headDim } = rows
  const counts = new Uint32Array(entropyBins ** coupledChannels.length)
  const bins = new Map<number, Uint8Array>()
  const own = new Map<number, number>()
  const binsOf = (channel: number): Uint8Array => {
    let known = bins.get(channel)
    if (!known) bins.set(channel, (known = binned(rows, channel)))
    return known
  }
  const cells = new Uint16Array(tokens)
  const entropyOf = (channels: readonly number[], isTorn: boolean): number => {
    cells.fill(0)
    channels.forEach((channel, place) => {
      const values = binsOf(channel)
      const order = orders[isTorn ? place : 0]!
      for (let token = 0; token < tokens; token++) cells[token] = cells[token]! * entropyBins + values[order[token]!]!
    })
    return entropyOfCells(cells, counts.subarray(0, entropyBins ** channels.length))
  }
  const ownOf = (channel: number): number => {
    let known = own.get(channel)
    if (known === undefined) own.set(channel, (known = entropyOf([channel], false)))
    return known
  }
  return coupledChannels.map((channels) => {
    const sum = { marginal: 0, joint: 0, independent: 0 }
    const groups = groupsOf(channels, kvHeads, headDim)
    for (const group of groups) {
      sum.marginal += group.reduce((bits, channel) => bits + ownOf(channel), 0)
      sum.joint += entropyOf(group, false)
      sum.independent += entropyOf(group, true)
    }
    const { length } = groups
    return { channels, marginal: sum.marginal / length, joint: sum.joint / length, independent: sum.independent / length }
  })
}

/** Channels of each group, none across two heads. */
function groupsOf(channels: number, kvHeads: number, headDim: number): number[][] {
  const perHead = Math.floor(headDim / channels)
  const total = perHead * kvHeads
  const count = Math.min(total, mostGroups)
  return Array.from({ length: count }, (_, i) => {
    const group = Math.floor((i * total) / count)
    const first = Math.floor(group / perHead) * headDim + (group % perHead) * channels
    return Array.from({ length: channels }, (_, place) => first + place)
  })
}

/** The bin of every token's value; all 0 for a channel that never changes. */
function binned({ data, offset, tokens, tokenStride }: SampledRows, channel: number): Uint8Array {
  let [least, most] = [Infinity, -Infinity]
  for (let token = 0; token < tokens; token++) {
    const value = data[offset + token * tokenStride + channel]!
    least = Math.min(least, value)
    most = Math.max(most, value)
  }
  const scale = most > least ? entropyBins / (most - least) : 0
  const out = new Uint8Array(tokens)
  for (let token = 0; token < tokens; token++) {
    out[token] = Math.min(entropyBins - 1, Math.floor((data[offset + token * tokenStride + channel]! - least) * scale))
  }
  return out
}

/** Bits, with Miller and Madow's correction. `counts` is scratch, a number for each cell there could be. */
function entropyOfCells(cells: Uint16Array, counts: Uint32Array): number {
  counts.fill(0)
  for (const cell of cells) counts[cell]!++
  let sum = 0
  let occupied = 0
  for (const count of counts) {
    if (count === 0) continue
    occupied++
    sum += count * Math.log2(count)
  }
  const tokens = cells.length
  return Math.log2(tokens) - sum / tokens + (occupied - 1) / (2 * tokens * Math.LN2)
}

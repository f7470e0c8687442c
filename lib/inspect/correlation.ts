/** Pearson's correlation of channels: the second figure of the CQ paper. */
import type { SampledRows } from './entropy'

export interface Correlation {
  /** Channels, the first ones of kv head 0. */
  channels: number
  /** r of every two: [channels][channels], 1 where they are the same. */
  r: number[]
  /** Mean |r| of two different ones. */
  meanAbsolute: number
}

/** As the paper draws. */
const mostChannels = 32

/** A channel that never changes correlates with none: 0. */
export function channelCorrelation({ data, offset, tokens, tokenStride, headDim }: SampledRows): Correlation {
  const channels = Math.min(headDim, mostChannels)
  const columns = Array.from({ length: channels }, (_, channel) => {
    const column = Float64Array.from({ length: tokens }, (_, token) => data[offset + token * tokenStride + channel]!)
    return standardized(column)
  })
  const r = new Array<number>(channels * channels)
  let sum = 0
  for (let a = 0; a < channels; a++) {
    r[a * channels + a] = 1
    for (let b = 0; b < a; b++) {
      const value = product(columns[a]!, columns[b]!)
      r[a * channels + b] = r[b * channels + a] = value
      sum += Math.abs(value)
    }
  }
  return { channels, r, meanAbsolute: channels > 1 ? sum / (channels * (channels - 1) / 2) : 0 }
}

/** Mean 0 and length 1, or all 0; in place. */
function standardized(column: Float64Array): Float64Array {
  const mean = column.reduce((a, b) => a + b, 0) / column.length
  for (let i = 0; i < column.length; i++) column[i]! -= mean
  const length = Math.sqrt(product(column, column))
  // What is left of a constant column is rounding.
  const isConstant = length <= 1e-12 * Math.abs(mean) * Math.sqrt(column.length)
  for (let i = 0; i < column.length; i++) column[i] = isConstant ? 0 : column[i]! / length
  return column
}

function product(a: Float64Array, b: Float64Array): number {
  let sum = 0
  for (let i = 0; i < a.length; i++) sum += a[i]! * b[i]!
  return sum
}

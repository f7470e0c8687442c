/**
 * "From 16-Bit to 1-Bit" (arXiv 2502.14882, later CalibQuant), made for visual tokens: one bit between two quantiles.
 *
 * Group-specific: a scale for each channel of a group of tokens of keys, and for each token of a head of values. Quantile-based: an
 * element becomes the lower or the upper of two bounds, whichever is nearer; the bounds are the quantiles a and 1 - a of what shares a
 * scale, because minimum and maximum would put both levels where hardly any element is. We have no source for the paper's a: the one
 * with the least squared error on the calibration text is taken, for keys and values apart. Bits: 1 + 32 / 128 for keys (groups of 128
 * tokens), 1 + 32 / headDim for values. Keys after rotary embedding.
 */
import { channelRun, halfBits, type Method, pieces, type Place, rowRun, type Rows, type Run, toIntegers } from './method'

const groupTokens = 128
const shares = [0.02, 0.05, 0.1, 0.15, 0.2, 0.25]

export function calibQuant(): Method {
  return {
    name: 'calibquant-1b', width: 1, file: 'calibquant.ts', rotated: true,
    fit: (calibration) => {
      const best = { key: 0, value: 0 }
      for (const side of ['key', 'value'] as const) {
        const errors = shares.map((share) => {
          let error = 0
          for (let layer = 0; layer < calibration.shape.layers; layer++) {
            const rows = firstTokens(calibration.rows({ layer, side }, true), 4 * groupTokens)
            const coded = { ...rows, data: rows.data.slice() }
            toQuantiles(coded, { layer, side }, share)
            for (let i = 0; i < rows.data.length; i++) error += (rows.data[i]! - coded.data[i]!) ** 2
          }
          return error
        })
        best[side] = shares[errors.indexOf(Math.min(...errors))]!
      }
      return Promise.resolve({ tableBytes: 0, quantize: (rows, place) => toQuantiles(rows, place, best[place.side]) })
    },
  }
}

export function toQuantiles(rows: Rows, { side }: Place, share: number): number {
  let bits = 0
  const quantize = (run: Run) => {
    toIntegers(rows.data, run, 1, quantiles(rows.data, run, share))
    bits += run.count + 2 * halfBits
  }
  for (let head = 0; head < rows.heads; head++) {
    if (side === 'value') {
      for (let token = 0; token < rows.tokens; token++) quantize(rowRun(rows, head, token))
      continue
    }
    for (const { start, count } of pieces(rows.tokens, groupTokens)) {
      for (let channel = 0; channel < rows.channels; channel++) quantize(channelRun(rows, head, channel, start, count))
    }
  }
  return bits
}

function quantiles(data: Float32Array, { first, step, count }: Run, share: number): [low: number, high: number] {
  const sorted = Float32Array.from({ length: count }, (_, i) => data[first + i * step]!).sort()
  const skipped = Math.min(Math.floor(share * count), (count - 1) >> 1)
  return [sorted[skipped]!, sorted[count - 1 - skipped]!]
}

function firstTokens(rows: Rows, most: number): Rows {
  const tokens = Math.min(most, rows.tokens)
  const data = new Float32Array(rows.heads * tokens * rows.channels)
  for (let head = 0; head < rows.heads; head++) {
    const from = head * rows.tokens * rows.channels
    data.set(rows.data.subarray(from, from + tokens * rows.channels), head * tokens * rows.channels)
  }
  return { ...rows, tokens, data }
}

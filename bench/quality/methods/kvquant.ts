/**
 * KVQuant (arXiv 2401.18079): non-uniform levels, keys by channel before rotary embedding, values by token.
 *
 * A channel of keys is shifted and scaled to [-1, 1] by bounds learned beforehand, a token of values (all kv heads) by its own minimum
 * and maximum, kept as two float16. In [-1, 1] an element becomes the nearest of 2^b levels, which a layer's keys and its values have
 * each for themselves: weighted one-dimensional k-means on calibration text. Weights are squared gradients
 * of the loss (Fisher information), times the squared scale, so that errors count in units of the cache. With outliers, the 1 % of
 * elements beyond the bounds (keys: quantiles 0.5 and 99.5 % of the channel; values: the elements of a token farthest from its mean)
 * are kept in float16 with a 16-bit index each. Bits: b, 32 / (kvHeads * headDim) for values, 32 for each outlier.
 */
import { kmeans } from '../../../lib/kmeans'
import type { Calibration } from '../calibration'
import { channelRun, half, halfBits, type Method, nearest, type Place, range, rowRun, type Rows } from './method'

/** Elements of a layer and side that levels are learned from. */
const sampleElements = 1 << 17

interface Learned {
  levels: Float32Array
  /** Ends of each channel of keys, [head][channel][low, high]; empty for values. */
  bounds: Float32Array
}

export function kvquant(bits: number, outliers: number): Method {
  return {
    name: `kvquant-${bits}b${outliers > 0 ? `-${outliers * 100}%` : ''}`, width: bits, file: 'kvquant.ts', rotated: false,
    fit: async (calibration) => {
      const learned = new Map<string, Learned>()
      for (let layer = 0; layer < calibration.shape.layers; layer++) {
        for (const side of ['key', 'value'] as const) learned.set(`${layer} ${side}`, await learn(calibration, { layer, side }, bits, outliers))
      }
      const tableBytes = [...learned.values()].reduce((sum, { levels, bounds }) => sum + 2 * (levels.length + bounds.length), 0)
      return {
        tableBytes,
        quantize: (rows, place) => {
          const { levels, bounds } = learned.get(`${place.layer} ${place.side}`)!
          const kept = place.side === 'key' ? quantizeKeys(rows, levels, bounds, outliers > 0) : quantizeValues(rows, levels, outliers)
          const scales = place.side === 'key' ? 0 : rows.tokens * 2 * halfBits
          return rows.data.length * bits + scales + kept * 2 * halfBits
        },
      }
    },
  }
}

async function learn(calibration: Calibration, place: Place, bits: number, outliers: number): Promise<Learned> {
  const rows = calibration.rows(place)
  const fisher = calibration.fisher(place)
  const { heads, tokens, channels } = rows
  const bounds = new Float32Array(place.side === 'key' ? heads * channels * 2 : 0)
  for (let i = 0; i < bounds.length / 2; i++) {
    const { first, step } = channelRun(rows, Math.floor(i / channels), i % channels)
    const sorted = Float32Array.from({ length: tokens }, (_, token) => rows.data[first + token * step]!).sort()
    const skipped = Math.floor(outliers / 2 * tokens)
    bounds.set([half(sorted[skipped]!), half(sorted[tokens - 1 - skipped]!)], 2 * i)
  }
  const points: number[] = []
  const pointWeights: number[] = []
  const stride = Math.max(1, Math.floor(heads * tokens * channels / sampleElements)) | 1 // odd: all channels take part
  for (let token = 0; token < tokens; token++) {
    const [low, high] = place.side === 'value' ? valueEnds(rows, token, outliers).ends : [0, 0]
    for (let head = 0; head < heads; head++) {
      for (let channel = 0; channel < channels; channel++) {
        if (((token * heads + head) * channels + channel) % stride !== 0) continue
        const ends = place.side === 'value' ? [low, high] : bounds.subarray((head * channels + channel) * 2)
        const [centre, reach] = [(ends[0]! + ends[1]!) / 2, (ends[1]! - ends[0]!) / 2]
        const at = (head * tokens + token) * channels + channel
        const point = (rows.data[at]! - centre) / reach
        if (!(Math.abs(point) <= 1)) continue
        points.push(point)
        pointWeights.push(fisher.data[at]! * reach ** 2)
      }
    }
  }
  const { centroids } = await kmeans(Float32Array.from(points), {
    problems: 1, points: points.length, channels: 1, centroids: 2 ** bits, weights: Float32Array.from(pointWeights), threads: calibration.threads,
  })
  return { levels: centroids.sort(), bounds }
}

/** @returns outliers */
function quantizeKeys(rows: Rows, levels: Float32Array, bounds: Float32Array, keepOutliers: boolean): number {
  let kept = 0
  for (let i = 0; i < rows.heads * rows.channels; i++) {
    const { first, step, count } = channelRun(rows, Math.floor(i / rows.channels), i % rows.channels)
    const [low, high] = [bounds[2 * i]!, bounds[2 * i + 1]!]
    for (let token = 0, at = first; token < count; token++, at += step) {
      const value = rows.data[at]!
      if (keepOutliers && (value < low || value > high)) {
        rows.data[at] = half(value)
        kept += 1
      } else {
        rows.data[at] = fromUnit(nearest(levels, toUnit(value, low, high)), low, high)
      }
    }
  }
  return kept
}

function quantizeValues(rows: Rows, levels: Float32Array, outliers: number): number {
  let kept = 0
  for (let token = 0; token < rows.tokens; token++) {
    const { ends: [low, high], outside } = valueEnds(rows, token, outliers)
    kept += outside.size
    for (let head = 0; head < rows.heads; head++) {
      const { first, count } = rowRun(rows, head, token)
      for (let at = first; at < first + count; at++) {
        rows.data[at] = outside.has(at) ? half(rows.data[at]!) : fromUnit(nearest(levels, toUnit(rows.data[at]!, low, high)), low, high)
      }
    }
  }
  return kept
}

/** Ends of a token's values, and the places of its outliers, which the ends leave out. */
function valueEnds(rows: Rows, token: number, outliers: number): { ends: [number, number]; outside: Set<number> } {
  const runs = Array.from({ length: rows.heads }, (_, head) => rowRun(rows, head, token))
  const count = Math.round(outliers * rows.heads * rows.channels)
  if (count === 0) {
    const [low, high] = range(rows.data, ...runs)
    return { ends: [half(low), half(high)], outside: new Set() }
  }
  const places = runs.flatMap((run) => Array.from({ length: run.count }, (_, i) => run.first + i))
  const mean = places.reduce((sum, at) => sum + rows.data[at]!, 0) / places.length
  const outside = new Set<number>()
  while (outside.size < count) {
    const distance = (at: number) => outside.has(at) ? -1 : Math.abs(rows.data[at]! - mean)
    outside.add(places.reduce((farthest, at) => distance(at) > distance(farthest) ? at : farthest))
  }
  const [low, high] = range(rows.data, ...places.filter((at) => !outside.has(at)).map((first) => ({ first, step: 1, count: 1 })))
  return { ends: [half(low), half(high)], outside }
}

const toUnit = (value: number, low: number, high: number): number => high > low ? (2 * value - low - high) / (high - low) : 0
const fromUnit = (unit: number, low: number, high: number): number => (low + high + unit * (high - low)) / 2

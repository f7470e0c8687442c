/** What a method of quantization is here, and what several of them need. */
import type { Calibration } from '../calibration'
import type { Rows } from '../layers'

export type { Rows }

/** Whose rows: all kv heads of one layer. */
export interface Place {
  readonly layer: number
  readonly side: 'key' | 'value'
}

export interface Method {
  /** As the table shows it, such as `kvquant-2b-1%`. */
  readonly name: string
  /** Bits a channel by which the method calls itself; the table's width. What it really takes is counted. */
  readonly width: number
  /** File of this folder that defines it. */
  readonly file: string
  /** Keys are quantized after rotary embedding. */
  readonly rotated: boolean
  /** Not a setting of the paper, but the paper's formula at another width. */
  readonly extended?: boolean
  /** Learns whatever the method learns before it sees a text. */
  fit(calibration: Calibration): Promise<Quantizer>
}

export interface Quantizer {
  /** Replaces the rows of consecutive tokens by what their codes give back. @returns bits that the codes take, all overheads counted */
  quantize(rows: Rows, place: Place): number
  /** Bytes of what is shared by all sequences: tables, calibrated scales. */
  readonly tableBytes: number
}

/** Elements of an array at a constant distance. */
export interface Run {
  readonly first: number
  readonly step: number
  readonly count: number
}

/** Bits of one float16. */
export const halfBits = 16

/** Nearest number of 11 significant bits: what float16 keeps of a scale in its range. */
export function half(value: number): number {
  const split = value * (2 ** 42 + 1)
  return Number.isFinite(split) ? split - (split - value) : value
}

/** The elements of one token and head, or of `count` of its channels from `channel` on. */
export function rowRun({ tokens, channels }: Rows, head: number, token: number, channel = 0, count = channels): Run {
  return { first: (head * tokens + token) * channels + channel, step: 1, count }
}

/** The elements of one channel from `token` on. */
export function channelRun({ tokens, channels }: Rows, head: number, channel: number, token = 0, count = tokens): Run {
  return { first: (head * tokens + token) * channels + channel, step: channels, count: Math.min(count, tokens - token) }
}

/** Cuts `total` into pieces of `size`; the last one is shorter. */
export function* pieces(total: number, size: number): Generator<{ start: number; count: number }> {
  for (let start = 0; start < total; start += size) yield { start, count: Math.min(size, total - start) }
}

/** Lowest and highest element of runs. */
export function range(data: Float32Array, ...runs: Run[]): [low: number, high: number] {
  let low = Infinity
  let high = -Infinity
  for (const { first, step, count } of runs) {
    for (let i = 0, at = first; i < count; i++, at += step) {
      const value = data[at]!
      if (value < low) low = value
      if (value > high) high = value
    }
  }
  return [low, high]
}

/**
 * Asymmetric integers of `bits` bits between two ends that are kept in float16: low + round((x - low) / step) * step with
 * step = (high - low) / (2^bits - 1).
 */
export function toIntegers(data: Float32Array, { first, step, count }: Run, bits: number, [low, high]: readonly [number, number]): void {
  const most = 2 ** bits - 1
  const zero = half(low)
  const size = half((high - low) / most)
  for (let i = 0, at = first; i < count; i++, at += step) {
    const code = size > 0 ? Math.min(most, Math.max(0, Math.round((data[at]! - zero) / size))) : 0
    data[at] = zero + code * size
  }
}

/** The nearest of ascending levels. */
export function nearest(levels: ArrayLike<number>, value: number): number {
  let low = 0
  let high = levels.length - 1
  while (high - low > 1) {
    const middle = (low + high) >> 1
    if (levels[middle]! <= value) low = middle
    else high = middle
  }
  return value - levels[low]! <= levels[high]! - value ? levels[low]! : levels[high]!
}

/** `count` quantiles of the standard normal distribution, at (i + 1/2) / count: from its density, summed up by the trapezoidal rule. */
export function normalQuantiles(count: number): Float64Array {
  const out = new Float64Array(count)
  const step = 1 / 4096
  let below = 0
  let index = 0
  for (let x = -8; index < count && x < 8; x += step) {
    const mass = (Math.exp(-x * x / 2) + Math.exp(-((x + step) ** 2) / 2)) * step / 2 / Math.sqrt(2 * Math.PI)
    for (; index < count && below + mass >= (index + 0.5) / count; index++) out[index] = x + step * ((index + 0.5) / count - below) / mass
    below += mass
  }
  return out
}

/** Walsh-Hadamard transform of a row in place, orthonormal and its own inverse. `count` is a power of 2. */
export function hadamard(data: Float32Array, first: number, count: number): void {
  if ((count & (count - 1)) !== 0) throw new Error(`a Hadamard transform needs a power of 2 of channels, not ${count}`)
  for (let span = 1; span < count; span *= 2) {
    for (let block = first; block < first + count; block += 2 * span) {
      for (let at = block; at < block + span; at++) {
        const [a, b] = [data[at]!, data[at + span]!]
        data[at] = a + b
        data[at + span] = a - b
      }
    }
  }
  const norm = 1 / Math.sqrt(count)
  for (let at = first; at < first + count; at++) data[at]! *= norm
}

/** Euclidean norm of a run. */
export function norm(data: Float32Array, { first, step, count }: Run): number {
  let sum = 0
  for (let i = 0, at = first; i < count; i++, at += step) sum += data[at]! ** 2
  return Math.sqrt(sum)
}

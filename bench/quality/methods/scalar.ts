/**
 * Plain scalar quantization, the baselines of every paper.
 *
 * Integers: x is one of 2^b equally spaced levels between the lowest and the highest element that share a scale; level ends are
 * float16 (32 bits a scale). NormalFloat (QLoRA, arXiv 2305.14314): levels are quantiles of the normal distribution divided by the
 * largest one, with an exact 0; scale is the largest magnitude, one float16. What shares a scale: `token`, one token's channels of all
 * kv heads; `channel`, one channel over all tokens of the sequence; `mixed`, keys by channel and values by token; `group`, 32 channels
 * of one token. Bits: b, and 32 (integers) or 16 (NormalFloat) for each scale. Keys before rotary embedding.
 */
import { channelRun, half, halfBits, type Method, nearest, normalQuantiles, type Place, range, rowRun, type Rows, type Run, toIntegers } from './method'

export type Axis = 'token' | 'channel' | 'mixed' | 'group'

const groupChannels = 32

export function integers(bits: number, axis: Axis): Method {
  return {
    name: `int${bits}-${axis}`, width: bits, file: 'scalar.ts', rotated: false,
    fit: () => Promise.resolve({
      tableBytes: 0,
      quantize: (rows, place) => forEachScale(rows, place, axis, bits, 2 * halfBits, (runs) => {
        const ends = range(rows.data, ...runs)
        for (const run of runs) toIntegers(rows.data, run, bits, ends)
      }),
    }),
  }
}

export function normalFloat(bits: number, axis: Axis): Method {
  const levels = normalFloatLevels(bits)
  return {
    name: `nf${bits}-${axis}`, width: bits, file: 'scalar.ts', rotated: false,
    fit: () => Promise.resolve({
      tableBytes: 0,
      quantize: ({ data, ...shape }, place) => forEachScale({ data, ...shape }, place, axis, bits, halfBits, (runs) => {
        const [low, high] = range(data, ...runs)
        const scale = half(Math.max(-low, high, Number.MIN_VALUE))
        for (const { first, step, count } of runs) {
          for (let i = 0, at = first; i < count; i++, at += step) data[at] = scale * nearest(levels, data[at]! / scale)
        }
      }),
    }),
  }
}

/** 2^bits ascending levels from -1 to 1: 2^(bits-1) positive quantiles, 0, and the rest negative. */
export function normalFloatLevels(bits: number): number[] {
  const offset = 0.9677083 // of the NF4 definition: between 1 - 1/30 and 1 - 1/32
  const positive = 2 ** (bits - 1)
  const grid = normalQuantiles(1 << 16)
  const quantile = (p: number) => grid[Math.round(p * grid.length - 0.5)]!
  const side = (count: number) => Array.from({ length: count }, (_, i) => quantile(offset + (0.5 - offset) * i / count) / quantile(offset))
  return [...side(positive - 1).map((level) => -level), 0, ...side(positive).reverse()]
}

/** Calls `quantize` with the elements of each scale. @returns bits of all codes and scales */
function forEachScale(rows: Rows, { side }: Place, axis: Axis, bits: number, scaleBits: number, quantize: (runs: Run[]) => void): number {
  const { heads, tokens, channels } = rows
  const actual = axis === 'mixed' ? (side === 'key' ? 'channel' : 'token') : axis
  let scales = 0
  const scale = (...runs: Run[]) => {
    quantize(runs)
    scales += 1
  }
  const all = Array.from({ length: heads }, (_, head) => head)
  if (actual === 'channel') {
    for (const head of all) for (let channel = 0; channel < channels; channel++) scale(channelRun(rows, head, channel))
  } else {
    for (let token = 0; token < tokens; token++) {
      if (actual === 'token') scale(...all.map((head) => rowRun(rows, head, token)))
      else for (const head of all) for (let first = 0; first < channels; first += groupChannels) scale(rowRun(rows, head, token, first, groupChannels))
    }
  }
  return heads * tokens * channels * bits + scales * scaleBits
}

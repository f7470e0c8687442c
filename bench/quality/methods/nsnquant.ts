/**
 * NSNQuant (arXiv 2505.18231): normalize, shift, normalize, and one codebook of the normal distribution for every model.
 *
 * A row of a head is divided by its root mean square s; the mean m of each channel over a chunk of tokens is subtracted; what is left
 * is divided by its root mean square r and mixed by a Hadamard transform, after which groups of 8 channels look like 8 independent
 * standard normal numbers. 1 bit: the nearest of 256 centroids of those. 2 bits: 8 signs, and the nearest of 256 centroids of the
 * magnitudes. Decoding gives s (r y + m). We have no source for how the paper stores what it adds: here s and r take 8 bits each (5 of
 * exponent, 3 of mantissa, rounded on a logarithmic scale) and m float16 for chunks of 128 tokens. Bits: b + 16 / headDim + 16 / 128, that
 * is b + 0.25 with the 128 channels of the paper's models, which says 1.238. Needs no calibration. Keys before rotary embedding, where
 * the channel means are worth more (after it 1 bit costs a third more perplexity on the small model).
 */
import { normals } from '../../measure'
import { channelRun, half, halfBits, hadamard, type Method, norm, pieces, type Quantizer, rowRun, type Rows } from './method'
import { learnTables, type Tables, toCentroids } from './product'

const chunkTokens = 128
const scaleBits = 8

export function nsnQuant(bits: 1 | 2): Method {
  return {
    name: `nsnquant-${bits}b`, width: bits, file: 'nsnquant.ts', rotated: false,
    fit: async ({ shape: { kvHeads, headDim }, threads }): Promise<Quantizer> => {
      const tables = await universalTables(bits, kvHeads * headDim / 8, threads)
      return {
        tableBytes: 256 * 8 * 2,
        quantize: (rows) => {
          const bitsOfScales = normalizeShiftNormalize(rows, (normal) => {
            const signs = normal.data.map((value) => value < 0 ? -1 : 1)
            if (bits === 2) for (let i = 0; i < normal.data.length; i++) normal.data[i] = Math.abs(normal.data[i]!)
            toCentroids(normal, tables, threads)
            if (bits === 2) for (let i = 0; i < normal.data.length; i++) normal.data[i]! *= signs[i]!
          })
          return rows.data.length * bits + bitsOfScales
        },
      }
    },
  }
}

/** Brings rows to a standard normal shape, lets `quantize` work on them, and takes them back. @returns bits of scales and means */
export function normalizeShiftNormalize(rows: Rows, quantize: (normal: Rows) => void): number {
  const { data, heads, tokens, channels } = rows
  const divide = (scales: Float64Array) => {
    for (let row = 0; row < heads * tokens; row++) {
      scales[row] = logarithmic(norm(data, { first: row * channels, step: 1, count: channels }) / Math.sqrt(channels))
      for (let i = 0; i < channels; i++) data[row * channels + i]! /= scales[row]!
    }
    return scales
  }
  const outer = divide(new Float64Array(heads * tokens))
  const means: { run: ReturnType<typeof channelRun>; mean: number }[] = []
  for (let head = 0; head < heads; head++) {
    for (const { start, count } of pieces(tokens, chunkTokens)) {
      for (let channel = 0; channel < channels; channel++) means.push(subtractMean(data, channelRun(rows, head, channel, start, count)))
    }
  }
  const inner = divide(new Float64Array(heads * tokens))
  for (let row = 0; row < heads * tokens; row++) hadamard(data, row * channels, channels)
  quantize(rows)
  for (let row = 0; row < heads * tokens; row++) {
    hadamard(data, row * channels, channels)
    for (let i = 0; i < channels; i++) data[row * channels + i]! *= inner[row]!
  }
  for (const { run: { first, step, count }, mean } of means) for (let i = 0; i < count; i++) data[first + i * step]! += mean
  for (let head = 0; head < heads; head++) {
    for (let token = 0; token < tokens; token++) {
      const { first, count } = rowRun(rows, head, token)
      for (let i = 0; i < count; i++) data[first + i]! *= outer[head * tokens + token]!
    }
  }
  return heads * tokens * 2 * scaleBits + means.length * halfBits
}

function subtractMean(data: Float32Array, run: ReturnType<typeof channelRun>): { run: typeof run; mean: number } {
  const { first, step, count } = run
  let sum = 0
  for (let i = 0; i < count; i++) sum += data[first + i * step]!
  const mean = half(sum / count)
  for (let i = 0; i < count; i++) data[first + i * step]! -= mean
  return { run, mean }
}

/** The nearest power of 2^(1/8), at least 2^-16. */
function logarithmic(value: number): number {
  return 2 ** (Math.max(-128, Math.round(Math.log2(value) * 8)) / 8)
}

/** 256 centroids of 8 standard normal numbers, or of their magnitudes, repeated for every group. */
async function universalTables(bits: 1 | 2, groups: number, threads: number): Promise<Tables> {
  const points = normals(8 << 16, 3)
  const sample = { data: bits === 2 ? points.map(Math.abs) : points, heads: 1, tokens: 1 << 16, channels: 8 }
  const { codec, data } = await learnTables(sample, '8c8b', { threads })
  const repeated = new Float32Array(groups * data.length)
  for (let group = 0; group < groups; group++) repeated.set(data, group * data.length)
  return { codec, data: repeated }
}

/**
 * VecInfer (arXiv 2510.06175): product quantization of smoothed and mixed keys.
 *
 * Keys, after rotary embedding: channel i is divided by the square root of its largest magnitude on calibration text, then the head's
 * channels are mixed by a Hadamard transform; both are undone after decoding (the paper moves them into the query, which gives the same
 * products). Groups of d channels are coded by the nearest of 2^b centroids, plain k-means of at most 30 iterations. Values are coded
 * as they are. Bits: b / d. The paper has 4d8b (2 bit) and 8d12b (1.5 bit).
 */
import { hadamard, type Method, type Quantizer, type Rows } from './method'
import { learnTables, type Tables, toCentroids } from './product'

export function vecinfer(groupChannels: number, codeBits: number): Method {
  const name = `${groupChannels}d${codeBits}b`
  return {
    name: `vecinfer-${name}`, width: codeBits / groupChannels, file: 'vecinfer.ts', rotated: true, ...(!['4d8b', '8d12b'].includes(name) && { extended: true }),
    fit: async (calibration): Promise<Quantizer> => {
      const { layers } = calibration.shape
      const { threads } = calibration
      const learned: { scales: Float64Array; key: Tables; value: Tables }[] = []
      for (let layer = 0; layer < layers; layer++) {
        const keys = calibration.rows({ layer, side: 'key' }, true)
        const scales = smoothing(keys)
        const mixed = { ...keys, data: keys.data.slice() }
        mix(mixed, scales)
        learned.push({
          scales,
          key: await learnTables(mixed, `${groupChannels}c${codeBits}b`, { threads }),
          value: await learnTables(calibration.rows({ layer, side: 'value' }), `${groupChannels}c${codeBits}b`, { threads }),
        })
      }
      return {
        tableBytes: learned.reduce((sum, { scales, key, value }) => sum + 2 * scales.length + key.data.byteLength + value.data.byteLength, 0),
        quantize: (rows, { layer, side }) => {
          const { scales, key, value } = learned[layer]!
          if (side === 'value') return toCentroids(rows, value, threads)
          mix(rows, scales)
          const bits = toCentroids(rows, key, threads)
          unmix(rows, scales)
          return bits
        },
      }
    },
  }
}

/** [heads][channels]: the square root of each channel's largest magnitude. */
export function smoothing({ data, heads, tokens, channels }: Rows): Float64Array {
  const scales = new Float64Array(heads * channels).fill(Number.MIN_VALUE)
  for (let row = 0; row < heads * tokens; row++) {
    const head = Math.floor(row / tokens)
    for (let channel = 0; channel < channels; channel++) {
      const at = head * channels + channel
      scales[at] = Math.max(scales[at]!, Math.abs(data[row * channels + channel]!))
    }
  }
  return scales.map(Math.sqrt)
}

export function mix({ data, heads, tokens, channels }: Rows, scales: Float64Array): void {
  for (let row = 0; row < heads * tokens; row++) {
    const head = Math.floor(row / tokens)
    for (let channel = 0; channel < channels; channel++) data[row * channels + channel]! /= scales[head * channels + channel]!
    hadamard(data, row * channels, channels)
  }
}

export function unmix({ data, heads, tokens, channels }: Rows, scales: Float64Array): void {
  for (let row = 0; row < heads * tokens; row++) {
    const head = Math.floor(row / tokens)
    hadamard(data, row * channels, channels)
    for (let channel = 0; channel < channels; channel++) data[row * channels + channel]! *= scales[head * channels + channel]!
  }
}

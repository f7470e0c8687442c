/**
 * Coupled Quantization (arXiv 2405.03917), couplet's own codebooks: c neighbouring channels of a head share a code of b bits, the
 * index of the nearest of 2^b centroids, learned by weighted k-means. Keys before rotary embedding. Bits: b / c, nothing else a token.
 * Weights: `uniform`, `attention` or `fisher`, the paper's choice
 * (docs/algorithm.md).
 */
import { type Activations, learnCodebook, type WeightKind } from '../../../lib/calibrate'
import { codec as parseCodec } from '../../../lib/codec'
import type { Method, Quantizer } from './method'
import { toCentroids } from './product'

export function cq(name: string, weights: WeightKind): Method {
  const codec = parseCodec(name)
  return {
    name: `${codec.name}:${weights}`, width: codec.bitsPerChannel, file: 'cq.ts', rotated: false,
    fit: async ({ captured, withFisher, threads }): Promise<Quantizer> => {
      const { sample } = captured
      const unweighted: Activations = { tokensKept: sample.tokensKept, side: async (...place) => ({ ...await sample.side(...place), weights: undefined }) }
      const sources = { uniform: { ...captured, sample: unweighted, weights }, attention: captured, fisher: withFisher }
      using codebook = await learnCodebook(sources[weights], { codec, iterations: 30, threads })
      const tables = Array.from({ length: codebook.layers }, (_, layer) => ({ key: codebook.keyTable(layer), value: codebook.valueTable(layer) }))
      return {
        tableBytes: tables.reduce((sum, { key, value }) => sum + key.byteLength + value.byteLength, 0),
        quantize: (rows, { layer, side }) => toCentroids(rows, { codec, data: tables[layer]![side] }, threads),
      }
    },
  }
}

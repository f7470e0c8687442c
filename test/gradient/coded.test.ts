import assert from 'node:assert/strict'

import { Codebook } from '../../lib/codebook'
import { codec, type HeadCodecs } from '../../lib/codec'
import type { CodedBatch, Tables } from '../../lib/gradient/coded'
import { CodedGradientModel } from '../../lib/gradient/coded'
import { DecoderModel } from '../../lib/onnx/model'
import { ids, temporaryFolder } from '../onnx/files'
import { randomTransforms } from '../transform/samples'
import type { DecoderShape } from '../onnx/graphs'
import { decoder, normals } from '../onnx/graphs'

const [layers, kvHeads, headDim, tokens, vocabulary] = [2, 2, 32, 12, 64]
const part = (firstHead: number, heads: number, key: string, value: string): HeadCodecs =>
  ({ firstHead, heads, keyCodec: codec(key), valueCodec: codec(value) })
/** A layer whose heads share their codecs, and one whose heads have their own. */
const codecs = [[part(0, 2, '8c3b', '4c2b')], [part(0, 1, '4c3b', '8c2b'), part(1, 1, '16c4b', '2c2b')]]

const uniform = codecs.slice(0, 1)

function randomTables(): Tables {
  const random = normals(21)
  const tables = (side: 'keyCodec' | 'valueCodec') => codecs.map((parts) =>
    Float32Array.from({ length: parts.reduce((sum, { heads, [side]: { centroids } }) => sum + heads * headDim * centroids, 0) }, random))
  return { key: tables('keyCodec'), value: tables('valueCodec') }
}

const bookOf = ({ key, value }: Tables, isTransformed: boolean): Codebook => Codebook.fromTables({
  keyTables: key, valueTables: value, codecs, kvHeads, headDim, ...(isTransformed && { transforms: randomTransforms(codecs, headDim) }),
})

const logProbabilities = (logits: Float32Array): number[] => {
  const most = Math.max(...logits)
  const sum = Math.log(logits.reduce((total, logit) => total + Math.exp(logit - most), 0)) + most
  return Array.from(logits, (logit) => logit - sum)
}

describe('gradient of the centroids', function () {
  this.timeout(60_000)
  const folder = temporaryFolder()
  const texts = [ids(tokens), ids(tokens, 3)]

  const logitsOf = async (model: DecoderModel, prefill: 'exact' | 'coded'): Promise<Float32Array> => {
    const parts: number[] = []
    for (const text of texts) {
      using sequence = model.sequence()
      parts.push(...(await model.run([{ sequence, tokens: text }], { prefill })).logits)
    }
    return Float32Array.from(parts)
  }

  const forms: [name: string, shape: DecoderShape, window: number, sinks: number, isTransformed?: boolean][] = [
    ['every token coded', {}, 0, 0],
    ['a window and sinks', { seed: 3 }, 3, 2], // seed 1 has a token so near to two centroids that it changes its code
    ['sinks alone, a softcap, a local window', { softcap: 3, localWindow: 6 }, 0, 1],
    ['packed, interleaved, attention sinks', { seed: 4, packed: true, interleaved: true, headSinks: Float32Array.of(1, -1, 0, 2) }, 2, 0],
    ['metrics and mixed values', { seed: 6 }, 2, 1, true],
  ]
  for (const [name, shape, window, sinks, isTransformed = false] of forms) {
    it(`is that of the KL divergence of the model on codes: ${name}`, async () => {
      const path = folder.save(decoder({ layers, kvHeads, headDim, vocabulary, ...shape }))
      const tables = randomTables()
      using codebook = bookOf(tables, isTransformed)
      using exact = await DecoderModel.load(path, { threads: 1 })
      using coded = await DecoderModel.load(path, { codebook, window, sinks, threads: 1 })
      const batch: CodedBatch = { texts, logits: await logitsOf(exact, 'exact') }
      const codedLogits = await logitsOf(coded, 'coded')
      let divergence = 0
      for (let row = 0; row < texts.length * tokens; row++) {
        const [p, q] = [batch.logits, codedLogits].map((logits) => logProbabilities(logits.subarray(row * vocabulary, (row + 1) * vocabulary)))
        p!.forEach((log, i) => { divergence += Math.exp(log) * (log - q![i]!) / texts.length / tokens })
      }

      using model = await CodedGradientModel.load(path, { codebook, window, sinks, threads: 1 })
      const zeros = (all: Float32Array[]) => all.map(({ length }) => new Float32Array(length))
      const gradients = { key: zeros(tables.key), value: zeros(tables.value) }
      const loss = await model.run(batch, tables, { gradients })
      assert.ok(Math.abs(loss - divergence) < 1e-4 * divergence, `${loss}, not ${divergence}`)
      for (const side of ['key', 'value'] as const) {
        for (let layer = 0; layer < layers; layer++) {
          // Along the gradient, and so little that no token changes its code.
          const gradient = gradients[side][layer]!
          const size = Math.hypot(...gradient)
          assert.ok(size > 0)
          const moved = (step: number) => tables[side].map((table, i) => (i === layer ? table.map((x, k) => x + step * gradient[k]! / size) : table))
          const at = (step: number) => model.run(batch, { ...tables, [side]: moved(step) })
          const measured = (await at(2 ** -11) - await at(-(2 ** -11))) * 2 ** 10
          assert.ok(Math.abs(measured - size) < 0.02 * size + 4e-4, `${side} of layer ${layer}: ${size}, central differences ${measured}`)
        }
      }
    })
  }

  it('codes by the nearest centroid where the mean is many times the spread', async () => {
    const path = folder.save(decoder({ layers: 1, kvHeads, headDim, vocabulary }))
    const random = normals(2)
    const far = (centroids: number) => [Float32Array.from({ length: kvHeads * headDim * centroids }, () => 300 + 0.01 * random())]
    const tables = { key: far(8), value: far(4) }
    using codebook = Codebook.fromTables({ keyTables: tables.key, valueTables: tables.value, codecs: uniform, kvHeads, headDim })
    using exact = await DecoderModel.load(path, { threads: 1 })
    using coded = await DecoderModel.load(path, { codebook, window: 0, sinks: 0, threads: 1 })
    using model = await CodedGradientModel.load(path, { codebook, window: 0, sinks: 0, threads: 1 })
    const own: CodedBatch = { texts, logits: await logitsOf(coded, 'coded') }
    assert.ok(await model.run(own, tables) < 1e-4, 'the divergence from its own logits on codes is 0')
    assert.ok(await model.run({ texts, logits: await logitsOf(exact, 'exact') }, tables) > 0.1)
  })
})

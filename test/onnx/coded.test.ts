import assert from 'node:assert/strict'

import { Codebook } from '../../lib/codebook'
import { DecoderModel } from '../../lib/onnx/model'
import { ids, temporaryFolder } from './files'
import { decoder, normals } from './graphs'
import { farthest } from './plain'
import { reference } from './reference'

const shape = { layers: 2, queryHeads: 4, kvHeads: 2, headDim: 32, hidden: 48, vocabulary: 64, theta: 10000 }

function tables(centroids: number, seed: number): Float32Array[] {
  const random = normals(seed)
  const { layers, kvHeads, headDim } = shape
  return Array.from({ length: layers }, () => Float32Array.from({ length: kvHeads * headDim * centroids }, random))
}

const small = { keyTables: tables(16, 1), valueTables: tables(16, 2), keyCodec: 'cq-2c4b', valueCodec: 'cq-2c4b', kvHeads: 2, headDim: 32 }

describe('onnx on codes', () => {
  const folder = temporaryFolder()
  for (const [codec, groupChannels, centroids] of [['cq-8c8b', 8, 256], ['cq-2c4b', 2, 16], ['cq-16c8b', 16, 256], ['cq-16c12b', 16, 4096]] as const) {
    for (const [sinks, window] of groupChannels === 16 ? [[2, 5]] as const : [[0, 1], [0, 0], [2, 5]] as const) {
      it(`agrees with a double reference: ${codec}, ${sinks} sinks, window ${window}`, async () => {
        const graph = decoder(shape)
        const [keyTables, valueTables] = [tables(centroids, 1), tables(centroids, 2)]
        const codebook = Codebook.fromTables({ keyTables, valueTables, keyCodec: codec, valueCodec: codec, kvHeads: 2, headDim: 32 })
        using model = await DecoderModel.load(folder.save(graph), { codebook, sinks, window })
        const tokens = ids(90)
        const expect = (width: number) => Float32Array.from(reference(graph, tokens, shape, { groupChannels, keyTables, valueTables, sinks, window: width }))
        const expected = expect(window)

        const whole = await model.run([{ sequence: model.sequence(), tokens }], { prefill: 'coded' })
        assert.ok(farthest(whole.logits, expected) < 2e-4, `all at once: ${farthest(whole.logits, expected)}`)

        // One by one both modes see the same, but for the newest token itself: `exact` never reads it from codes.
        for (const [prefill, logits] of [['coded', expected], ['exact', expect(Math.max(window, 1))]] as const) {
          const sequence = model.sequence()
          for (const [t, token] of tokens.entries()) {
            const result = await model.run([{ sequence, tokens: [token] }], { logits: 'last', prefill })
            assert.deepEqual(result.dims, [1, 1, 64])
            const difference = farthest(result.logits, logits.subarray(t * 64, (t + 1) * 64))
            assert.ok(difference < 2e-4, `${prefill}, token ${t}: ${difference}`)
          }
        }
      })
    }
  }

  it('meets new tokens in full precision unless told otherwise', async () => {
    const graph = decoder(shape)
    const codebook = Codebook.fromTables(small)
    using model = await DecoderModel.load(folder.save(graph), { codebook, sinks: 1, window: 4 })
    const tokens = ids(30)
    const { logits } = await model.run([{ sequence: model.sequence(), tokens }])
    assert.ok(farthest(logits, Float32Array.from(reference(graph, tokens, shape))) < 2e-4)
  })

  it('refuses the codebook of another model', async () => {
    const path = folder.save(decoder(shape))
    const load = async (change: object) => {
      const codebook = Codebook.fromTables({ ...small, ...change })
      return (await DecoderModel.load(path, { codebook })).dispose()
    }
    await load({})
    await load({ metadata: { rotary: { kind: 'half', dim: 32, theta: 10000 } } })
    const mismatch = { code: 'ERR_COUPLET_CODEBOOK_MISMATCH' }
    await assert.rejects(load({ kvHeads: 4, headDim: 16 }), mismatch)
    await assert.rejects(load({ keyTables: tables(16, 1).slice(1), valueTables: tables(16, 1).slice(1) }), mismatch)
    await assert.rejects(load({ metadata: { model: `sha256:${'0'.repeat(64)}` } }), mismatch)
    await assert.rejects(load({ metadata: { rotary: { kind: 'interleaved', dim: 32, theta: 10000 } } }), mismatch)
  })
})

import assert from 'node:assert/strict'

import { GraphBuilder } from '../../lib/gradient/builder'
import { rowsName, sides } from '../../lib/gradient/attention'
import type { Side } from '../../lib/gradient/attention'
import { addGradients, floatsOf, gradientName, GradientModel, lossName } from '../../lib/gradient/model'
import { GraphSession } from '../../lib/gradient/session'
import { crossEntropy } from '../../lib/evaluate'
import { codeOf } from '../../lib/errors'
import { openDecoder } from '../../lib/onnx/decoder'
import { DecoderModel } from '../../lib/onnx/model'
import { Capture } from '../../lib/onnx/capture'
import { DataType } from '../../lib/onnx/proto'
import { ids, prose, temporaryFolder, tinyLlama } from '../onnx/files'
import type { DecoderShape } from '../onnx/graphs'
import { decoder, normals } from '../onnx/graphs'

/** Sum of the cross-entropies of a text, by the model itself. */
async function plainLoss(model: DecoderModel, tokens: number[]): Promise<number> {
  using sequence = model.sequence()
  const { logits } = await model.run([{ sequence, tokens }])
  const vocabulary = logits.length / tokens.length
  return tokens.slice(1).reduce((sum, token, t) => sum + crossEntropy(logits.subarray(t * vocabulary, (t + 1) * vocabulary), token), 0)
}

/** A gradient graph to whose keys and values an offset is added that is fed. */
async function offsetGraph(path: string) {
  const opened = await openDecoder(path)
  const feeds = await addGradients(opened)
  const { graph, folder, layers } = opened
  const { kvHeads, headDim } = opened.shape
  const build = new GraphBuilder(graph, 'offsets')
  graph.graph.node = graph.graph.node.flatMap((node) => {
    const name = node.output[0]!
    if (!layers.some((_, layer) => sides.some((side) => rowsName(layer, side) === name))) return [node]
    node.output[0] = `${name}.before`
    build.add('Add', [node.output[0], build.input(`${name}.offset`, DataType.float, [1, 'tokens', kvHeads, headDim])], { outputs: [name] })
    return [node, ...build.take()]
  })
  const session = await GraphSession.create(graph, { folder, threads: 1 })
  const run = (tokens: number[], offsets: Map<string, Float32Array>) => session.run([
    ...feeds(tokens),
    ...layers.flatMap((_, layer) => sides.map((side) => {
      const name = rowsName(layer, side)
      const dims = [1, tokens.length, kvHeads, headDim]
      return { name: `${name}.offset`, type: DataType.float, dims, data: offsets.get(name) ?? new Float32Array(tokens.length * kvHeads * headDim) }
    })),
  ])
  return { run, session, layers: layers.length }
}

async function checkDifferences(path: string, tokens: number[], { step = 2 ** -6, tolerance = 0.01 } = {}): Promise<void> {
  const { run, session, layers } = await offsetGraph(path)
  const random = normals(3)
  const exact = await run(tokens, new Map())
  for (let layer = 0; layer < layers; layer++) {
    for (const side of sides) {
      const gradient = floatsOf(exact, gradientName(layer, side))
      const along = Float32Array.from(gradient, random)
      const at = async (sign: number) => floatsOf(await run(tokens, new Map([[rowsName(layer, side), along.map((x) => sign * step * x)]])), lossName)[0]!
      const measured = (await at(1) - await at(-1)) / (2 * step)
      const expected = gradient.reduce((sum, g, i) => sum + g * along[i]!, 0)
      const scale = Math.hypot(...gradient) // of what a random direction gives
      assert.ok(scale > 0 && Math.abs(measured - expected) < tolerance * scale,
        `${side} of layer ${layer}: gradient ${expected}, central differences ${measured}, of about ${scale}`)
    }
  }
  session.dispose()
}

describe('gradient graph of a decoder', function () {
  this.timeout(60_000)
  const folder = temporaryFolder()

  it('has the loss, keys and values of the model, and gradients that equal central differences, on the small model', async () => {
    const tokens = prose(0, 48)
    using model = await DecoderModel.load(tinyLlama, { threads: 1 })
    using gradients = await GradientModel.load(tinyLlama, { threads: 1 })
    const { loss, rows } = await gradients.run(tokens)
    const expected = await plainLoss(model, tokens)
    assert.ok(Math.abs(loss - expected) < 1e-4 * expected, `${loss}, not ${expected}`)
    using capture = new Capture({ model, points: tokens.length, weights: 'uniform' })
    using sequence = model.sequence()
    await model.run([{ sequence, tokens }], { capture })
    const { layers, kvHeads, headDim } = model.shape
    const width = kvHeads * headDim
    for (const [side, all] of [['key', capture.keys], ['value', capture.values]] as [Side, Float32Array][]) {
      for (let i = 0; i < all.length; i++) {
        const [token, layer, channel] = [Math.floor(i / width / layers), Math.floor(i / width) % layers, i % width]
        assert.ok(Math.abs(all[i]! - rows[side][layer]![token * width + channel]!) < 1e-3)
      }
    }
    await checkDifferences(tinyLlama, tokens, { step: 2 ** -5 })
  })

  const forms: Record<string, DecoderShape> = {
    'packed queries, keys and values': { packed: true },
    'interleaved rotation of some channels': { interleaved: true, rotaryDim: 16 },
    'RotaryEmbedding nodes': { rotary: 'nodes4d' },
    'no rotation, one kv head': { rotary: 'none', kvHeads: 1 },
    'a scale, a softcap and a local window': { scale: 0.3, softcap: 2, localWindow: 5 },
    'attention sinks': { headSinks: Float32Array.of(1, -1, 0.5, 2) },
    'positions measured from a past': { measuredPast: true },
    'a softcap of the logits': { finalSoftcap: true },
    'logits that can be cut': { keepInput: true },
  }
  for (const [name, shape] of Object.entries(forms)) {
    it(`holds for ${name}`, async () => {
      const path = folder.save(decoder({ headDim: 32, seed: 9, ...shape }))
      const tokens = ids(11)
      using model = await DecoderModel.load(path, { threads: 1 })
      using gradients = await GradientModel.load(path, { threads: 1 })
      const { loss } = await gradients.run(tokens)
      const expected = await plainLoss(model, tokens)
      assert.ok(Math.abs(loss - expected) < 1e-4 * expected, `${loss}, not ${expected}`)
      await checkDifferences(path, tokens)
    })
  }

  it('holds for float16, within its precision', async () => {
    const path = folder.save(decoder({ type: 'float16', seed: 9 }))
    const tokens = ids(11)
    using model = await DecoderModel.load(path, { threads: 1 })
    using gradients = await GradientModel.load(path, { threads: 1 })
    const [half, expected] = [await gradients.run(tokens), await plainLoss(model, tokens)]
    assert.ok(Math.abs(half.loss - expected) < 1e-2 * expected, `${half.loss}, not ${expected}`)
    await checkDifferences(path, tokens, { step: 2 ** -4, tolerance: 0.15 })
  })

  it('runs a text of one token, which has no loss', async () => {
    using gradients = await GradientModel.load(tinyLlama, { threads: 1 })
    const { loss, gradients: { key } } = await gradients.run([65])
    assert.equal(loss, 0)
    assert.ok(key.every((layer) => layer.every((g) => g === 0)))
  })

  it('refuses a text beyond its positions, an operator without a rule, and a use after its end', async () => {
    const gradients = await GradientModel.load(folder.save(decoder({ positions: 8 })))
    await assert.rejects(gradients.run(ids(9)), { name: 'RangeError', message: /at most 8 tokens/ })
    gradients.dispose()
    await assert.rejects(gradients.run(ids(3)), { code: 'ERR_COUPLET_DISPOSED' })

    const model = decoder()
    const projection = model.graph.node.findLast(({ opType }) => opType === 'MatMul')!
    const build = new GraphBuilder(model, 'odd')
    projection.input[0] = build.add('Sin', [projection.input[0]!])
    model.graph.node.splice(model.graph.node.indexOf(projection), 0, ...build.take())
    await assert.rejects(GradientModel.load(folder.save(model)), (error: Error) => {
      assert.equal(codeOf(error), 'ERR_COUPLET_UNSUPPORTED_MODEL')
      assert.match(error.message, /node "odd\.0\.Sin" \(Sin\)/)
      return true
    })
  })

  it('stops when its signal fires', async () => {
    using gradients = await GradientModel.load(tinyLlama, { threads: 1 })
    const controller = new AbortController()
    const running = gradients.run(prose(0, 512), controller.signal)
    setTimeout(() => { controller.abort(new Error('enough')) }, 20)
    await assert.rejects(running, /enough/)
  })
})

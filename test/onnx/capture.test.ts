import assert from 'node:assert/strict'

import { codeOf } from '../../lib/errors'
import type { CaptureOptions } from '../../lib/onnx/capture'
import { Capture } from '../../lib/onnx/capture'
import { DecoderModel } from '../../lib/onnx/model'
import type { Model } from '../../lib/onnx/proto'
import { decodeTensor } from '../../lib/onnx/proto'
import { ids, temporaryFolder } from './files'
import { decoder } from './graphs'
import { farthest } from './plain'
import { rotate } from './reference'

const shape = { layers: 2, queryHeads: 4, kvHeads: 2, headDim: 32, hidden: 48 }
const rowLength = shape.layers * shape.kvHeads * shape.headDim

/** A projection of the first layer, for every token: float32 [tokens][width]. */
function project(model: Model, name: string, tokens: number[]): Float32Array {
  const weights = (tensor: string) => new Float32Array(decodeTensor(model.initializers.get(tensor)!).rawData.slice().buffer)
  const embedding = weights('embedding')
  const matrix = weights(`layers.0.${name}.weight`)
  const width = matrix.length / shape.hidden
  return Float32Array.from({ length: tokens.length * width }, (_, i) => {
    let sum = 0
    for (let row = 0; row < shape.hidden; row++) sum += embedding[tokens[Math.floor(i / width)]! * shape.hidden + row]! * matrix[row * width + (i % width)]!
    return sum
  })
}

/** Weights of the first layer in double precision, float64 [tokens][kvHeads]: see couplet_attention_weights_params. */
function attentionWeights(model: Model, tokens: number[]): { key: Float64Array; value: Float64Array } {
  const { queryHeads, kvHeads, headDim } = shape
  const rowsOf = (name: string) => Float64Array.from(project(model, name, tokens))
  const [queries, keys, values] = [rowsOf('query'), rowsOf('key'), rowsOf('value')]
  const row = (rows: Float64Array, heads: number, token: number, head: number) =>
    rows.subarray((token * heads + head) * headDim, (token * heads + head + 1) * headDim)
  const dot = (a: Float64Array, b: Float64Array) => a.reduce((sum, x, i) => sum + x * b[i]!, 0)
  const key = new Float64Array(tokens.length * kvHeads)
  const value = new Float64Array(tokens.length * kvHeads)
  for (let head = 0; head < queryHeads; head++) {
    const kvHead = Math.floor(head / (queryHeads / kvHeads))
    for (let i = 0; i < tokens.length; i++) {
      const query = rotate(row(queries, queryHeads, i, head), i, 10000)
      const read = (t: number) => row(values, kvHeads, t, kvHead)
      const logits = Array.from({ length: i + 1 }, (_, t) => dot(query, rotate(row(keys, kvHeads, t, kvHead), t, 10000)) / Math.sqrt(headDim))
      const most = Math.max(...logits)
      const sum = logits.reduce((total, logit) => total + Math.exp(logit - most), 0)
      const probability = logits.map((logit) => Math.exp(logit - most) / sum)
      const output = new Float64Array(headDim).map((_, c) => probability.reduce((total, p, t) => total + p * read(t)[c]!, 0))
      probability.forEach((p, t) => {
        const distance = dot(read(t), read(t)) + dot(output, output) - 2 * dot(output, read(t))
        value[t * kvHeads + kvHead]! += p * p
        key[t * kvHeads + kvHead]! += p * p * distance * dot(query, query) / headDim
      })
    }
  }
  return { key, value }
}

describe('onnx capture', () => {
  const folder = temporaryFolder()
  const graph = decoder(shape)
  let model: DecoderModel
  before(async () => { model = await DecoderModel.load(folder.save(graph), { threads: 2 }) })
  after(() => model.dispose())

  const sample = async (options: Omit<CaptureOptions, 'model' | 'weights'>, texts: number[][]) => {
    const capture = new Capture({ model, weights: 'uniform', ...options })
    for (const tokens of texts) await model.run([{ sequence: model.sequence(), tokens }], { capture })
    return capture
  }

  it('keeps keys before rotation, and values, as [token][layer][kvHead][headDim]', async () => {
    const tokens = ids(33)
    const capture = await sample({ points: 40 }, [tokens])
    assert.deepEqual([capture.tokensSeen, capture.tokensKept, capture.keys.length, capture.keyWeights], [33, 33, 33 * rowLength, undefined])
    for (const [kept, name] of [[capture.keys, 'key'], [capture.values, 'value']] as const) {
      const width = shape.kvHeads * shape.headDim
      const firstLayer = Float32Array.from({ length: 33 * width }, (_, i) => kept[Math.floor(i / width) * rowLength + (i % width)]!)
      assert.ok(farthest(firstLayer, project(graph, name, tokens)) < 1e-5)
    }
  })

  it('reads packed graphs and rows with padding alike', async () => {
    const packed = await DecoderModel.load(folder.save(decoder({ ...shape, packed: true })), { threads: 2 })
    const rows = [ids(9), ids(4, 3), ids(11, 5)]
    const together = new Capture({ model: packed, points: 100, weights: 'uniform' })
    await packed.run(rows.map((tokens) => ({ sequence: packed.sequence(), tokens })), { capture: together })
    const alone = new Capture({ model: packed, points: 100, weights: 'uniform' })
    for (const tokens of rows) await packed.run([{ sequence: packed.sequence(), tokens }], { capture: alone })
    assert.ok(farthest(together.keys, alone.keys) < 1e-4)
    assert.ok(farthest(together.values, alone.values) < 1e-4)
    packed.dispose()
  })

  it('keeps a uniform sample of whole tokens, decided by the seed', async () => {
    const texts = [ids(50), ids(50, 3), ids(50, 5), ids(50, 11)]
    const all = await sample({ points: 200 }, texts)
    const places = new Map(Array.from({ length: 200 }, (_, t) => [all.keys.subarray(t * rowLength, (t + 1) * rowLength).join(), t]))
    const draw = async (seed: number) => {
      const capture = await sample({ points: 16, seed }, texts)
      assert.deepEqual([capture.tokensSeen, capture.tokensKept], [200, 16])
      return Array.from({ length: 16 }, (_, slot) => {
        const place = places.get(capture.keys.subarray(slot * rowLength, (slot + 1) * rowLength).join())
        assert.ok(place !== undefined, 'a kept row is a row of one token, in all layers and heads')
        assert.deepEqual(capture.values.subarray(slot * rowLength, (slot + 1) * rowLength), all.values.subarray(place * rowLength, (place + 1) * rowLength))
        return place
      })
    }
    assert.deepEqual(await draw(1), await draw(1))
    assert.notDeepEqual(await draw(1), await draw(2))
    const drawn: number[] = []
    for (let seed = 0; seed < 25; seed++) drawn.push(...(await draw(seed)))
    // 400 draws: each quarter of the text expects 100, with a standard deviation below 8.7.
    for (let quarter = 0; quarter < 4; quarter++) {
      const count = drawn.filter((place) => Math.floor(place / 50) === quarter).length
      assert.ok(Math.abs(count - 100) < 35, `quarter ${quarter} has ${count} of 400`)
    }
  })

  it('weighs tokens by the attention that their text pays to them', async () => {
    const capture = new Capture({ model, points: 60, weights: 'attention' })
    const texts = [ids(21), ids(14, 5)]
    await model.run(texts.map((tokens) => ({ sequence: model.sequence(), tokens })), { capture })
    assert.equal(capture.keyWeights!.length, 35 * shape.layers * shape.kvHeads)
    const heads = shape.kvHeads
    const firstLayer = (weights: Float32Array) =>
      Float64Array.from({ length: 35 * heads }, (_, i) => weights[Math.floor(i / heads) * shape.layers * heads + (i % heads)]!)
    const expected = texts.map((tokens) => attentionWeights(graph, tokens))
    for (const [side, weights] of [['key', capture.keyWeights!], ['value', capture.valueWeights!]] as const) {
      firstLayer(weights).forEach((weight, i) => {
        const right = expected.flatMap((text) => [...text[side]])[i]!
        assert.ok(Math.abs(weight - right) <= 1e-4 * right, `${side} weight ${i}: ${weight}, not ${right}`)
      })
    }
  })

  it('asks for fresh sequences where attention is weighed', async () => {
    const capture = new Capture({ model, points: 10, weights: 'attention' })
    const sequence = model.sequence()
    await model.run([{ sequence, tokens: ids(3) }])
    await assert.rejects(model.run([{ sequence, tokens: ids(3) }], { capture }), { code: 'ERR_COUPLET_INVALID_ARGUMENT', message: /fresh sequences/ })
    assert.equal(sequence.length, 3)
  })

  it('serves one run at a time, of its own model, and none after a failure', async () => {
    const capture = await sample({ points: 10 }, [])
    const tokens = ids(100)
    const [first, second] = await Promise.allSettled([0, 1].map(() => model.run([{ sequence: model.sequence(), tokens }], { capture })))
    assert.equal(first!.status, 'fulfilled')
    assert.equal(codeOf((second as PromiseRejectedResult).reason), 'ERR_COUPLET_BUSY')
    assert.equal(capture.tokensSeen, 100)

    const other = await DecoderModel.load(folder.save(decoder({ ...shape, layers: 1, positions: 8 })))
    await assert.rejects(other.run([{ sequence: other.sequence(), tokens: ids(3) }], { capture }), { code: 'ERR_COUPLET_INVALID_ARGUMENT', message: /another/ })
    const spoiled = new Capture({ model: other, points: 10, weights: 'uniform' })
    await assert.rejects(other.run([{ sequence: other.sequence(), tokens: ids(9) }], { capture: spoiled }))
    await assert.rejects(other.run([{ sequence: other.sequence(), tokens: ids(3) }], { capture: spoiled }), { code: 'ERR_COUPLET_BUSY', message: /not whole/ })
    other.dispose()
  })

  it('refuses a sample whose memory was given away', async () => {
    const capture = await sample({ points: 10 }, [ids(3)])
    structuredClone(capture.values, { transfer: [capture.values.buffer as ArrayBuffer] })
    await assert.rejects(model.run([{ sequence: model.sequence(), tokens: ids(3) }], { capture }), { code: 'ERR_COUPLET_INVALID_ARGUMENT' })
  })

  it('says what is wrong with its options', () => {
    const make = (options: object) => () => new Capture({ model, points: 10, weights: 'uniform', ...options })
    assert.throws(make({ points: 0 }), { name: 'RangeError', code: 'ERR_COUPLET_INVALID_ARGUMENT' })
    assert.throws(make({ weights: 'fisher' }), /"uniform" or "attention"/)
    assert.throws(make({ model: 'tiny' }), { name: 'TypeError' })
    assert.throws(make({ points: 2 ** 31 - 1 }), { code: 'ERR_COUPLET_OUT_OF_MEMORY' })
    const capture = make({})()
    capture.dispose()
    assert.throws(() => capture.keys, { code: 'ERR_COUPLET_DISPOSED' })
  })
})

import assert from 'node:assert/strict'

import { captureActivations } from '../../lib/calibrate'
import { FileStore } from '../../lib/calibrate/checkpoint'
import { CodedError } from '../../lib/calibrate/error'
import type { SampleStore, TokenRows } from '../../lib/calibrate/sample'
import { ActivationSample, MemoryStore } from '../../lib/calibrate/sample'
import { codec as parseCodec } from '../../lib/codec'
import { Capture } from '../../lib/onnx/capture'
import { DecoderModel } from '../../lib/onnx/model'
import { prose, temporaryFolder, tinyLlama } from '../onnx/files'

const shape = { layers: 2, queryHeads: 4, kvHeads: 2, headDim: 8, rotary: null }

/** Tokens first to first + count - 1, whose rows and weights say which they are. */
function numbered(first: number, count: number): TokenRows {
  const layers = (width: number, sign: number) => [0, 1].map((layer) => {
    const data = new Float32Array(3 + count * (width + 1))
    for (let token = 0; token < count; token++) data.fill(sign * (first + token + 1000 * layer), 3 + token * (width + 1), 3 + token * (width + 1) + width)
    return { data, offset: 3, tokenStride: width + 1 }
  })
  return { tokens: count, rows: { key: layers(16, 1), value: layers(16, -1) }, weights: { key: layers(2, 2), value: layers(2, 3) } }
}

async function contents(sample: ActivationSample): Promise<Record<string, number[]>> {
  const all: Record<string, number[]> = {}
  for (const layer of [0, 1]) {
    for (const side of ['key', 'value'] as const) {
      const { rows, weights } = await sample.side(layer, side)
      all[`${layer} ${side}`] = [...rows, ...weights!]
    }
  }
  return all
}

describe('samples of activations', () => {
  const folder = temporaryFolder()
  const sampleIn = (store: SampleStore, points = 50) => new ActivationSample({ shape, points, seed: 9, weights: 'heads', store })

  it('are the same in memory and in files, in one go and after chunks that were run twice', async () => {
    const memory = sampleIn(new MemoryStore(50))
    for (let first = 0; first < 400; first += 23) await memory.add(numbered(first, 23))
    const files = new FileStore(folder.path, 'a.')
    const first = sampleIn(files)
    for (let token = 0; token < 230; token += 23) await first.add(numbered(token, 23))
    const second = sampleIn(files) // another process, to which the last three chunks are not known
    second.skip(161)
    for (let token = 161; token < 400; token += 23) await second.add(numbered(token, 23))
    assert.equal(memory.tokensKept, 50)
    assert.deepEqual(await contents(second), await contents(memory))
    const { rows } = await memory.side(1, 'value')
    const tokens = Array.from({ length: 50 }, (_, slot) => -rows[slot * 16]! - 1000)
    assert.equal(new Set(tokens).size, 50)
    assert.ok(tokens.some((token) => token > 300) && tokens.every((token) => token >= 0 && token < 414))
  })

  it('take no more memory for a longer text', async () => {
    const bytes = []
    for (const chunks of [10, 40, 160]) {
      const store = new MemoryStore(50)
      const sample = sampleIn(store)
      for (let chunk = 0; chunk < chunks; chunk++) await sample.add(numbered(chunk * 23, 23))
      bytes.push(store.bytes)
    }
    // 50 tokens of 2 layers and sides of 16 channels and 2 weights, 4 bytes each
    assert.deepEqual(bytes, Array.from({ length: 3 }, () => 50 * 2 * 2 * 18 * 4))
  })

  it('grow with a short one', async () => {
    const store = new MemoryStore(1e9)
    const sample = sampleIn(store, 1e9)
    for (let chunk = 0; chunk < 5; chunk++) await sample.add(numbered(chunk * 23, 23))
    assert.equal(sample.tokensKept, 115)
    assert.ok(store.bytes <= 2 * 115 * 2 * 2 * 18 * 4, String(store.bytes))
    store.dispose()
    await assert.rejects(sample.side(0, 'key'), { code: 'ERR_COUPLET_DISPOSED' })
  })

  it('have the tokens that onnx/Capture keeps', async () => {
    using model = await DecoderModel.load(tinyLlama, { threads: 1 })
    const text = prose(0, 600)
    using captured = await captureActivations(model, { text, length: 128, points: 90, seed: 3, heldOut: 0, weights: 'attention' })
    using capture = new Capture({ model, points: 90, seed: 3, weights: 'attention' })
    for (let start = 0; start < 600; start += 128) {
      using sequence = model.sequence()
      await model.run([{ sequence, tokens: text.slice(start, start + 128) }], { capture, logits: 'last' })
    }
    const { layers, kvHeads, headDim } = model.shape
    const ofLayer = (all: Float32Array, layer: number, width: number) =>
      Array.from({ length: 90 }, (_, slot) => [...all.subarray((slot * layers + layer) * width, (slot * layers + layer + 1) * width)]).flat()
    for (const layer of [0, 3]) {
      const [key, value] = [await captured.sample.side(layer, 'key'), await captured.sample.side(layer, 'value')]
      assert.deepEqual([...key.rows], ofLayer(capture.keys, layer, kvHeads * headDim))
      assert.deepEqual([...value.rows], ofLayer(capture.values, layer, kvHeads * headDim))
      assert.deepEqual([...key.weights!], ofLayer(capture.keyWeights!, layer, kvHeads))
      assert.deepEqual([...value.weights!], ofLayer(capture.valueWeights!, layer, kvHeads))
    }
  })

  it('leave out one chunk in 1 / heldOut, the same whatever `points` is', async () => {
    using model = await DecoderModel.load(tinyLlama, { threads: 1 })
    const text = prose(0, 1000)
    const capture = (options: object) => captureActivations(model, { text, length: 50, ...options })
    using captured = await capture({ heldOut: 0.2 })
    assert.deepEqual([captured.tokens, captured.sample.tokensKept, captured.heldOut?.tokensKept], [1000, 800, 200])
    assert.deepEqual(captured.heldOutChunks, [2, 7, 12, 17].map((chunk) => text.slice(chunk * 50, chunk * 50 + 50)))
    using few = await capture({ heldOut: 0.2, points: 160 })
    assert.deepEqual([few.sample.tokensKept, few.heldOut?.tokensKept, few.heldOutChunks.length], [160, 20, 4])
    using short = await capture({ text: prose(0, 250) })
    assert.deepEqual([short.sample.tokensKept, short.heldOut], [250, undefined])
    await assert.rejects(capture({ heldOut: 0.6 }), { name: 'RangeError', code: 'ERR_COUPLET_INVALID_ARGUMENT' })
    await assert.rejects(capture({ heldOut: '0.1' }), { name: 'TypeError' })
  })
})

describe('coded error', () => {
  const [kvHeads, headDim, tokens] = [2, 16, 1100]
  const codec = parseCodec('cq-8c2b')
  const parts = [{ firstHead: 0, heads: 2, codec }]
  const noise = (length: number, seed: number) => Float32Array.from({ length }, (_, i) => Math.sin((i + 1) * seed * 12.9898) + Math.cos(i * 78.233 + seed))
  const table = noise(kvHeads * 2 * 4 * 8, 3)
  const rows = noise(tokens * kvHeads * headDim, 1).map((x, i) => x + (i % headDim))

  /** By the formula, in double. */
  function expected(weightOf: (token: number, head: number, group: number) => number): number[] {
    return [0, 1].map((head) => {
      let lost = 0
      let variance = 0
      for (let group = 0; group < 2; group++) {
        const points = Array.from({ length: tokens }, (_, token) => {
          const start = (token * kvHeads + head) * headDim + group * 8
          return { x: [...rows.subarray(start, start + 8)], weight: weightOf(token, head, group) }
        })
        const total = points.reduce((sum, { weight }) => sum + weight, 0)
        const means = Array.from({ length: 8 }, (_, c) => points.reduce((sum, { x, weight }) => sum + weight * x[c]!, 0) / total)
        const centroids = [0, 1, 2, 3].map((i) => [...table.subarray(((head * 2 + group) * 4 + i) * 8, ((head * 2 + group) * 4 + i) * 8 + 8)])
        const distance = (a: number[], b: number[]) => a.reduce((sum, x, i) => sum + (x - b[i]!) ** 2, 0)
        for (const { x, weight } of points) {
          lost += weight * Math.min(...centroids.map((centroid) => distance(x, centroid)))
          variance += weight * distance(x, means)
        }
      }
      return lost / variance
    })
  }

  const near = (actual: number[], wanted: number[]) => {
    actual.forEach((share, i) => { assert.ok(Math.abs(share / wanted[i]! - 1) < 1e-5, `${share} and not ${wanted[i]}`) })
  }

  it('is the lost share of the variance, without weights, and with weights of heads or groups', async () => {
    const measure = async (weights: Float32Array | undefined) => {
      const error = new CodedError({ kvHeads, headDim, parts, table, threads: 1 })
      const cut = 700 // in two pieces, as chunks come
      const split = (array: Float32Array | undefined, from: number, to: number) => array?.subarray(array.length / tokens * from, array.length / tokens * to)
      await error.add({ rows: split(rows, 0, cut)!, weights: split(weights, 0, cut) }, cut)
      await error.add({ rows: split(rows, cut, tokens)!, weights: split(weights, cut, tokens) }, tokens - cut)
      return error
    }
    const ofHeads = noise(tokens * 2, 5).map((x) => x * x)
    const ofGroups = noise(tokens * 4, 7).map((x) => x * x)
    near((await measure(undefined)).headShares, expected(() => 1))
    near((await measure(ofHeads)).headShares, expected((token, head) => ofHeads[token * 2 + head]!))
    near((await measure(ofGroups)).headShares, expected((token, head, group) => ofGroups[(token * 2 + head) * 2 + group]!))
  })

  it('is 0 where rows are centroids, or all alike', async () => {
    const exact = new CodedError({ kvHeads, headDim, parts, table: new Float32Array(table.length), threads: 1 })
    await exact.add({ rows: new Float32Array(rows.length), weights: undefined }, tokens)
    assert.deepEqual([exact.share, exact.headShares], [0, [0, 0]])
    const one = new CodedError({ kvHeads, headDim, parts, table, threads: 1 })
    await one.add({ rows: Float32Array.from({ length: 4 * kvHeads * headDim }, (_, i) => {
      const [token, head, channel] = [Math.floor(i / 32), Math.floor(i / 16) % 2, i % 16]
      return table[((head * 2 + Math.floor(channel / 8)) * 4 + token) * 8 + channel % 8]!
    }), weights: undefined }, 4)
    assert.equal(one.share, 0)
    assert.ok(Number.isFinite(one.headShares[0]))
  })
})


// Steps that free centroids make needless, and those that are another way to make a metric or a mixing: each against what it is equal to.
import assert from 'node:assert/strict'
import fc from 'fast-check'

import { encodeSync } from '../../lib'
import { learnParts, learnTable } from '../../lib/calibrate/learn'
import { codec } from '../../lib/codec'
import { enterSide, leaveSide } from '../../lib/transform/apply'
import { learnTransforms } from '../../lib/transform/learn'
import { hadamard, identity, product } from '../../lib/transform/matrix'
import { normals } from '../onnx/graphs'

const [tokens, kvHeads, headDim] = [600, 2, 16]
const four = codec('4c4b')
const shape = { tokens, kvHeads, headDim }
const random = normals(21)
/** Channels of unlike sizes that stand in unlike places, as those of keys do. */
const rows = Float32Array.from({ length: tokens * kvHeads * headDim }, (_, at) => (1 + (at % 5)) * random() + 3 * (at % 3))
const whole = { firstHead: 0, heads: kvHeads, codec: four }
const coding = { codec: four, tokens, kvHeads, headDim }
const learn = (data: Float32Array) => learnTable({ rows: data, weights: undefined }, { ...shape, ...whole }, { iterations: 20, seed: 5, threads: 1 })

/** Numbers on a grid so coarse that sums and differences of them are exact in float32. */
const onGrid = (length: number) => fc.array(fc.integer({ min: -2048, max: 2047 }), { minLength: length, maxLength: length })
  .map((numbers) => Float32Array.from(numbers, (number) => number / 256))
const small = { codec: four, tokens: 12, kvHeads: 1, headDim: 8 }
const drawn = fc.record({ rows: onGrid(12 * 8), tables: onGrid(8 * four.centroids) })

describe('the mean removed', () => {
  /** A channel's number for every row, or every centroid, of it. */
  const moved = (data: Float32Array, means: Float32Array) => data.map((x, at) => x + means[at % means.length]!)
  const movedTable = (tables: Float32Array, means: Float32Array) =>
    tables.map((x, at) => x + means[Math.floor(at / four.centroids / 4) * 4 + (at % 4)]!)

  it('changes no code: centroids move with the rows', () => {
    fc.assert(fc.property(drawn, onGrid(8), (given, means) => {
      const codes = encodeSync(given.rows, { ...small, tables: given.tables })
      assert.deepEqual(encodeSync(moved(given.rows, means), { ...small, tables: movedTable(given.tables, means) }), codes)
    }))
  })

  it('changes nothing that is learned: k-means finds the same clusters, elsewhere', async () => {
    const means = Float32Array.from({ length: kvHeads * headDim }, () => 4 * random())
    const [tables, others] = [await learn(rows), await learn(moved(rows, means))]
    const expected = movedTable(tables, means)
    assert.ok(others.every((x, at) => Math.abs(x - expected[at]!) < 1e-4))
    assert.deepEqual(encodeSync(moved(rows, means), { ...coding, tables: others }), encodeSync(rows, { ...coding, tables }))
  })
})

describe('smoothing', () => {
  /** One number for each channel of each head, as the blocks of a metric. */
  const diagonal = (factors: Float32Array) => Float32Array.from({ length: factors.length * 4 }, (_, at) => {
    const row = Math.floor(at / 4)
    return row % 4 === at % 4 ? factors[row]! : 0
  })
  const scaled = (data: Float32Array, factors: Float32Array) => data.map((x, at) => x * factors[at % factors.length]!)
  const scaledTable = (tables: Float32Array, factors: Float32Array) =>
    tables.map((x, at) => x * factors[Math.floor(at / four.centroids / 4) * 4 + (at % 4)]!)

  it('gives the codes of a diagonal metric', () => {
    const powers = fc.array(fc.integer({ min: -3, max: 3 }), { minLength: 8, maxLength: 8 }).map((exponents) => Float32Array.from(exponents, (e) => 2 ** e))
    fc.assert(fc.property(drawn, powers, (given, factors) => {
      const codes = encodeSync(scaled(given.rows, factors), { ...small, tables: scaledTable(given.tables, factors) })
      assert.deepEqual(encodeSync(given.rows, { ...small, tables: given.tables, metric: diagonal(factors) }), codes)
    }))
  })

  it('learns what k-means learns of smoothed rows', async () => {
    const { metric, ...others } = await learnTransforms({ ...shape, rows, gradients: undefined, rotary: null, parts: [whole] }, 'key', ['key.smooth'])
    assert.deepEqual(others, {})
    const largest = new Float32Array(kvHeads * headDim)
    rows.forEach((x, at) => { largest[at % largest.length] = Math.max(largest[at % largest.length]!, Math.abs(x)) })
    const factors = largest.map((x) => 1 / Math.sqrt(x))
    assert.deepEqual(metric, diagonal(factors))
    const options = { iterations: 20, seed: 5, threads: 1 }
    const tables = await learnParts({ rows, weights: undefined }, { ...shape, parts: [whole], transforms: { metric: metric } }, options)
    const smooth = scaled(rows, factors)
    const smoothTables = await learn(smooth)
    const back = scaledTable(smoothTables, factors.map((x) => 1 / x))
    assert.ok(tables.every((x, at) => Math.abs(x - back[at]!) < 1e-4))
    assert.deepEqual(encodeSync(rows, { ...coding, tables, metric: metric }), encodeSync(smooth, { ...coding, tables: smoothTables }))
  })

  it('leaves channels that are always 0 as they are, and goes with an order of channels', async () => {
    const zeros = rows.map((x, at) => (at % headDim === 3 ? 0 : x))
    const source = { ...shape, rows: zeros, gradients: undefined, rotary: null, parts: [whole] }
    const { metric, order } = await learnTransforms(source, 'key', ['key.group', 'key.smooth'])
    const { metric: plain } = await learnTransforms(source, 'key', ['key.smooth'])
    const at = (matrix: Float32Array, channel: number) => matrix[channel * 4 + (channel % 4)]!
    assert.equal(at(plain!, 3), 1)
    for (let place = 0; place < headDim; place++) assert.equal(at(metric!, place), at(plain!, order![place]!))
  })
})

describe('a Hadamard matrix', () => {
  it('is undone exactly, by numbers that float16 has', () => {
    for (const size of [8, 16, 32, 64, 80, 96, 128, 192, 256]) {
      const { matrix, inverse } = hadamard(size)
      assert.deepEqual(product(matrix, inverse, size), identity(size))
      for (const entries of [matrix, inverse]) assert.ok(entries.every((entry) => entry === 0 || Number.isInteger(Math.log2(Math.abs(entry)))))
      const block = size & -size
      assert.ok(matrix.every((entry, at) => (entry !== 0) === (Math.floor(at / size / block) === Math.floor((at % size) / block))))
      assert.ok(matrix.subarray(0, block).every((entry) => entry > 0), 'the first coordinate is the sum')
    }
  })

  it('takes values into a cache and out of it again', async () => {
    const transforms = await learnTransforms({ ...shape, rows, gradients: undefined, rotary: null, parts: [whole] }, 'value', ['value.hadamard'])
    assert.deepEqual(Object.keys(transforms), ['mix', 'unmix'])
    const mixed = await enterSide({ rows, weights: undefined }, transforms, shape)
    const energy = (data: Float32Array, channel: number) => data.reduce((sum, x, at) => sum + (at % headDim === channel ? x * x : 0), 0)
    assert.ok(Math.abs(mixed.rows[5 * headDim]! - rows.subarray(5 * headDim, 6 * headDim).reduce((a, b) => a + b) / 4) < 1e-4)
    const total = (data: Float32Array) => Array.from({ length: headDim }, (_, channel) => energy(data, channel)).reduce((a, b) => a + b)
    assert.ok(Math.abs(total(mixed.rows) / total(rows) - 1) < 1e-5)
    const back = await leaveSide(mixed.rows, transforms, shape)
    assert.ok(back.every((x, at) => Math.abs(x - rows[at]!) < 1e-5))
  })

  it('takes a metric of what it made', async () => {
    const gradients = rows.map((_, at) => random() * (1 + (at % 7)))
    const source = { ...shape, rows, gradients, rotary: null, parts: [whole] }
    const { metric, mix, unmix } = await learnTransforms(source, 'value', ['value.hadamard', 'value.metric'])
    const mixed = await enterSide({ rows, weights: gradients }, { mix: mix!, unmix: unmix! }, shape)
    const { metric: expected } = await learnTransforms({ ...source, rows: mixed.rows, gradients: mixed.weights! }, 'value', ['value.metric'])
    // Correlations count 95 %: taken before mixing or after it.
    assert.ok(metric!.every((x, at) => Math.abs(x / metric![0]! - expected![at]! / expected![0]!) < 0.1))
  })
})

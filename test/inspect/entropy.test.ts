import assert from 'node:assert/strict'
import { channelCorrelation } from '../../lib/inspect/correlation'
import type { SampledRows } from '../../lib/inspect/entropy'
import { channelEntropies, independentOrders } from '../../lib/inspect/entropy'
import { normals } from '../onnx/graphs'

/** Rows of one layer in the middle of a sample of three. */
function rowsOf(tokens: number, channels: number, value: (token: number, channel: number) => number, kvHeads = 1): SampledRows {
  const tokenStride = 3 * channels
  const data = new Float32Array(tokens * tokenStride).fill(NaN)
  for (let token = 0; token < tokens; token++) {
    for (let channel = 0; channel < channels; channel++) data[token * tokenStride + channels + channel] = value(token, channel)
  }
  return { data, offset: channels, tokens, tokenStride, kvHeads, headDim: channels / kvHeads }
}

const entropies = (rows: SampledRows, seed = 0) => channelEntropies(rows, independentOrders(rows.tokens, seed))
const millerMadow = (cells: number, tokens: number) => (cells - 1) / (2 * tokens * Math.LN2)
const near = (actual: number, expected: number, tolerance = 1e-9) => {
  assert.ok(Math.abs(actual - expected) <= tolerance, `${actual} is not within ${tolerance} of ${expected}`)
}

describe('entropies of channels', () => {
  it('are those of the counts, corrected by the number of occupied cells', () => {
    // Two channels that together run through all 16 x 16 pairs, 4 times each.
    const rows = rowsOf(1024, 2, (token, channel) => (channel === 0 ? token % 16 : Math.floor(token / 16) % 16))
    const [one, two] = entropies(rows)
    near(one!.joint, 4 + millerMadow(16, 1024))
    near(one!.marginal, one!.joint)
    near(two!.joint, 8 + millerMadow(256, 1024))
    near(two!.marginal, 2 * one!.joint)
  })

  it('do not grow with a channel that says nothing new', () => {
    const random = normals(1)
    const values = Float64Array.from({ length: 2000 }, random)
    const [one, , , four] = entropies(rowsOf(2000, 4, (token, channel) => values[token]! * (channel + 1) * (channel % 2 === 0 ? 1 : -1)))
    near(four!.marginal, 4 * one!.joint, 0.2) // the bins of a mirrored channel are mirrored but for their borders
    assert.ok(four!.joint < one!.joint + 0.2 && four!.independent > 2 * four!.joint, JSON.stringify({ one, four }))
  })

  it('show their own bias by what they say of independent channels', () => {
    const random = normals(2)
    const [one, two, three, four] = entropies(rowsOf(500, 4, () => random()))
    near(one!.independent, one!.joint)
    near(two!.joint, two!.marginal, 0.15)
    for (const { joint, independent } of [two!, three!, four!]) near(joint, independent, 0.2)
    assert.ok(four!.joint < four!.marginal - 1, 'four channels of 16 bins cannot be known from 500 tokens')
  })

  it('take no group across heads, and 64 groups at most', () => {
    const random = normals(3)
    const own = Float64Array.from({ length: 600 }, random)
    // Heads of two channels: the second repeats the first, and heads are independent.
    const other = rowsOf(600, 4, (token, channel) => (channel < 2 ? own[token]! : own[(token * 7 + 1) % 600]!), 2)
    const [one, two, three] = entropies(other)
    near(two!.joint, one!.joint, 1e-9)
    assert.ok(Number.isNaN(three!.joint), 'a head of two channels has no group of three')
    const wide = entropies(rowsOf(50, 512, (token, channel) => Math.sin(token * (channel + 1))))
    assert.ok(wide.every(({ joint }) => joint > 0))
  })

  it('of channels that never change are 0, and the same seed gives the same', () => {
    for (const { joint, marginal, independent } of entropies(rowsOf(10, 4, (_, channel) => channel))) {
      for (const bits of [joint, marginal, independent]) near(bits, 0)
    }
    const random = normals(4)
    const rows = rowsOf(300, 8, () => random())
    assert.deepEqual(entropies(rows, 5), entropies(rows, 5))
    assert.notDeepEqual(entropies(rows, 5), entropies(rows, 6))
  })
})

describe('correlation of channels', () => {
  it('is 1, -1 and 0 where channels are the same, opposite or constant', () => {
    const random = normals(5)
    const values = Float64Array.from({ length: 400 }, random)
    const { channels, r, meanAbsolute } = channelCorrelation(rowsOf(400, 3, (token, channel) => [values[token]!, 7 - 2 * values[token]!, 3][channel]!))
    assert.equal(channels, 3)
    r.forEach((value, i) => { near(value, [1, -1, 0, -1, 1, 0, 0, 0, 1][i]!, 1e-6) })
    near(meanAbsolute, 1 / 3, 1e-6)
  })

  it('is Pearson’s of the first 32 channels', () => {
    const random = normals(6)
    const shared = Float64Array.from({ length: 200 }, random)
    const table = Array.from({ length: 200 }, (_, token) => Array.from({ length: 40 }, (_, channel) => random() + channel * shared[token]! / 10 + 100))
    const { channels, r } = channelCorrelation(rowsOf(200, 40, (token, channel) => table[token]![channel]!))
    assert.equal(channels, 32)
    const column = (channel: number) => table.map((row) => Math.fround(row[channel]!))
    const mean = (values: number[]) => values.reduce((a, b) => a + b, 0) / values.length
    const covariance = (a: number[], b: number[]) => mean(a.map((value, i) => value * b[i]!)) - mean(a) * mean(b)
    for (const [a, b] of [[0, 1], [3, 31], [31, 30]] as const) {
      near(r[a * 32 + b]!, covariance(column(a), column(b)) / Math.sqrt(covariance(column(a), column(a)) * covariance(column(b), column(b))), 1e-9)
      assert.equal(r[a * 32 + b], r[b * 32 + a])
    }
  })
})

import assert from 'node:assert/strict'
import { codec as parseCodec, encodeSync } from '../../lib'
import { countCodes, measureCoding, usageOf } from '../../lib/inspect/coding'
import { codeAt } from '../codes/reference'
import { normals } from '../onnx/graphs'

describe('what codes lose', () => {
  const shape = { kvHeads: 2, headDim: 16 }
  const width = shape.kvHeads * shape.headDim

  for (const name of ['cq-8c8b', 'cq-4c3b', 'cq-8c10b', 'cq-16c12b', 'cq-1c1b']) {
    it(`counts every code of ${name} as it is packed`, () => {
      const codec = parseCodec(name)
      const random = normals(codec.codeBits)
      const [tokens, pageTokens] = [150, 64]
      const rows = Float32Array.from({ length: tokens * width }, random)
      const tables = Float32Array.from({ length: width * codec.centroids }, random)
      const codes = encodeSync(rows, { codec, tokens, ...shape, tables, pageTokens })
      const groups = shape.headDim / codec.groupChannels
      const counts = new Uint32Array(shape.kvHeads * groups * codec.centroids)
      countCodes(counts, codes, { codec, tokens, ...shape, pageTokens })
      const expected = new Uint32Array(counts.length)
      for (let token = 0; token < tokens; token++) {
        for (let line = 0; line < shape.kvHeads * groups; line++) {
          expected[line * codec.centroids + codeAt(codes, { codec, tokens, ...shape, pageTokens }, token, Math.floor(line / groups), line % groups)]!++
        }
      }
      assert.deepEqual(counts, expected)
    })
  }

  it('is nothing where rows are centroids, and all where the only centroid is their mean', async () => {
    const codec = parseCodec('cq-8c1b')
    const tokens = 3000 // more than are coded at once
    const data = new Float32Array(tokens * width)
    for (let i = 0; i < data.length; i++) data[i] = Math.floor(i / width) % 2 === 0 ? 1 : -1
    // The groups of head 0 have centroids -1 and 1, those of head 1 have 0 twice.
    const tables = new Float32Array(width * 2)
    for (let group = 0; group < 2; group++) tables.fill(-1, group * 16, group * 16 + 8).fill(1, group * 16 + 8, group * 16 + 16)
    const { headErrors, usage } = await measureCoding({ data, offset: 0, tokens, tokenStride: width, ...shape }, { codec, tables })
    assert.deepEqual(headErrors, [0, 1])
    assert.equal(usage.usedBits, 0.5) // one bit in two groups, none in the two others
    assert.equal(usage.dead, 2 / 8)
    assert.equal(usage.hottest, 1)
  })

  it('is measured on the rows of its layer alone', async () => {
    const codec = parseCodec('cq-4c4b')
    const random = normals(9)
    const tokens = 100
    const data = Float32Array.from({ length: tokens * width * 2 }, random)
    const tables = Float32Array.from({ length: width * codec.centroids }, random)
    const second = { data, offset: width, tokens, tokenStride: 2 * width, ...shape }
    const own = Float32Array.from({ length: tokens * width }, (_, i) => data[Math.floor(i / width) * 2 * width + width + i % width]!)
    const expected = await measureCoding({ data: own, offset: 0, tokens, tokenStride: width, ...shape }, { codec, tables })
    assert.deepEqual(await measureCoding(second, { codec, tables }), expected)
    assert.ok(expected.headErrors.every((error) => error > 0.05 && error < 1.5))
  })
})

describe('the usage of codes', () => {
  const codec = parseCodec('cq-8c5b')

  it('of centroids used alike has all bits, and none dead or hot', () => {
    const usage = usageOf(new Uint32Array(32).fill(10), codec, 320)
    assert.deepEqual({ ...usage, byRank: undefined }, { codeBits: 5, usedBits: 5, dead: 0, hot: 0, hottest: 1 / 32, byRank: undefined })
    usage.byRank.forEach((share, step) => { assert.ok(Math.abs(share - step / 32) < 1e-12) })
  })

  it('finds dead and hot ones, group by group', () => {
    const counts = new Uint32Array(64)
    counts[3] = 100 // one centroid has all of group 0
    counts.fill(5, 32, 52) // twenty of group 1 have 5 % each, less than four times an even share of 3.125 %
    const usage = usageOf(counts, codec, 100)
    assert.equal(usage.dead.toFixed(9), (43 / 64).toFixed(9))
    assert.equal(usage.hot, 1 / 64)
    assert.equal(usage.hottest, 1)
    assert.ok(Math.abs(usage.usedBits - Math.log2(20) / 2) < 1e-12)
    assert.ok(Math.abs(usage.byRank[1]! - (1 + 0.05) / 2) < 1e-12 && Math.abs(usage.byRank.at(-1)! - 1) < 1e-12)
  })

  it('of fewer centroids than steps lies between its ranks', () => {
    const usage = usageOf(Uint32Array.of(6, 2), { codeBits: 1, centroids: 2 }, 8)
    assert.equal(usage.byRank[8], 0.375)
    assert.equal(usage.byRank[16], 0.75)
    assert.equal(usage.byRank[32], 1)
  })
})

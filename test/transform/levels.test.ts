// Values on levels: what kernels look for is there, whatever the numbers are; a second time changes nothing; what learns and tunes ends so.
import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import fc from 'fast-check'

import type { Codebook } from '../../lib'
import { calibrate, codec, tune } from '../../lib'
import { sideParts } from '../../lib/codec'
import { levelCount, onLevels } from '../../lib/transform/levels'
import { temporaryFolder, tinyLlama } from '../onnx/files'
import { normals } from '../onnx/graphs'

const eight = codec('8c8b')
const partsOf = (heads: number, ...names: string[]) => names.map((name, index) => ({ firstHead: index * heads, heads, codec: codec(name) }))
const inBits = (table: Float32Array) => new Uint32Array(table.buffer, table.byteOffset, table.length)
const headDim = 16
const elements = headDim * eight.centroids

/** The numbers of every channel of every group, group by group. */
function channelsOf(table: Float32Array): Float32Array[] {
  const size = eight.centroids * 8
  return Array.from({ length: table.length / eight.centroids }, (_, channel) =>
    table.subarray(Math.floor(channel / 8) * size, (Math.floor(channel / 8) + 1) * size).filter((_, at) => at % 8 === channel % 8))
}

/** How far the numbers lie from 128 levels, in steps of them, beyond what float32 rounds. */
function offLevels(numbers: Float32Array): number {
  const [least, largest] = [Math.min(...numbers), Math.max(...numbers)]
  const step = (largest - least) / 127
  return Math.max(...Array.from(numbers, (x) => {
    const nearest = least + Math.round((x - least) / step) * step
    return least === largest ? 0 : Math.max(0, Math.abs(x - nearest) - Math.max(Math.abs(x) * 2 ** -23, 2 ** -149)) / step
  }))
}

describe('values on levels', () => {
  const random = normals(4)
  const plain = Float32Array.from({ length: 2 * elements }, (_, at) => random() * 2 ** (at % 8) + (at % 8) * 10)

  it('are where kernels look for them, and nowhere far from where they were', () => {
    const before = plain.slice()
    const table = onLevels(plain, partsOf(2, '8c8b'), headDim)
    assert.deepEqual(plain, before, 'what is given is not written')
    const [given, rounded] = [channelsOf(plain), channelsOf(table)]
    assert.ok(given.some((numbers) => offLevels(numbers) > 0.4))
    rounded.forEach((numbers, channel) => {
      assert.ok(offLevels(numbers) < 1e-6)
      assert.ok(new Set(numbers).size <= levelCount)
      const [least, largest] = [Math.min(...given[channel]!), Math.max(...given[channel]!)]
      assert.deepEqual([Math.min(...numbers), Math.max(...numbers)], [least, largest])
      const half = (largest - least) / 127 / 2
      numbers.forEach((x, centroid) => { assert.ok(Math.abs(x - given[channel]![centroid]!) <= half * (1 + 1e-4)) })
    })
  })

  it('stay as they are when they are rounded again, whatever they were', () => {
    const numbers = fc.oneof(
      fc.constant(0), fc.constant(-0), fc.float({ noNaN: true, noDefaultInfinity: true }),
      fc.float({ min: 1, max: Math.fround(1.0001), noNaN: true }), // fewer float32 than levels
      fc.float({ min: -(2 ** -140), max: 2 ** -140, noNaN: true }),
      fc.integer({ min: -3, max: 3 }))
    fc.assert(fc.property(fc.array(numbers, { minLength: 1, maxLength: 24 }), fc.integer({ min: 0, max: 7 }), (drawn, channel) => {
      const table = new Float32Array(elements)
      for (let at = channel; at < table.length; at += 8) table[at] = drawn[((at - channel) / 8) % drawn.length]!
      const once = onLevels(table, partsOf(1, '8c8b'), headDim)
      assert.deepEqual(inBits(onLevels(once, partsOf(1, '8c8b'), headDim)), inBits(once))
      for (const own of channelsOf(once)) {
        assert.ok(own.every(Number.isFinite) && new Set(own).size <= levelCount)
        assert.ok(offLevels(own) < 1e-6, `${offLevels(own)}`)
      }
      assert.deepEqual(channelsOf(once).map((own) => [Math.min(...own), Math.max(...own)].map((x) => x + 0)),
        channelsOf(table).map((own) => [Math.min(...own), Math.max(...own)].map((x) => x + 0)))
    }), { numRuns: 300 })
  })

  it('are left alone where one number is all there is, and at the ends of float32', () => {
    for (const value of [0, -0, 7, -3.4028234663852886e38, 2 ** -149]) {
      const table = new Float32Array(elements).fill(value)
      assert.deepEqual(inBits(onLevels(table, partsOf(1, '8c8b'), headDim)), inBits(table))
    }
    const most = 3.4028234663852886e38
    const wide = Float32Array.from({ length: elements }, (_, at) => most * Math.sin(at))
    for (const numbers of channelsOf(onLevels(wide.fill(most, 0, 8).fill(-most, 8, 16), partsOf(1, '8c8b'), headDim))) assert.ok(numbers.every(Number.isFinite))
  })

  it('are those of cq-8c8b alone, in whichever heads', () => {
    const other = Float32Array.from({ length: headDim * 16 }, random)
    const three = new Float32Array(other.length * 2 + elements)
    three.set(other)
    three.set(plain.subarray(0, elements), other.length)
    three.set(other, other.length + elements)
    const table = onLevels(three, partsOf(1, '8c4b', '8c8b', '4c4b'), headDim)
    assert.deepEqual(table.subarray(0, other.length), other)
    assert.deepEqual(table.subarray(other.length + elements), other)
    assert.deepEqual(table.subarray(other.length, other.length + elements), onLevels(plain.slice(0, elements), partsOf(1, '8c8b'), headDim))
  })
})

describe('what is learned and tuned', function () {
  this.timeout(60_000)
  const folder = temporaryFolder()
  const text = [...readFileSync(join(__dirname, '../../docs/api.md'))].slice(0, 1024)
  const options = {
    model: tinyLlama, text, length: 128, codec: { key: 'cq-8c3b', value: 'cq-8c8b' }, iterations: 3, heldOut: 0, weights: 'attention', threads: 1,
  } as const
  const rounded = (codebook: Codebook) => Array.from({ length: codebook.layers }, (_, layer) =>
    onLevels(codebook.valueTable(layer), sideParts(codebook.codecs[layer]!, 'value'), codebook.headDim))
  const valueTables = (codebook: Codebook) => Array.from({ length: codebook.layers }, (_, layer) => codebook.valueTable(layer))

  it('has its values on levels, and says so; not where that is not wanted', async () => {
    using codebook = (await calibrate(options)).codebook
    using without = (await calibrate({ ...options, levels: false })).codebook
    assert.equal(codebook.metadata.learned!.levels, 128)
    assert.equal(without.metadata.learned!.levels, undefined)
    assert.deepEqual(valueTables(codebook), rounded(without))
    assert.notDeepEqual(valueTables(codebook), valueTables(without))
    for (let layer = 0; layer < codebook.layers; layer++) assert.deepEqual(codebook.keyTable(layer), without.keyTable(layer))
    await assert.rejects(calibrate({ ...options, levels: 1 as unknown as boolean }), /a boolean for `levels` but received 1/)
    using four = (await calibrate({ ...options, codec: 'cq-8c3b' })).codebook
    assert.equal(four.metadata.learned!.levels, undefined)

    const state = join(folder.path, 'state')
    using kept = (await calibrate({ ...options, checkpoint: state })).codebook
    using again = (await calibrate({ ...options, checkpoint: state })).codebook
    assert.deepEqual([kept.toBuffer(), again.toBuffer()], [codebook.toBuffer(), codebook.toBuffer()])
    await assert.rejects(calibrate({ ...options, checkpoint: state, levels: false }), /levels was 1 and is 0/)
  })

  it('is judged on levels and ends there', async () => {
    using codebook = (await calibrate({ ...options, levels: false })).codebook
    const tuning = { model: tinyLlama, codebook, text, length: 64, batch: 2, steps: 4, checkEvery: 2, heldOut: 2, window: 0, sinks: 0, threads: 1 }
    const [on, off, none] = [await tune(tuning), await tune({ ...tuning, levels: false }), await tune({ ...tuning, rate: 1, patience: 1 })]
    assert.deepEqual(valueTables(on.codebook), rounded(on.codebook))
    assert.notDeepEqual(valueTables(off.codebook), rounded(off.codebook))
    assert.deepEqual([on, off].map((one) => [one.bestStep > 0, one.codebook.metadata.learned!.levels]), [[true, 128], [true, undefined]])
    assert.notEqual(on.before, off.before)
    // Where nothing is better than the tables to begin with, they are what was judged.
    assert.equal(none.bestStep, 0)
    assert.deepEqual([none.before, none.codebook.metadata.learned!.levels], [on.before, 128])
    assert.deepEqual(valueTables(none.codebook), rounded(codebook))
    // Tuned without them, values leave their levels, and the metadata no longer say that they are there.
    const left = await tune({ ...tuning, codebook: on.codebook, levels: false, rate: 0.05 })
    assert.equal(left.codebook.metadata.learned!.levels, left.bestStep > 0 ? undefined : 128)
    await assert.rejects(tune({ ...tuning, levels: 'yes' as unknown as boolean }), /a boolean for `levels`/)
  })
})

// Codecs for a budget: what pieces cost is what coding them costs, and the budget is kept as caches count.
import assert from 'node:assert/strict'
import { join } from 'node:path'

import { Cache, calibrate, captureActivations, chooseCodecs, Codebook, codec, learnCodebook } from '../../lib'
import type { Captured, ChooseOptions } from '../../lib'
import { checkChoice, chooseFrom } from '../../lib/allocate/choose'
import { DivergenceModel } from '../../lib/allocate/divergence'
import type { Sensitivity } from '../../lib/allocate/sensitivity'
import { meanBits } from '../../lib/codec'
import { decodeSync, encodeSync } from '../../lib/codes'
import { Capture } from '../../lib/onnx/capture'
import { DecoderModel } from '../../lib/onnx/model'
import { ids, temporaryFolder, tinyLlama } from '../onnx/files'
import { decoder, normals } from '../onnx/graphs'

const logProbabilities = (logits: Float32Array): number[] => {
  const most = Math.max(...logits)
  const sum = Math.log(logits.reduce((total, logit) => total + Math.exp(logit - most), 0)) + most
  return Array.from(logits, (logit) => logit - sum)
}

function divergence(exact: Float32Array, coded: Float32Array, vocabulary: number): number {
  let sum = 0
  for (let at = 0; at < exact.length; at += vocabulary) {
    const [p, q] = [exact, coded].map((logits) => logProbabilities(logits.subarray(at, at + vocabulary))) as [number[], number[]]
    p.forEach((log, i) => { sum += Math.exp(log) * (log - q[i]!) })
  }
  return sum / (exact.length / vocabulary)
}

describe('the divergence of one side of a layer', function () {
  this.timeout(30_000)
  const folder = temporaryFolder()
  const [kvHeads, headDim, vocabulary] = [2, 32, 64]
  for (const [sinks, window] of [[0, 0], [2, 3]] as const) {
    it(`is that of a cache that codes it: sinks ${sinks}, window ${window}`, async () => {
      // In one layer, rows do not depend on what else is coded.
      const path = folder.save(decoder({ layers: 1, kvHeads, headDim, vocabulary }))
      const random = normals(5)
      const table = () => Float32Array.from({ length: kvHeads * headDim * 4 }, random)
      const [keyTables, valueTables] = [[table()], [table()]]
      using codebook = Codebook.fromTables({ keyTables, valueTables, keyCodec: '4c2b', valueCodec: '4c2b', kvHeads, headDim })
      const tokens = ids(20)
      using exact = await DecoderModel.load(path, { threads: 1 })
      using coded = await DecoderModel.load(path, { codebook, sinks, window, threads: 1 })
      using capture = new Capture({ model: exact, points: 20, weights: 'uniform' })
      const { logits } = await exact.run([{ sequence: exact.sequence(), tokens }], { capture })
      const expected = divergence(logits, (await coded.run([{ sequence: coded.sequence(), tokens }], { prefill: 'coded' })).logits, vocabulary)

      const errorsOf = (rows: Float32Array, tables: Float32Array) => {
        const shape = { codec: '4c2b', tokens: 20, kvHeads, headDim, tables }
        return decodeSync(encodeSync(rows, shape), shape).map((value, i) => value - rows[i]!)
      }
      const errors = { key: errorsOf(capture.keys, keyTables[0]!), value: errorsOf(capture.values, valueTables[0]!) }
      using model = await DivergenceModel.load(path, { sinks, window, threads: 1 })
      const run = (sides: readonly ('key' | 'value')[]) =>
        model.run({ texts: [tokens], logits }, sides.map((side) => ({ layer: 0, side, errors: errors[side] })))
      const both = await run(['key', 'value'])
      assert.ok(Math.abs(both - expected) < 1e-4 * expected, `${both}, not ${expected}`)
      assert.ok(await run([]) < 1e-6)
      const [keys, values] = [await run(['key']), await run(['value'])]
      assert.ok(keys > 0.01 * both && values > 0.01 * both && keys !== values, `${keys} and ${values} of ${both}`)
    })
  }
})

/** Rows of two heads of 64, by the nearest centroid of each group of 8 in double precision; groups side by side. */
function codedByHand(rows: Float32Array, codebook: Codebook, layer: number, side: 'key' | 'value'): Float64Array {
  const { keyTable, valueTable, keyMetric } = codebook.parts(layer)[0]!
  const table = side === 'key' ? keyTable : valueTable
  const matrixOf = (name: 'value.mix' | 'value.unmix') => (side === 'value' ? codebook.transform(name, layer) : undefined)
  const metric = side === 'key' ? keyMetric : undefined
  const order = side === 'key' ? codebook.transform('key.group', layer) : undefined
  const through = (row: Float64Array, matrices: Float32Array | undefined, head: number): Float64Array => matrices === undefined ? row
    : row.map((_, to) => row.reduce((sum, value, from) => sum + value * matrices[(head * 64 + from) * 64 + to]!, 0))
  const out = new Float64Array(rows.length)
  for (let at = 0; at < rows.length; at += 64) {
    const head = (at / 64) % 2
    const given = Float64Array.from({ length: 64 }, (_, place) => rows[at + (order?.[place] ?? place)]!)
    const row = through(given, matrixOf('value.mix'), head)
    for (let group = 0; group < 8; group++) {
      const place = head * 8 + group
      const distance = (centroid: number): number => {
        const difference = Array.from({ length: 8 }, (_, i) => row[group * 8 + i]! - table[(place * 16 + centroid) * 8 + i]!)
        const seen = metric === undefined ? difference
          : difference.map((_, y) => difference.reduce((sum, value, x) => sum + value * metric[(place * 8 + y) * 8 + x]!, 0))
        return seen.reduce((sum, value) => sum + value * value, 0)
      }
      const distances = Array.from({ length: 16 }, (_, centroid) => distance(centroid))
      const nearest = distances.indexOf(Math.min(...distances))
      for (let i = 0; i < 8; i++) row[group * 8 + i] = table[(place * 16 + nearest) * 8 + i]!
    }
    through(row, matrixOf('value.unmix'), head).forEach((value, place) => { out[at + (order?.[place] ?? place)] = value })
  }
  return out
}

describe('chooseCodecs', function () {
  this.timeout(120_000)
  const candidates = ['4c4b', '8c4b', '16c4b', '16c6b']
  const options: ChooseOptions = { bits: 0.5, candidates, iterations: 3, sinks: 2, window: 8, threads: 2 }
  const random = normals(3)
  const text = Array.from({ length: 1600 }, () => 32 + Math.floor(Math.abs(random()) * 1000) % 95) // nothing to learn by heart
  let model: DecoderModel
  let captured: Captured
  const folder = temporaryFolder()
  before(async () => {
    model = await DecoderModel.load(tinyLlama, { threads: 2 })
    captured = await captureActivations(model, { text, length: 100, heldOut: 0.1, weights: 'fisher', threads: 2 })
  })
  after(() => {
    captured.dispose()
    model.dispose()
  })

  const pageBits = (codebook: Codebook): number => {
    using cache = new Cache({ codebook, queryHeads: 2, sinks: 0, window: 0 })
    const sequence = cache.sequence()
    const step = cache.begin([{ sequence, tokens: 64 }])
    const rows = new Float32Array(64 * 2 * 64)
    for (let layer = 0; layer < 4; layer++) step.appendSync(layer, [{ keys: rows, values: rows }])
    step.commit()
    return cache.statistics().pageBytes * 8 / (64 * 4 * 2 * 2 * 64)
  }

  for (const measure of ['divergence', 'fisher'] as const) {
    it(`keeps the budget as a cache counts it, and spends it where text suffers most: ${measure}`, async () => {
      const { codecs, chosen, sensitivities } = await chooseCodecs(captured, { ...options, measure })
      assert.equal(sensitivities.length, 4 * 2 * 2)
      assert.ok(sensitivities.every(({ losses }) => losses.length === candidates.length && losses.every(Number.isFinite)))
      using codebook = await learnCodebook(captured, { codec: codecs, chosen, iterations: 3, threads: 2 })
      assert.equal(pageBits(codebook), chosen.bits)
      assert.equal(meanBits(codebook.codecs), chosen.bits) // these pages have no padding
      assert.ok(chosen.bits <= 0.5 && chosen.bits > 0.5 - 0.75 / 16, `${chosen.bits} bits`)
      assert.deepEqual(codebook.metadata.learned?.chosen, chosen)
      assert.deepEqual(Codebook.fromBuffer(codebook.toBuffer()).metadata, codebook.metadata)
      const uniform = sensitivities.reduce((sum, { losses }) => sum + losses[1]!, 0) // 8c4b, half a bit
      assert.ok(chosen.loss < uniform, `${chosen.loss}, and ${uniform} with one codec for all`)
    })
  }

  it('measures the heads of a layer together where they are to be alike', async () => {
    const both = await chooseCodecs(captured, { ...options, per: 'layer', measure: 'fisher' })
    const single = await chooseCodecs(captured, { ...options, measure: 'fisher' })
    assert.equal(both.sensitivities.length, 4 * 2)
    both.sensitivities.forEach(({ heads, losses }, piece) => losses.forEach((loss, index) => {
      const sum = single.sensitivities[2 * piece]!.losses[index]! + single.sensitivities[2 * piece + 1]!.losses[index]!
      assert.ok(heads === 2 && Math.abs(loss - sum) < 1e-6 * sum, `${loss}, not ${sum}`)
    }))
    const { sensitivities } = await chooseCodecs(captured, { ...options, per: 'layer', candidates: ['8c4b'] })
    assert.ok(sensitivities.every(({ losses }) => losses.length === 1 && losses[0]! > 0))
  })

  it('measures codecs with the transforms that the codebook will have', async () => {
    const transforms = ['key.group', 'key.metric', 'value.mix'] as const
    const { sensitivities } = await chooseCodecs(captured, { ...options, transforms, per: 'layer', measure: 'fisher', candidates: ['8c4b'] })
    using codebook = await learnCodebook(captured, { codec: '8c4b', iterations: 3, transforms, threads: 2 })
    const tokens = captured.heldOut!.tokensKept
    const elements = tokens * 2 * 64
    for (const { layer, side, losses } of sensitivities) {
      const { rows, weights } = await captured.heldOut!.side(layer, side)
      const coded = codedByHand(rows.subarray(0, elements), codebook, layer, side)
      let expected = 0
      for (let i = 0; i < elements; i++) expected += (coded[i]! - rows[i]!) ** 2 * weights![i]! ** 2 / 2 / tokens
      assert.ok(Math.abs(losses[0]! - expected) < 1e-3 * expected, `${side} of layer ${layer}: ${losses[0]}, not ${expected}`)
    }
    const plain = captureActivations(model, { text, length: 100, heldOut: 0.1, weights: 'attention', threads: 2 })
    using other = await plain
    await assert.rejects(chooseCodecs(other, { ...options, transforms: ['key.metric'] }), { code: 'ERR_COUPLET_INVALID_ARGUMENT' })
  })

  it('learns for every part what one codec for all heads would have given', async () => {
    const { codecs } = await chooseCodecs(captured, { ...options, measure: 'fisher' })
    using mixed = await learnCodebook(captured, { codec: codecs, iterations: 3, seed: 4, threads: 2 })
    const single = new Map<string, Codebook>()
    for (const name of candidates) single.set(codec(name).name, await learnCodebook(captured, { codec: name, iterations: 3, seed: 4, threads: 2 }))
    for (const layer of [0, 1, 2, 3]) {
      for (const { firstHead, heads, keyCodec, valueCodec, keyTable, valueTable } of mixed.parts(layer)) {
        const own = (table: Float32Array) => table.subarray(firstHead * table.length / 2, (firstHead + heads) * table.length / 2)
        assert.deepEqual(keyTable, own(single.get(keyCodec.name)!.keyTable(layer)))
        assert.deepEqual(valueTable, own(single.get(valueCodec.name)!.valueTable(layer)))
      }
    }
    for (const codebook of single.values()) codebook.dispose()
  })

  it('is part of calibrate, whose checkpoint keeps the choice', async () => {
    const run = async () => {
      const progress: string[] = []
      const { codebook, report } = await calibrate({
        model: tinyLlama, text, length: 100, bits: 0.6, choose: { candidates, measure: 'fisher', per: 'head' }, weights: 'fisher', iterations: 2, threads: 2,
        checkpoint: join(folder.path, 'state'),
        onProgress: ({ phase }) => { if (progress.at(-1) !== phase) progress.push(phase) },
      })
      return { codebook, report, progress }
    }
    const { codebook, report, progress } = await run()
    assert.deepEqual(progress, ['capture', 'choose', 'learn', 'predict'])
    assert.equal(codebook.metadata.learned?.chosen?.budget, 0.6)
    assert.deepEqual(report.codec, { key: codebook.keyCodec?.name ?? 'mixed', value: codebook.valueCodec?.name ?? 'mixed' })
    assert.ok(report.layers.every(({ key, value }) => [...key.heads, ...value.heads].every((share) => share > 0 && share < 1)))
    const again = await run()
    assert.ok(!again.progress.includes('choose'), again.progress.join())
    assert.deepEqual(again.codebook.toBuffer(), codebook.toBuffer())
    const other = calibrate({ model: tinyLlama, text, length: 100, bits: 0.7, weights: 'fisher', iterations: 2, checkpoint: join(folder.path, 'state') })
    await assert.rejects(other, /bits was 0.6 and is 0.7/)
    await assert.rejects(calibrate({ model: tinyLlama, text, bits: 1, codec: '8c8b' }), /either `bits` or `codec`/)
    await assert.rejects(calibrate({ model: tinyLlama, text, choose: {} }), /`bits`/)
    await assert.rejects(calibrate({ model: tinyLlama, text, bits: 1, choose: { candidates: ['24c4b'] } }), /headDim 64/)
    await assert.rejects(calibrate({ model: tinyLlama, text }), /`codec`/)
  })

  it('refuses what it cannot do', async () => {
    using short = await captureActivations(model, { text: ids(30), length: 100 })
    const refused = (options: object, message: RegExp, from = captured) =>
      assert.rejects(chooseCodecs(from, options as ChooseOptions), { code: 'ERR_COUPLET_INVALID_ARGUMENT', message })
    await refused(options, /held out/, short)
    await refused({ ...options, measure: 'fisher' }, /fisher/, short)
    await refused({ ...options, bits: 0.2 }, /at least 0.25/)
    for (const bits of [0, NaN, 13, '1']) await refused({ ...options, bits }, /`bits`/)
    for (const candidates of [[], '8c8b', {}]) await refused({ ...options, candidates }, /`candidates`/)
    await assert.rejects(captureActivations(model, { text: ids(30), seed: 0.5 }), { code: 'ERR_COUPLET_INVALID_ARGUMENT', message: /`seed`/ })
    await refused({ ...options, measure: 'guess' }, /`measure`/)
    await refused({ ...options, per: 'channel' }, /`per`/)
    await refused({ ...options, window: -1 }, /`window`/)
  })
})

describe('chooseFrom', () => {
  const choice = { ...checkChoice({ bits: 1, candidates: ['4c8b', '8c8b', '16c8b'] }, 64), kvHeads: 3, headDim: 64 }
  const loud = (layer: number, side: 'key' | 'value', head: number): Sensitivity => {
    const weight = layer === 1 && side === 'key' && head === 1 ? 9 : 1
    return { layer, side, firstHead: head, heads: 1, losses: [0, weight, 4 * weight] }
  }
  const all = [0, 1].flatMap((layer) => (['key', 'value'] as const).flatMap((side) => [0, 1, 2].map((head) => loud(layer, side, head))))

  it('cuts a layer where heads differ, and joins those that do not', () => {
    const { codecs } = chooseFrom(all, { ...choice, bits: 1.1 })
    assert.deepEqual(codecs.map((parts) => parts.map(({ heads, keyCodec }) => `${heads} ${keyCodec.name}`)), [['3 cq-8c8b'], ['1 cq-8c8b', '1 cq-4c8b', '1 cq-8c8b']])
  })

  it('keeps the heads of a layer alike that were measured together', () => {
    const together = [0, 1].flatMap((layer) => (['key', 'value'] as const).map((side): Sensitivity =>
      ({ layer, side, firstHead: 0, heads: 3, losses: layer === 1 && side === 'key' ? [0, 11, 44] : [0, 3, 12] })))
    const { codecs, chosen } = chooseFrom(together, { ...choice, per: 'layer', bits: 1.3 })
    assert.deepEqual(codecs.map((parts) => parts.map(({ heads, keyCodec, valueCodec }) => `${heads} ${keyCodec.name} ${valueCodec.name}`)),
      [['3 cq-8c8b cq-8c8b'], ['3 cq-4c8b cq-8c8b']])
    assert.equal(chosen.bits, 1.25)
  })
})

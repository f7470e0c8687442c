import assert from 'node:assert/strict'
import { Readable } from 'node:stream'
import { captureActivations, Codebook, codec as parseCodec } from '../../lib'
import { codingOf, measureCoding, throughCodes } from '../../lib/inspect/coding'
import { inspect } from '../../lib/inspect/inspect'
import { attentionMass } from '../../lib/inspect/mass'
import { DecoderModel } from '../../lib/onnx/model'
import { ids, prose, temporaryFolder, tinyLlama } from '../onnx/files'
import type { DecoderShape } from '../onnx/graphs'
import { decoder, normals } from '../onnx/graphs'
import { randomTransforms } from '../transform/samples'

const near = (actual: number, expected: number, tolerance: number) => { assert.ok(Math.abs(actual - expected) <= tolerance, `${actual}, not ${expected}`) }

describe('attention mass', function () {
  this.timeout(60_000)
  const folder = temporaryFolder()
  // Logits that are all 0: every token that a query sees has the same share.
  const evenly = (shape: DecoderShape = {}) => folder.save(decoder({ scale: 1e-20, ...shape }))
  const tokens = 40
  /** Mean over the second half of what share of `seen` tokens a query has in [from, to). */
  const expected = (count: (query: number) => number, seen = (query: number) => query + 1) => {
    let sum = 0
    for (let query = tokens / 2; query < tokens; query++) sum += count(query) / seen(query)
    return sum / (tokens / 2)
  }

  it('of even attention is what counting gives', async () => {
    const { windows, layers } = await attentionMass(evenly(), [ids(tokens), ids(tokens, 3)], { sinks: 3, window: 10, threads: 1 })
    assert.deepEqual(windows, [0, 1, 2, 4, 8, 10, 16, 32, 40])
    assert.equal(layers.length, 2)
    for (const { shares, heads, beyond } of layers) {
      near(shares.sinks, expected(() => 3), 1e-6)
      near(shares.window, expected(() => 10), 1e-6)
      near(shares.codes, expected((query) => query + 1 - 13), 1e-6)
      near(beyond[windows.indexOf(32)]!, expected((query) => Math.max(0, query + 1 - 3 - 32)), 1e-6)
      assert.equal(beyond.at(-1), 0)
      assert.equal(heads.length, 2)
      for (const head of heads) near(head.codes, shares.codes, 1e-6)
    }
  })

  it('counts a token in sinks and window once, as a sink', async () => {
    const { layers } = await attentionMass(evenly(), [ids(tokens)], { sinks: 30, window: 25, threads: 1 })
    near(layers[0]!.shares.sinks, expected((query) => Math.min(30, query + 1)), 1e-6)
    near(layers[0]!.shares.codes, 0, 1e-6)
    const none = await attentionMass(evenly(), [ids(tokens)], { sinks: 0, window: 0, threads: 1 })
    near(none.layers[0]!.shares.codes, 1, 1e-6)
    const all = await attentionMass(evenly(), [ids(tokens)], { sinks: 0, window: 1000, threads: 1 })
    near(all.layers[0]!.shares.window, 1, 1e-6)
  })

  it('knows local windows, and leaves learned sinks out', async () => {
    const local = await attentionMass(evenly({ localWindow: 8 }), [ids(tokens)], { sinks: 4, window: 6, threads: 1 })
    near(local.layers[1]!.shares.codes, 2 / 8, 1e-6)
    const learned = await attentionMass(evenly({ headSinks: Float32Array.of(0, 1, 2, 3) }), [ids(tokens)], { sinks: 3, window: 10, threads: 1 })
    const { sinks, window, codes } = learned.layers[0]!.shares
    near(sinks + window + codes, 1, 1e-6)
    assert.ok(codes > window && window > sinks)
  })
})

describe('what codes make of attention', function () {
  this.timeout(60_000)
  const folder = temporaryFolder()
  const [tokens, sinks, window, headDim, kvHeads] = [30, 2, 5, 32, 2]
  const options = { sinks, window, threads: 1 }
  type Coded = NonNullable<Parameters<typeof attentionMass>[2]['coded']>

  it('is nothing where codes are exact, or where nothing is read from them', async () => {
    const model = folder.save(decoder({ rotary: 'nodes' }))
    const same: Coded = (rows) => Promise.resolve(rows)
    const zero: Coded = (rows) => Promise.resolve(new Float32Array(rows.length))
    for (const change of [{ coded: same }, { coded: zero, window: 100 }]) {
      const { layers } = await attentionMass(model, [ids(tokens)], { ...options, ...change })
      for (const { outputErrors } of layers) for (const error of outputErrors!) near(error, 0, 1e-10)
    }
    const { layers } = await attentionMass(model, [ids(tokens)], { sinks: 0, window: 0, coded: zero })
    for (const { outputErrors } of layers) assert.deepEqual(outputErrors, [1, 1]) // values of zero leave nothing
  })

  it('under even attention is the mean of what codes change', async () => {
    const model = folder.save(decoder({ scale: 1e-20 }))
    const values: Float32Array[] = []
    const coded: Coded = (rows, layer, side) => {
      if (side === 'value') values[layer] = rows
      return Promise.resolve(rows.map((value, i) => value + Math.sin(i)))
    }
    const { layers } = await attentionMass(model, [ids(tokens)], { ...options, coded })
    layers.forEach(({ outputErrors }, layer) => {
      for (let head = 0; head < kvHeads; head++) {
        let [change, output] = [0, 0]
        for (let query = tokens / 2; query < tokens; query++) {
          for (let channel = 0; channel < headDim; channel++) {
            let [sum, lost] = [0, 0]
            for (let token = 0; token <= query; token++) {
              const place = (token * kvHeads + head) * headDim + channel
              sum += values[layer]![place]! / (query + 1)
              if (token >= sinks && query - token >= window) lost += Math.sin(place) / (query + 1)
            }
            change += lost ** 2
            output += sum ** 2
          }
        }
        near(outputErrors![head]!, change / output, 1e-4 * change / output)
      }
    })
  })

  it('sees the keys, too, and each layer by itself', async () => {
    const model = folder.save(decoder())
    const shifted = (wanted: number): Coded => (rows, layer, side) =>
      Promise.resolve(layer === wanted && side === 'key' ? rows.map((value, i) => value + Math.cos(i)) : rows)
    const first = await attentionMass(model, [ids(tokens)], { ...options, coded: shifted(0) })
    const second = await attentionMass(model, [ids(tokens)], { ...options, coded: shifted(1) })
    assert.ok(first.layers[0]!.outputErrors!.every((error) => error > 1e-4) && second.layers[1]!.outputErrors!.every((error) => error > 1e-4))
    for (const error of [...first.layers[1]!.outputErrors!, ...second.layers[0]!.outputErrors!]) near(error, 0, 1e-10)
    const plain = await attentionMass(model, [ids(tokens)], options)
    assert.deepEqual(first.layers.map(({ shares }) => shares), plain.layers.map(({ shares }) => shares))
  })
})

describe('inspect', function () {
  this.timeout(60_000)
  const random = normals(1)
  const side = () => Array.from({ length: 4 }, () => Float32Array.from({ length: 2 * 64 * 16 }, random))
  const codebook = Codebook.fromTables({ keyTables: side(), valueTables: side(), keyCodec: 'cq-8c4b', valueCodec: 'cq-4c4b', kvHeads: 2, headDim: 64 })
  const text = prose(0, 700)

  it('has figures for every layer and side, which JSON holds', async () => {
    const phases = new Set<string>()
    const inspection = await inspect({
      model: tinyLlama, text, codebook, length: 128, threads: 1,
      onProgress: ({ phase, done, total }) => {
        phases.add(phase)
        assert.ok(done <= total)
      },
    })
    assert.deepEqual([...phases], ['capture', 'count', 'attention'])
    assert.deepEqual(JSON.parse(JSON.stringify(inspection)), inspection)
    assert.deepEqual([inspection.tokens, inspection.sampled, inspection.attentionChunks], [700, 700, 5])
    assert.equal(inspection.layers.length, 4)
    for (const layer of inspection.layers) {
      for (const { entropy, correlation, coding } of [layer.key, layer.value]) {
        assert.deepEqual(entropy.map(({ channels }) => channels), [1, 2, 3, 4])
        for (const { joint, marginal, independent } of entropy) assert.ok(joint > 0 && joint <= independent + 0.2 && joint <= marginal + 1e-9)
        assert.equal(correlation.r.length, 32 * 32)
        assert.ok(coding!.headErrors.length === 2 && coding!.usage.usedBits > 0 && coding!.usage.usedBits <= 4)
      }
      assert.deepEqual([layer.key.coding!.codec, layer.value.coding!.codec], ['cq-8c4b', 'cq-4c4b'])
    }
    for (const { outputErrors } of inspection.attention.layers) assert.ok(outputErrors!.length === 2 && outputErrors!.every((error) => error > 0))
    for (const { shares } of inspection.attention.layers) near(shares.sinks + shares.window + shares.codes, 1, 1e-6)
  })

  it('keeps a sample of the size asked for, the same for the same seed, and needs no codebook', async () => {
    const options = { model: tinyLlama, text, length: 64, points: 200, seed: 3, threads: 1 }
    const [one, again] = [await inspect(options), await inspect(options)]
    assert.equal(one.sampled, 200)
    assert.deepEqual(one, again)
    assert.equal(one.layers[0]!.key.coding, undefined)
  })

  it('takes texts shorter than a chunk, and looks at the attention of the longest', async () => {
    const { attentionChunks, attention, tokens } = await inspect({ model: tinyLlama, text: [text.slice(0, 9), text.slice(9, 30)], threads: 1 })
    assert.deepEqual([attentionChunks, attention.windows.at(-1), tokens], [1, 21, 30])
  })

  it('measures mixed codecs part by part', async () => {
    const wide = () => Array.from({ length: 4 }, () => Float32Array.from({ length: 64 * 16 + 64 * 32 }, random))
    const mixed = Codebook.fromTables({
      keyTables: wide(), valueTables: wide(), kvHeads: 2, headDim: 64,
      codecs: Array.from({ length: 4 }, () => [
        { firstHead: 0, heads: 1, keyCodec: 'cq-8c4b', valueCodec: 'cq-8c4b' }, { firstHead: 1, heads: 1, keyCodec: 'cq-4c5b', valueCodec: 'cq-4c5b' },
      ]),
    })
    const { layers } = await inspect({ model: tinyLlama, text, codebook: mixed, length: 128, threads: 1 })
    const { codec, headErrors, usage } = layers[2]!.value.coding!
    assert.deepEqual([codec, headErrors.length, usage.codeBits], ['cq-8c4b, cq-4c5b', 2, 4.5])
    // A head's error is that of its own codes: the same as under a codebook that has only these.
    const table = mixed.parts(2)[1]!.valueTable
    const one = await rowsOfHead(1)
    const own = await measureCoding(one, { codec: parseCodec('cq-4c5b'), tables: table })
    assert.equal(headErrors[1], own.headErrors[0])
    // ... and so is what its rows become.
    const both = await throughCodes(one.data, codingOf(mixed, 2, 'value'), { kvHeads: 2, headDim: 64 })
    let [lost, spread] = [0, 0]
    const mean = (channel: number) => one.data.reduce((sum, value, i) => (i % 128 === channel ? sum + value / one.tokens : sum), 0)
    for (let channel = 64; channel < 128; channel++) {
      const center = mean(channel)
      for (let token = 0; token < one.tokens; token++) {
        const place = token * 128 + channel
        lost += (one.data[place]! - both[place]!) ** 2
        spread += (one.data[place]! - center) ** 2
      }
    }
    near(lost / spread, headErrors[1]!, 1e-9)
  })

  it('codes as a codebook with transforms does', async () => {
    const codecs = Array.from({ length: 4 }, () => [{ firstHead: 0, heads: 2, keyCodec: parseCodec('cq-8c4b'), valueCodec: parseCodec('cq-4c4b') }])
    const transforms = randomTransforms(codecs, 64)
    const transformed = Codebook.fromTables({ keyTables: side(), valueTables: side(), codecs, kvHeads: 2, headDim: 64, transforms })
    const rows = Float32Array.from({ length: 40 * 128 }, random)
    for (const name of ['key', 'value'] as const) {
      const coded = await throughCodes(rows, codingOf(transformed, 1, name), { kvHeads: 2, headDim: 64 })
      const expected = codedByHand(rows, transformed, name)
      coded.forEach((value, i) => { near(value, expected[i]!, 1e-4) })
    }
    const inspection = await inspect({ model: tinyLlama, text, codebook: transformed, length: 128, threads: 1 })
    const tables = (name: 'keyTable' | 'valueTable') => codecs.map((_, layer) => transformed[name](layer))
    const untransformed = Codebook.fromTables({ keyTables: tables('keyTable'), valueTables: tables('valueTable'), codecs, kvHeads: 2, headDim: 64 })
    const plain = await inspect({ model: tinyLlama, text, codebook: untransformed, length: 128, threads: 1 })
    for (const name of ['key', 'value'] as const) {
      assert.notDeepEqual(inspection.layers[1]![name].coding!.headErrors, plain.layers[1]![name].coding!.headErrors)
    }
    assert.notDeepEqual(inspection.attention.layers[1]!.outputErrors, plain.attention.layers[1]!.outputErrors)
  })

  /** Rows [tokens][2][64] of layer 1: in their order or mixed, the centroid that the metric calls nearest, and back; in double. */
  function codedByHand(rows: Float32Array, from: Codebook, name: 'key' | 'value'): Float64Array {
    const [part] = from.parts(1)
    const { groupChannels: size, centroids } = name === 'key' ? part!.keyCodec : part!.valueCodec
    const [tables, metric] = name === 'key' ? [part!.keyTable, part!.keyMetric!] : [part!.valueTable, part!.valueMetric!]
    const through = (row: number[], matrices: Float32Array, head: number) =>
      row.map((_, to) => row.reduce((sum, value, i) => sum + value * matrices[head * 4096 + i * 64 + to]!, 0))
    const out = new Float64Array(rows.length)
    for (let line = 0; line < rows.length / 64; line++) {
      const head = line % 2
      const row = [...rows.subarray(line * 64, (line + 1) * 64)]
      const order = from.transform('key.group', 1)!
      const mixed = name === 'value' ? through(row, from.transform('value.mix', 1)!, head) : row.map((_, place) => row[order[place]!]!)
      const coded = mixed.slice()
      for (let group = 0; group < 64 / size; group++) {
        const place = head * (64 / size) + group
        const centroid = (code: number) => [...tables.subarray((place * centroids + code) * size, (place * centroids + code + 1) * size)]
        const distance = (code: number) => {
          const difference = centroid(code).map((value, i) => mixed[group * size + i]! - value)
          return difference.reduce((sum, _, i) => sum + difference.reduce((dot, value, j) => dot + metric[(place * size + i) * size + j]! * value, 0) ** 2, 0)
        }
        const codes = Array.from({ length: centroids }, (_, code) => distance(code))
        coded.splice(group * size, size, ...centroid(codes.indexOf(Math.min(...codes))))
      }
      if (name === 'value') out.set(through(coded, from.transform('value.unmix', 1)!, head), line * 64)
      else coded.forEach((value, place) => { out[line * 64 + order[place]!] = value })
    }
    return out
  }

  /** Of the values of layer 2. */
  async function rowsOfHead(head: number) {
    using model = await DecoderModel.load(tinyLlama, { threads: 1 })
    using captured = await captureActivations(model, { text, length: 128, heldOut: 0 })
    const { rows } = await captured.sample.side(2, 'value')
    return { data: rows.slice(), offset: head * 64, tokens: captured.sample.tokensKept, tokenStride: 128, kvHeads: 1, headDim: 64 }
  }

  it('refuses what cannot be', async () => {
    const refused = { code: 'ERR_COUPLET_INVALID_ARGUMENT' }
    const stream = Readable.from(['a text'])
    const changes = [{ text: [1] }, { text: '' }, { text: stream }, { length: 1 }, { points: 1 }, { window: -1 }, { sinks: 0.5 }, { onProgress: 1 as never }]
    for (const change of changes) {
      await assert.rejects(inspect({ model: tinyLlama, text, ...change }), refused, Object.keys(change)[0])
    }
    const other = Codebook.fromTables({
      keyTables: side().slice(1), valueTables: side().slice(1), keyCodec: 'cq-8c4b', valueCodec: 'cq-8c4b', kvHeads: 2, headDim: 64,
    })
    await assert.rejects(inspect({ model: tinyLlama, text, codebook: other }), { code: 'ERR_COUPLET_CODEBOOK_MISMATCH' })
    await assert.rejects(inspect({ model: tinyLlama, text, signal: AbortSignal.abort() }), { name: 'AbortError' })
  })
})

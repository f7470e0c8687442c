// Grouped keys (key.group): attention does not know of the order, codes are those of rows in it, files that part rotary pairs are refused,
// and what is learned finds channels that belong together.
import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'
import fc from 'fast-check'

import { Cache, calibrate, captureActivations, chooseCodecs, Codebook, codec, evaluate, learnCodebook, tune } from '../../lib'
import type { DeviceName, LearnOptions, RotaryOption } from '../../lib'
import { DecoderModel } from '../../lib/onnx/model'
import { inverseOrder, pairOrder, pairPlaces } from '../../lib/rotary-pairs'
import { enterSide, leaveSide } from '../../lib/transform/apply'
import { learnTransforms } from '../../lib/transform/learn'
import { eigen, eigenvalues, lowerRoot, product, transposed } from '../../lib/transform/matrix'
import { pairedOrder } from '../../lib/transform/pairs'
import { headerOf, withHeader } from '../codebook/samples'
import { describeOn } from '../device/devices'
import { ids, temporaryFolder, tinyLlama } from '../onnx/files'
import type { DecoderShape } from '../onnx/graphs'
import { decoder, normals } from '../onnx/graphs'
import { ordered, randomOrder } from './samples'

interface Case {
  headDim: number
  rotary: RotaryOption
  tokens: number
  softcap: number | undefined
  localWindow: number | undefined
  seed: number
}

const [kvHeads, queryHeads] = [2, 4]
const four = codec('4c3b')

/** Angles of theta as tables: linear, or not where positions are squared. */
function tablesOf(dim: number, positions: number, isLinear: boolean) {
  const angle = (at: number) => (isLinear ? Math.floor(at / (dim / 2)) : Math.floor(at / (dim / 2)) ** 1.5) * 100 ** (-2 * (at % (dim / 2)) / dim)
  const of = (turn: (angle: number) => number) => Float32Array.from({ length: positions * dim / 2 }, (_, at) => turn(angle(at)))
  return { cos: of(Math.cos), sin: of(Math.sin) }
}

const cases = fc.record({
  headDim: fc.constantFrom(32, 40, 64),
  dimShare: fc.constantFrom(0, 0.25, 0.5, 1),
  kind: fc.constantFrom('half', 'interleaved'),
  angles: fc.constantFrom('theta', 'linear', 'other'),
  tokens: fc.integer({ min: 1, max: 70 }),
  softcap: fc.constantFrom(undefined, 2),
  localWindow: fc.constantFrom(undefined, 5),
  seed: fc.integer({ min: 1, max: 1e6 }),
}).map(({ headDim, dimShare, kind, angles, ...rest }): Case => {
  const dim = headDim * dimShare
  const how = angles === 'theta' ? { theta: 100, positions: 128 } : tablesOf(dim, 128, angles === 'linear')
  return { ...rest, headDim, rotary: dim === 0 ? null : { kind: kind, dim, ...how } }
})

function bookOf(headDim: number, random: () => number, order?: Int32Array): Codebook {
  const table = () => [Float32Array.from({ length: kvHeads * headDim * four.centroids }, random)]
  const tables = { keyTables: table(), valueTables: table(), keyCodec: four, valueCodec: four, kvHeads, headDim }
  return Codebook.fromTables({ ...tables, ...(order && { transforms: { 'key.group': [order] } }) })
}

type Given = Record<'queries' | 'keys' | 'values', Float32Array>

/** Outputs of one sequence, a third of the tokens in a step of their own. */
function attended(cache: Cache, { queries, keys, values }: Given): Float32Array {
  const tokens = values.length / kvHeads / cache.headDim
  const out = new Float32Array(queries.length)
  const sequence = cache.sequence()
  const cut = Math.ceil(tokens / 3)
  for (const [first, end] of [[0, cut], [cut, tokens]] as const) {
    using step = cache.begin([{ sequence, tokens: end - first }], { prefill: 'coded' })
    const part = (data: Float32Array) => data.slice(first * data.length / tokens, end * data.length / tokens)
    const [rows] = step.attendSync(0, [{ queries: part(queries), keys: part(keys), values: part(values) }])
    out.set(rows!, first * queryHeads * cache.headDim)
    step.commit()
  }
  return out
}

/** A rotary embedding whose angles are already in the order. */
function orderedRotary(rotary: RotaryOption, order: Int32Array): RotaryOption {
  if (!rotary) return rotary
  const { kind, dim = 0 } = rotary
  const pairs = pairOrder(order, { kind, dim })!
  const tables = 'cos' in rotary ? rotary : { // as couplet computes them
    cos: Float32Array.from({ length: 128 * dim / 2 }, (_, at) => Math.cos(Math.floor(at / (dim / 2)) * rotary.theta ** (-2 * (at % (dim / 2)) / dim))),
    sin: Float32Array.from({ length: 128 * dim / 2 }, (_, at) => Math.sin(Math.floor(at / (dim / 2)) * rotary.theta ** (-2 * (at % (dim / 2)) / dim))),
  }
  const through = (data: Float32Array) => ordered(data, pairs)
  return { kind, dim, cos: through(tables.cos), sin: through(tables.sin) }
}

describeOn('all', 'grouped keys', (device: DeviceName) => {
  const sum = device === 'cpu' ? 1e-5 : 5e-3 // products of tf32 on a GPU
  const given = ({ headDim, tokens }: Case, random: () => number): Given => {
    const rows = (heads: number) => Float32Array.from({ length: tokens * heads * headDim }, random)
    return { queries: rows(queryHeads), keys: rows(kvHeads), values: rows(kvHeads) }
  }
  const near = (one: Float32Array, other: Float32Array, most: number) => { one.forEach((x, i) => { assert.ok(Math.abs(x - other[i]!) <= most, `${i}: ${x}, ${other[i]}`) }) }
  const runs = device === 'cpu' ? 60 : 12

  it('change nothing in full precision', () => {
    fc.assert(fc.property(cases, (one) => {
      const random = normals(one.seed)
      const { headDim, rotary, softcap, localWindow } = one
      const order = randomOrder(headDim, rotary && { kind: rotary.kind, dim: rotary.dim! }, random)
      using codebook = bookOf(headDim, random, order)
      const layerOptions = { softcap, localWindow }
      using plain = new Cache({ layers: 1, kvHeads, headDim, queryHeads, rotary, layerOptions, device, threads: 1 })
      using grouped = new Cache({ codebook, window: Infinity, queryHeads, rotary, layerOptions, device, threads: 1 })
      const rows = given(one, random)
      near(attended(grouped, rows), attended(plain, rows), sum)
    }), { numRuns: runs })
  })

  it('are coded as rows in their order are', () => {
    fc.assert(fc.property(cases, fc.constantFrom([0, 0], [2, 0], [3, 9]), (one, [sinks, window]) => {
      const random = normals(one.seed)
      const { headDim, rotary, softcap, localWindow } = one
      const order = randomOrder(headDim, rotary && { kind: rotary.kind, dim: rotary.dim! }, random)
      const seed = normals(one.seed + 1)
      using codebook = bookOf(headDim, seed, order)
      using plainBook = bookOf(headDim, normals(one.seed + 1))
      const options = { sinks: sinks, window: window, queryHeads, layerOptions: { softcap, localWindow }, device, threads: 1 }
      using plain = new Cache({ codebook: plainBook, rotary: orderedRotary(rotary, order), ...options })
      using grouped = new Cache({ codebook, rotary, ...options })
      const rows = given(one, random)
      const byHand = { ...rows, queries: ordered(rows.queries, order), keys: ordered(rows.keys, order) }
      // A code that differed would differ by the distance of centroids; angles of a table are rounded once more than those of theta.
      near(attended(grouped, rows), attended(plain, byHand), rotary && 'theta' in rotary ? 1e-4 : 0)
    }), { numRuns: runs })
  })

  it('are copied to another cache of the same codebook', async () => {
    const random = normals(8)
    const order = randomOrder(32, { kind: 'half', dim: 16 }, random)
    using codebook = bookOf(32, random, order)
    const options = { codebook, sinks: 1, window: 4, queryHeads, rotary: { kind: 'half', dim: 16, theta: 100 } as const, threads: 1 }
    using cache = new Cache({ ...options, device })
    using other = new Cache({ ...options, device: 'cpu' })
    using unlike = new Cache({ ...options, codebook: bookOf(32, normals(8), inverseOrder(order)), device })
    const sequence = cache.sequence()
    const rows = (heads: number, tokens: number) => Float32Array.from({ length: tokens * heads * 32 }, random)
    using step = cache.begin([{ sequence, tokens: 20 }])
    step.appendSync(0, [{ keys: rows(kvHeads, 20), values: rows(kvHeads, 20) }])
    step.commit()
    const copy = await sequence.copyTo(other)
    const next = { queries: rows(queryHeads, 1), keys: rows(kvHeads, 1), values: rows(kvHeads, 1) }
    const [one, two] = [[cache, sequence], [other, copy]].map(([where, which]) => {
      using last = (where as Cache).begin([{ sequence: which as typeof sequence, tokens: 1 }])
      return last.attendSync(0, [next])[0]!
    })
    near(one!, two!, sum)
    await assert.rejects(sequence.copyTo(unlike), { code: 'ERR_COUPLET_CODEBOOK_MISMATCH' })
  })
})

describe('orders of keys in a codebook', () => {
  const rotary = { kind: 'half', dim: 16 } as const
  const random = normals(4)
  const orders = [randomOrder(32, rotary, random), randomOrder(32, rotary, random)]
  const table = () => Float32Array.from({ length: kvHeads * 32 * four.centroids }, random)
  const tables = { keyTables: [table(), table()], valueTables: [table(), table()], keyCodec: four, valueCodec: four, kvHeads, headDim: 32 }
  const codebook = Codebook.fromTables({ ...tables, transforms: { 'key.group': orders }, metadata: { rotary } })
  const sound = codebook.toBuffer()

  it('come back from a file', () => {
    const read = Codebook.fromBuffer(sound)
    assert.deepEqual(read.transforms, ['key.group'])
    assert.equal(read.metadata.formatVersion, 4)
    assert.deepEqual([0, 1].map((layer) => read.transform('key.group', layer)), orders)
    assert.deepEqual(read.toBuffer(), sound)
  })

  const text = (order: Int32Array) => JSON.stringify([...order])
  const swapped = (order: Int32Array, one: number, other: number) => {
    const changed = order.slice();
    [changed[one], changed[other]] = [changed[other]!, changed[one]!]
    return changed
  }

  it('are refused in files where they are none', () => {
    const refused = (to: string, reason: RegExp, from = text(orders[1]!)) => {
      const bytes = withHeader(sound, (header) => {
        assert.ok(header.includes(from), headerOf(sound))
        return header.replace(from, to)
      })
      assert.throws(() => Codebook.fromBuffer(bytes), { code: 'ERR_COUPLET_CODEBOOK_INVALID', message: reason })
    }
    const order = orders[1]!
    refused(text(order.subarray(1)), /every channel below 32 once for `keyOrders\[1\]`/)
    refused(text(order).replace(/\d+\]$/, `${order[0]!}]`), /every channel below 32 once/)
    refused(text(order).replace(/\d+\]$/, '32]'), /every channel below 32 once/)
    refused(text(order).replace(/\d+\]$/, '-1]'), /every channel below 32 once/)
    refused(text(order).replace(/\d+\]$/, '1.5]'), /every channel below 32 once/)
    refused(text(order).replace(/\d+\]$/, '\\"3\\"]'), /every channel below 32 once/)
    refused('7', /an array for `keyOrders\[1\]`/)
    refused('', /those of 2 layers/, `,${text(order)}`)
    refused('\\"keyOrder\\":', /an array for `keyOrders`/, '\\"keyOrders\\":')
    refused(text(swapped(order, 0, 1)), /rotary pairs \(half, 16 channels\) that stay pairs for `keyOrders\[1\]`/)
    refused(text(swapped(order, 3, 20)), /stay pairs/)
    refused(text(swapped(order, 2, 10)), /stay pairs/) // a pair turned round
    assert.doesNotThrow(() => Codebook.fromTables({ ...tables, transforms: { 'key.group': [order, swapped(order, 20, 21)] }, metadata: { rotary } }))
  })

  it('are refused from a program', () => {
    const attempt = (given: unknown, metadata = {}) => () => Codebook.fromTables({ ...tables, transforms: { 'key.group': given as Int32Array[] }, metadata })
    assert.throws(attempt(orders.slice(1)), { code: 'ERR_COUPLET_INVALID_ARGUMENT', message: /arrays of 2 layers/ })
    assert.throws(attempt(orders.map((order) => [...order])), /Expected Int32Arrays/)
    assert.throws(attempt(orders.map((order) => order.slice(1))), /every channel below 32 once/)
    assert.throws(attempt(orders.map((order) => order.map(() => 1))), /every channel below 32 once/)
    assert.throws(attempt(orders.map((order) => swapped(order, 0, 1)), { rotary }), { code: 'ERR_COUPLET_INVALID_ARGUMENT', message: /stay pairs/ })
  })

  it('are refused where a cache rotates other pairs', () => {
    const unknown = Codebook.fromTables({ ...tables, transforms: { 'key.group': orders } })
    const open = (kind: 'half' | 'interleaved', dim: number) => () => new Cache({ codebook: unknown, queryHeads, rotary: { kind, dim, theta: 100 } })
    assert.doesNotThrow(open('half', 16))
    for (const [kind, dim] of [['half', 32], ['interleaved', 16]] as const)
      assert.throws(open(kind, dim), { code: 'ERR_COUPLET_CODEBOOK_MISMATCH', message: /one rotary pair are parted/ })
    assert.doesNotThrow(() => new Cache({ codebook: unknown, queryHeads }))
  })
})

describe('groups of pairs', () => {
  const headDim = 32
  const random = normals(12)
  const eight = codec('4c4b')

  /** Channels in sets of four that vary together, strewn over the head: the covariance of a head. */
  function planted(places: Int32Array) {
    const covariance = new Float64Array(headDim ** 2)
    for (let i = 0; i < headDim; i++) {
      for (let j = 0; j < headDim; j++) {
        if (Math.floor(i / 4) === Math.floor(j / 4)) covariance[places[i]! * headDim + places[j]!] = i === j ? 1 : 0.95
      }
    }
    return covariance
  }
  const none = Float64Array.from({ length: headDim ** 2 }, (_, at) => (at % (headDim + 1) === 0 ? 1 : 0))
  const groupsOf = (order: Int32Array) => Array.from({ length: headDim / 4 }, (_, group) =>
    [...order.subarray(group * 4, group * 4 + 4)].sort((a, b) => a - b).join()).sort()

  for (const rotary of [{ kind: 'half', dim: 32 }, { kind: 'half', dim: 16 }, { kind: 'interleaved', dim: 32 }, null] as const) {
    it(`are those that vary together: ${rotary ? `${rotary.kind}, ${rotary.dim} of 32 rotated` : 'nothing rotated'}`, async () => {
      const places = randomOrder(headDim, rotary, random)
      const heads = [1, 2].map(() => ({ covariance: planted(places), importance: none, codec: eight }))
      const order = await pairedOrder(heads, headDim, rotary)
      assert.deepEqual(groupsOf(order), groupsOf(places))
      if (rotary) assert.ok(pairOrder(order, rotary))
      assert.deepEqual(await pairedOrder(heads, headDim, rotary), order)
    })
  }

  it('stay as they are where none is better, and mind heads that matter', async () => {
    const rotary = { kind: 'half', dim: 32 } as const
    const [one, other] = [randomOrder(headDim, rotary, random), randomOrder(headDim, rotary, random)]
    const alone = [{ covariance: planted(one), importance: none, codec: codec('1c1b') }]
    assert.deepEqual([...await pairedOrder(alone, headDim, rotary)], [...none.keys()].slice(0, headDim))
    const heads = [one, other].map((places, head) => ({ covariance: planted(places), importance: none.map((w) => w * (head === 0 ? 1 : 1e-4)), codec: eight }))
    assert.deepEqual(groupsOf(await pairedOrder(heads, headDim, rotary)), groupsOf(one))
    const empty = [{ covariance: new Float64Array(headDim ** 2), importance: new Float64Array(headDim ** 2), codec: eight }]
    assert.deepEqual([...await pairedOrder(empty, headDim, rotary)], [...none.keys()].slice(0, headDim))
  })

  it('are learned in heads of several codecs, and metrics in their order', async () => {
    const tokens = 300
    const rotary = { kind: 'half', dim: 32 } as const
    const rows = (): Float32Array => Float32Array.from({ length: tokens * 2 * headDim }, random)
    const [data, gradients] = [rows(), rows()]
    const parts = [{ firstHead: 0, heads: 1, codec: codec('4c4b') }, { firstHead: 1, heads: 1, codec: codec('8c4b') }]
    const source = { rows: data, gradients, tokens, kvHeads: 2, headDim, parts, rotary }
    const { order, metric } = await learnTransforms(source, 'key', ['key.group', 'key.metric'])
    assert.equal(metric!.length, headDim * 4 + headDim * 8)
    assert.ok(pairOrder(order!, rotary))
    const shape = { tokens, kvHeads: 2, headDim }
    const entered = await enterSide({ rows: data, weights: gradients }, { order: order! }, shape)
    assert.deepEqual(entered, { rows: ordered(data, order!), weights: ordered(gradients, order!) })
    assert.deepEqual(await leaveSide(entered.rows, { order: order! }, shape), data)
    const again = await learnTransforms({ ...source, rows: entered.rows, gradients: entered.weights }, 'key', ['key.metric'])
    again.metric!.forEach((value, i) => { assert.ok(Math.abs(value - metric![i]!) < 1e-5) })
    assert.deepEqual(await learnTransforms(source, 'value', ['key.group']), {})
    assert.deepEqual(Object.keys(await learnTransforms({ ...source, gradients: undefined }, 'key', ['key.group', 'key.metric'])), ['order'])
  })

  it('know pairs from places', () => {
    assert.deepEqual(pairPlaces({ kind: 'half', dim: 8 }, 3), [3, 7])
    assert.deepEqual(pairPlaces({ kind: 'interleaved', dim: 8 }, 3), [6, 7])
    assert.deepEqual(pairOrder([2, 3, 0, 1, 4], { kind: 'interleaved', dim: 4 }), Int32Array.of(1, 0))
    assert.equal(pairOrder([4, 1, 2, 3, 0], { kind: 'interleaved', dim: 4 }), undefined)
  })

  it('are judged by the eigenvalues of small matrices', () => {
    for (const size of [1, 2, 3, 8, 16, 32]) {
      for (const rank of [size, Math.ceil(size / 2), 0]) {
        const factor = Float64Array.from({ length: size * size }, (_, at) => (at % size < rank ? random() : 0))
        const matrix = product(factor, transposed(factor, size), size)
        const sorted = (values: Float64Array) => [...values].sort((a, b) => a - b)
        const [expected, got] = [sorted(eigen(matrix, size).values), sorted(eigenvalues(matrix, size))]
        expected.forEach((value, i) => { assert.ok(Math.abs(value - got[i]!) < 1e-9 * (1 + expected.at(-1)!), `${size}, ${rank}: ${value}, ${got[i]}`) })
        const root = lowerRoot(matrix, size)
        if (rank < size) continue
        product(root, transposed(root, size), size).forEach((value, at) => { assert.ok(Math.abs(value - matrix[at]!) < 1e-9 * (1 + expected.at(-1)!)) })
      }
    }
  })
})

describe('grouped keys of a model', function () {
  this.timeout(120_000)
  const folder = temporaryFolder()
  const bytes = [...readFileSync(join(__dirname, '../../docs/api.md'))]
  const learnOptions: LearnOptions = { codec: 'cq-8c5b', iterations: 8, threads: 2 }

  it('are learned, saved and evaluated, and lose less', async () => {
    using model = await DecoderModel.load(tinyLlama, { threads: 2 })
    using captured = await captureActivations(model, { text: bytes.slice(0, 6144), length: 256, heldOut: 0, weights: 'fisher', threads: 2 })
    const lossWith = async (transforms: LearnOptions['transforms']) => {
      using codebook = await learnCodebook(captured, { ...learnOptions, transforms: transforms! })
      const path = join(folder.path, 'codebook.safetensors')
      await codebook.save(path)
      const evaluated = await evaluate({ model: tinyLlama, text: bytes.slice(6144, 8192), codebook: path, length: 256, window: 0, sinks: 0, threads: 2 })
      return Math.log(evaluated.perplexity)
    }
    const [grouped, plain] = [await lossWith(['key.group', 'key.metric']), await lossWith(['key.metric'])]
    assert.ok(grouped < plain + 0.01, `${grouped}, and ${plain} without groups`)
  })

  const shapes: DecoderShape[] = [
    {}, { packed: true, interleaved: true }, { rotary: 'nodes', rotaryDim: 16 }, { rotary: 'none' }, { softcap: 3, localWindow: 6, linearScaling: 4 },
  ]
  for (const shape of shapes) {
    it(`are those of its rotary embedding: ${JSON.stringify(shape)}`, async () => {
      const path = folder.save(decoder(shape))
      using plain = await DecoderModel.load(path, { threads: 1 })
      const { layers, headDim, rotary } = plain.shape
      const random = normals(7)
      const table = () => Array.from({ length: layers }, () => Float32Array.from({ length: kvHeads * headDim * four.centroids }, random))
      const orders = Array.from({ length: layers }, () => randomOrder(headDim, rotary, random))
      const tables = { keyTables: table(), valueTables: table(), keyCodec: four, valueCodec: four, kvHeads, headDim }
      using codebook = Codebook.fromTables({ ...tables, transforms: { 'key.group': orders }, metadata: { rotary } })
      using grouped = await DecoderModel.load(path, { codebook, window: 64, threads: 1 })
      const tokens = ids(40)
      const [expected, got] = await Promise.all([plain, grouped].map(async (model) => (await model.run([{ sequence: model.sequence(), tokens }])).logits))
      got!.forEach((logit, i) => { assert.ok(Math.abs(logit - expected![i]!) < 1e-4, `${i}: ${logit}, ${expected![i]}`) })
    })
  }

  it('are tuned, and chosen for', async () => {
    const options = { model: tinyLlama, text: bytes.slice(0, 1536), length: 128, iterations: 3, weights: 'fisher', threads: 2 } as const
    const { codebook } = await calibrate({ ...options, codec: 'cq-8c3b', heldOut: 0, transforms: ['key.group', 'key.metric'] })
    const tuning = { text: bytes.slice(0, 64 * 12), length: 64, batch: 4, steps: 2, checkEvery: 1, heldOut: 4, window: 0, sinks: 0, rate: 0.02 }
    const tuned = await tune({ model: tinyLlama, codebook, ...tuning, threads: 2 })
    assert.ok(tuned.after < tuned.before)
    for (const layer of [0, 1, 2, 3]) assert.deepEqual(tuned.codebook.transform('key.group', layer), codebook.transform('key.group', layer))

    using model = await DecoderModel.load(tinyLlama, { threads: 2 })
    using captured = await captureActivations(model, { ...options, heldOut: 0.2 })
    const transforms = ['key.group'] as const
    const { codecs, chosen } = await chooseCodecs(captured, { bits: 0.75, candidates: ['8c4b', '16c4b', '4c4b'], iterations: 2, transforms, threads: 2 })
    using mixed = await learnCodebook(captured, { codec: codecs, chosen, transforms, iterations: 3, threads: 2 })
    const { perplexity } = await evaluate({ model: tinyLlama, text: bytes.slice(0, 512), codebook: mixed, length: 128, threads: 2 })
    assert.ok(Number.isFinite(perplexity))
  })
})

// What is learned: channels that no longer correlate, groups of equal weight, metrics of gradients; and the recipe that tries them.
import assert from 'node:assert/strict'
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import { Codebook, evaluate } from '../../lib'
import { calibrate, captureActivations, learnCodebook } from '../../lib/calibrate'
import { codec } from '../../lib/codec'
import { DecoderModel } from '../../lib/onnx/model'
import { enterSide, leaveSide } from '../../lib/transform/apply'
import { balancedOrder, codedVariance } from '../../lib/transform/grouping'
import { learnTransforms } from '../../lib/transform/learn'
import { eigen, invert, product, secondMoment, squareRoot, transposed } from '../../lib/transform/matrix'
import { normals } from '../onnx/graphs'

const model = join(__dirname, '..', '..', 'models', 'tiny-llama-bytes')

describe('matrices of transforms', () => {
  const random = normals(2)
  const size = 9
  const factor = Float64Array.from({ length: size * size }, random)
  const positive = product(factor, transposed(factor, size), size)
  const isNear = (a: Float64Array, b: Float64Array) => { a.forEach((x, i) => { assert.ok(Math.abs(x - b[i]!) < 1e-9, `${i}: ${x}, ${b[i]}`) }) }

  it('come apart into eigenvectors and together again', () => {
    const { values, vectors } = eigen(positive, size)
    const scaled = vectors.map((entry, at) => entry * values[Math.floor(at / size)]!)
    isNear(product(transposed(vectors, size), scaled, size), positive)
  })

  it('have roots and inverses', () => {
    const { root, inverse } = squareRoot(positive, size, 1e-12)
    isNear(product(root, root, size), positive)
    isNear(product(inverse, root, size), Float64Array.from({ length: size * size }, (_, at) => (at % (size + 1) === 0 ? 1 : 0)))
    isNear(product(invert(factor, size), factor, size), product(inverse, root, size))
  })
})

describe('groups of equal weight', () => {
  it('have what reverse water-filling says', () => {
    assert.ok(Math.abs(codedVariance([4, 4], 2) - 2) < 1e-12) // a bit each: a quarter of each variance
    assert.ok(Math.abs(codedVariance([16, 1e-3], 2) - (1 + 1e-3)) < 1e-12) // the small one is not worth a bit
    assert.equal(codedVariance([3], 0), 3)
  })

  it('are better than neighbours, and every channel is in one', () => {
    const variances = Float64Array.from({ length: 64 }, (_, channel) => 2 ** (-channel / 3))
    const order = balancedOrder(variances, { groupChannels: 8, codeBits: 8 })
    assert.deepEqual([...order].sort((a, b) => a - b), Array.from({ length: 64 }, (_, channel) => channel))
    const cost = (channels: readonly number[]) => Array.from({ length: 8 }, (_, group) =>
      codedVariance(channels.slice(group * 8, group * 8 + 8).map((channel) => variances[channel]!), 8)).reduce((a, b) => a + b)
    assert.ok(cost(order) < 0.2 * cost(Array.from({ length: 64 }, (_, channel) => channel)))
    assert.equal(balancedOrder(new Float64Array(16), { groupChannels: 4, codeBits: 2 }).length, 16)
  })
})

describe('learned transforms', () => {
  const [tokens, kvHeads, headDim] = [500, 2, 16]
  const random = normals(9)
  const blend = Float64Array.from({ length: headDim * headDim }, random)
  const blended = (spread: number) => Float32Array.from(
    Array.from({ length: tokens * kvHeads }, () => {
      const own = Float64Array.from({ length: headDim }, (_, c) => random() * spread ** c)
      return Array.from({ length: headDim }, (_, c) => own.reduce((sum, value, k) => sum + value * blend[c * headDim + k]!, 0))
    }).flat())
  const [rows, gradients] = [blended(0.8), blended(0.9)]
  const source = { rows, gradients, tokens, kvHeads, headDim, rotary: null, parts: [{ firstHead: 0, heads: kvHeads, codec: codec('4c4b') }] }
  const shape = { tokens, kvHeads, headDim }
  const correlation = (data: Float32Array): number => {
    const moment = secondMoment({ data, first: headDim, stride: kvHeads * headDim, count: tokens, channels: headDim }, true)
    let most = 0
    for (let i = 0; i < headDim; i++) {
      for (let j = 0; j < i; j++) {
        most = Math.max(most, Math.abs(moment[i * headDim + j]!) / Math.sqrt(moment[i * headDim + i]! * moment[j * headDim + j]!))
      }
    }
    return most
  }

  it('leave values that do not correlate, and give them back', async () => {
    for (const known of [gradients, undefined]) {
      const { mix, unmix, metric } = await learnTransforms({ ...source, gradients: known }, 'value', ['value.mix', 'value.metric'])
      assert.equal(metric, undefined)
      const mixed = await enterSide({ rows, weights: known }, { mix: mix!, unmix: unmix! }, shape)
      const back = await leaveSide(mixed.rows, { mix: mix!, unmix: unmix! }, shape)
      assert.ok(correlation(rows) > 0.3 && correlation(mixed.rows) < 1e-3)
      assert.ok(back.every((x, i) => Math.abs(x - rows[i]!) < 1e-3))
      if (!known) continue
      // A step along a mixed row costs what the same step along the row costs.
      for (let row = 0; row < 20; row++) {
        const dot = (a: Float32Array, b: Float32Array) =>
          a.subarray(row * headDim, (row + 1) * headDim).reduce((sum, x, i) => sum + x * b[row * headDim + i]!, 0)
        const [one, other] = [dot(rows, gradients), dot(mixed.rows, mixed.weights!)]
        assert.ok(Math.abs(one - other) < 1e-3 * (1 + Math.abs(one)), `${one}, ${other}`)
      }
    }
  })

  it('are none for what was not asked, or cannot be had', async () => {
    assert.deepEqual(await learnTransforms(source, 'key', ['value.mix', 'value.metric']), {})
    assert.deepEqual(await learnTransforms({ ...source, gradients: undefined }, 'key', ['key.metric']), {})
    const { metric } = await learnTransforms({ ...source, gradients: new Float32Array(gradients.length) }, 'key', ['key.metric'])
    assert.deepEqual([...metric!.subarray(0, 16)], [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1])
  })
})

describe('the recipe best', function () {
  this.timeout(120_000)
  const text = Array.from({ length: 1536 }, (_, i) => 97 + ((i * i + (i >> 3)) % 23))
  const options = { model, text, length: 128, codec: 'cq-8c3b', heldOut: 0.2, iterations: 3, threads: 1 } as const

  it('tries weights and transforms, and keeps what predicts best', async () => {
    const { codebook, tried, report, tuned } = await calibrate({ ...options, recipe: 'best', tune: false })
    assert.equal(tuned, undefined)
    assert.deepEqual(tried!.map(({ weights, transforms }) => [weights, ...transforms].join(' ')),
      ['fisher', 'fisher key.metric value.metric', 'fisher value.mix', 'fisher key.metric value.mix', 'fisher key.group key.metric value.mix',
        'attention', 'attention value.mix', 'attention key.group value.mix'])
    const least = tried!.reduce((a, b) => (b.codedLoss < a.codedLoss ? b : a))
    assert.equal(codebook.metadata.learned!.weights, least.weights)
    assert.deepEqual(codebook.transforms.filter((name) => name !== 'value.unmix'), least.transforms)
    assert.ok(Math.abs(report.expected!.coded.loss - least.loss) < 1e-6)
    const read = Codebook.fromBuffer(codebook.toBuffer())
    const { perplexity } = await evaluate({ model, text: text.slice(0, 256), codebook: read, length: 128, threads: 1 })
    assert.ok(Number.isFinite(perplexity))
  })

  it('is a choice among what can be asked for by name', async () => {
    using decoder = await DecoderModel.load(model, { threads: 1 })
    using captured = await captureActivations(decoder, { ...options, weights: 'attention' })
    using codebook = await learnCodebook(captured, { codec: 'cq-8c3b', iterations: 3, threads: 1, transforms: ['value.mix'] })
    assert.deepEqual(codebook.transforms, ['value.mix', 'value.unmix'])
    await assert.rejects(learnCodebook(captured, { codec: 'cq-8c3b', transforms: ['key.metric'] }), /fisher weights for the transform "key.metric"/)
    await assert.rejects(learnCodebook(captured, { codec: 'cq-8c3b', transforms: ['key.twist' as 'key.metric'] }),
      /"value.mix", "value.hadamard" for `transforms`/)
    await assert.rejects(learnCodebook(captured, { codec: 'cq-8c3b', transforms: ['value.mix', 'value.hadamard'] }),
      /one of "value.mix" and "value.hadamard" for `transforms` but received "value.mix,value.hadamard"/)
    using hadamards = await learnCodebook(captured, { codec: 'cq-8c3b', iterations: 3, threads: 1, transforms: ['key.smooth', 'value.hadamard'] })
    assert.deepEqual(Codebook.fromBuffer(hadamards.toBuffer()).transforms, ['key.metric', 'value.mix', 'value.unmix'])
    await assert.rejects(calibrate({ ...options, recipe: 'better' as 'best' }), /"plain" or "best" for `recipe`/)
    await assert.rejects(calibrate({ ...options, heldOut: 0, recipe: 'best' }), /chunks to hold out/)
    await assert.rejects(calibrate({ ...options, tune: { steps: 2 } }), /recipe "best" beside `tune` but received "plain"/)
    await assert.rejects(calibrate({ ...options, recipe: 'best', tune: 3 as unknown as false }), /for `tune` but received 3/)
  })

  it('ends with tuning, which a checkpoint keeps too', async () => {
    const folder = mkdtempSync(join(tmpdir(), 'couplet-recipe-'))
    const steps: number[] = []
    const once = async () => calibrate({
      ...options, recipe: 'best', transforms: [], tune: { steps: 6, checkEvery: 2 }, checkpoint: join(folder, 'state'),
      onProgress: ({ phase, done }) => { if (phase === 'tune') steps.push(done) },
    })
    const { codebook, report, tried, tuned } = await once()
    assert.ok(tuned!.bestStep > 0 && tuned!.after < tuned!.before, JSON.stringify(tuned))
    assert.deepEqual(steps.slice(0, 6), [1, 2, 3, 4, 5, 6])
    const { window, sinks } = codebook.metadata.learned!.tuned!
    assert.deepEqual([window, sinks], [0, 0])
    // The report is of the tuned tables and not of those that were tried.
    const chunks = Array.from({ length: 12 }, (_, i) => text.slice(128 * i, 128 * (i + 1))).filter((_, i) => i % 5 === 2)
    const { perplexity } = await evaluate({ model, text: chunks.flat(), codebook, length: 128, threads: 1 })
    assert.ok(Math.abs(report.expected!.coded.perplexity / perplexity - 1) < 1e-6)
    assert.ok(tried!.every((one) => Math.abs(one.perplexity / perplexity - 1) > 1e-6))
    const shown = steps.length
    const again = await once()
    assert.equal(steps.length, shown)
    assert.deepEqual(again.codebook.toBuffer(), codebook.toBuffer())
    rmSync(folder, { recursive: true })
  })

  it('judges some 14 times, however many steps are asked for', async () => {
    const folder = mkdtempSync(join(tmpdir(), 'couplet-recipe-'))
    const checkpoint = join(folder, 'state')
    // Each of some 38 chunks 4 times would be 38 steps, and a judgement after every third.
    const { tuned } = await calibrate({ ...options, length: 32, recipe: 'best', transforms: [], tune: { steps: 2 }, checkpoint })
    assert.equal(tuned!.steps, 2)
    const states = readdirSync(folder).filter((name) => name.endsWith('.tune')).map((name) => readFileSync(join(folder, name), 'latin1'))
    assert.ok(states.length > 0 && states.every((state) => state.includes('\\"checkEvery\\":1,')))
    rmSync(folder, { recursive: true })
  })

  it('does without tuning where the text has no chunk to tune on, unless it was asked for', async () => {
    const short = { ...options, text: text.slice(0, 300), length: 512, heldOut: 0.5 } as const
    const twoTexts = { ...short, text: [text.slice(0, 300), text.slice(300, 600)], recipe: 'best', transforms: [] } as const
    assert.equal((await calibrate(twoTexts)).tuned, undefined)
    await assert.rejects(calibrate({ ...twoTexts, tune: {} }), /chunks of 512 tokens to learn from and to hold out for `tune`/)
  })
})

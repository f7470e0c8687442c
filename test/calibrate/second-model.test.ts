// All that calibration touches, on a graph of another family than the model in models/.
import assert from 'node:assert/strict'

import { calibrate, type CalibrateOptions, captureActivations, learnCodebook } from '../../lib/calibrate'
import { meanBits } from '../../lib/codec'
import { crossEntropy, evaluate } from '../../lib/evaluate'
import { GradientModel } from '../../lib/gradient/model'
import { inspect } from '../../lib/inspect/inspect'
import { DecoderModel } from '../../lib/onnx/model'
import { pairOrder } from '../../lib/rotary-pairs'
import { tune } from '../../lib/tune'
import { temporaryFolder } from '../onnx/files'
import { gemma, gemmaShape, gemmaText } from '../onnx/gemma'

describe('a second model: norms of keys, partial rotation, 4-bit matrices, softcaps, windows', function () {
  this.timeout(120_000)
  const folder = temporaryFolder()
  const { layers, kvHeads, headDim, vocabulary } = gemmaShape
  const text = gemmaText(24 * 96)
  const other = gemmaText(4 * 96, 2)
  let options: CalibrateOptions
  before(() => {
    options = { model: folder.save(gemma()), text, length: 96, codec: 'cq-8c6b', weights: 'attention', iterations: 10, threads: 1 }
  })

  it('is calibrated by all weights, and judged', async () => {
    for (const weights of ['uniform', 'attention', 'fisher'] as const) {
      const { codebook, report } = await calibrate({ ...options, weights, evalText: other })
      assert.deepEqual([codebook.layers, codebook.kvHeads, codebook.headDim], [layers, kvHeads, headDim])
      assert.deepEqual(codebook.metadata.rotary, { kind: 'interleaved', dim: 32, theta: 10000 })
      assert.deepEqual(report.warnings.map(({ code }) => code), ['FEW_POINTS'])
      assert.ok(report.layers.every(({ key, value }) => [key, value].every(({ learned, heldOut }) => learned > 0 && heldOut! < 1)))
      assert.ok(Math.abs(report.evaluation!.distance! - 1) < 0.1, `${weights}: ${report.evaluation!.distance}`)
      assert.ok(Number.isFinite(report.expected!.coded.loss))
      codebook.dispose()
    }
  })

  it('loses less with more bits, and nothing where nothing is coded', async () => {
    using model = await DecoderModel.load(options.model, { threads: 1 })
    using captured = await captureActivations(model, { text, length: 96, weights: 'attention', heldOut: 0 })
    const settings = { model: options.model, text: other, length: 96, threads: 1 }
    const full = await evaluate(settings)
    const losses = []
    for (const codec of ['cq-8c2b', 'cq-4c4b', 'cq-2c8b']) {
      using codebook = await learnCodebook(captured, { codec, iterations: 10, threads: 1 })
      assert.ok(Math.abs((await evaluate({ ...settings, codebook, window: 96 })).perplexity / full.perplexity - 1) < 1e-5)
      losses.push(Math.abs((await evaluate({ ...settings, codebook, window: 0, sinks: 0 })).perplexity - full.perplexity))
    }
    assert.ok(losses[0]! > losses[1]! && losses[1]! > losses[2]!, losses.join(' '))
  })

  it('goes through all transforms, tuned or not, and loses nothing where nothing is coded', async () => {
    const settings = { model: options.model, text: other, length: 96, threads: 1 }
    const full = await evaluate(settings)
    const lossWith = async (transforms: CalibrateOptions['transforms']) => {
      const { codebook } = await calibrate({ ...options, weights: 'fisher', heldOut: 0, transforms: transforms! })
      assert.ok(Math.abs((await evaluate({ ...settings, codebook, window: 96 })).perplexity / full.perplexity - 1) < 1e-4)
      const order = codebook.transform('key.group', 0)
      assert.ok(!order || pairOrder(order, codebook.metadata.rotary!))
      const tuning = { length: 48, batch: 4, steps: 2, checkEvery: 1, heldOut: 4, window: 0, sinks: 0, threads: 1 }
      const tuned = await tune({ model: options.model, codebook, text, ...tuning })
      assert.ok(tuned.after <= tuned.before)
      return tuned.before
    }
    const [plain, all] = [await lossWith([]), await lossWith(['key.group', 'key.metric', 'value.mix'])]
    assert.ok(all < plain, `${all}, and ${plain} without`)
  })

  it("has one gradient: the loss of the gradient graph is the model's, and its rows are those that are captured", async () => {
    using model = await DecoderModel.load(options.model, { threads: 1 })
    using backward = await GradientModel.load(options.model, { threads: 1 })
    const tokens = text.slice(0, 96)
    const { rows, gradients, loss } = await backward.run(tokens)
    using sequence = model.sequence()
    const { logits } = await model.run([{ sequence, tokens }])
    const plain = tokens.slice(1).reduce((sum, token, t) => sum + crossEntropy(logits.subarray(t * vocabulary, (t + 1) * vocabulary), token), 0)
    assert.ok(Math.abs(loss / plain - 1) < 1e-4, `${loss} ${plain}`)
    using captured = await captureActivations(model, { text: tokens, length: 96, heldOut: 0 })
    for (let layer = 0; layer < layers; layer++) {
      for (const side of ['key', 'value'] as const) {
        const own = (await captured.sample.side(layer, side)).rows
        assert.ok(own.every((x, i) => Math.abs(x - rows[side][layer]![i]!) < 1e-3), `layer ${layer}, ${side}`)
        assert.ok(gradients[side][layer]!.some((gradient) => gradient !== 0))
      }
    }
  })

  it('diverges less when the same bits go where they matter, and is tuned then as well', async () => {
    const { codec, ...rest } = options
    const choose = { candidates: ['cq-2c6b', 'cq-4c6b', 'cq-8c6b', 'cq-16c6b'], sinks: 0, window: 0, iterations: 10 }
    const [uniform, mixed] = [await calibrate({ ...rest, codec }), await calibrate({ ...rest, bits: 0.75, choose })].map(({ codebook }) => codebook)
    assert.ok(meanBits(mixed!.codecs) <= meanBits(uniform!.codecs))
    const learning = { text: gemmaText(48 * 64, 3), length: 64, batch: 4, checkEvery: 4, rate: 0.05 }
    const tuning = { model: options.model, ...learning, window: 0, sinks: 0, threads: 1 }
    const { before: withOne } = await tune({ ...tuning, steps: 1, codebook: uniform! })
    const tuned = await tune({ ...tuning, steps: 12, codebook: mixed! })
    assert.ok(tuned.before < 0.95 * withOne, `${tuned.before}, ${withOne} with one codec for all`)
    assert.ok(tuned.after < tuned.before, `${tuned.before} -> ${tuned.after}`)
    assert.deepEqual(tuned.codebook.codecs, mixed!.codecs)
  })

  it('is tuned, and inspected', async () => {
    const { codebook } = await calibrate({ ...options, codec: 'cq-8c3b' })
    const tuned = await tune({
      model: options.model, codebook, text: gemmaText(48 * 64, 3), length: 64, batch: 4, steps: 10, checkEvery: 5, window: 0, sinks: 0, rate: 0.05, threads: 1,
    })
    assert.ok(tuned.after < 0.97 * tuned.before, `${tuned.before} -> ${tuned.after}`)
    const { layers: inspected } = await inspect({ model: options.model, text, length: 96, codebook: tuned.codebook, threads: 1 })
    assert.equal(inspected.length, layers)
  })
})

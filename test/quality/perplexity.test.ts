import assert from 'node:assert/strict'
import { existsSync, readFileSync } from 'node:fs'
import path from 'node:path'
import { type Captured, captureActivations, learnCodebook, type WeightKind } from '../../lib/calibrate'
import { evaluate } from '../../lib/evaluate'
import { DecoderModel } from '../../lib/onnx/model'

// The texts and the figures of an independent reference are not part of the project: they lie beside a checkout of it.
const shared = path.join(__dirname, '..', '..', '..', 'shared', 'models', 'tiny-llama-bytes')
const directory = path.join(__dirname, '..', '..', 'models', 'tiny-llama-bytes')

interface Expected { figures: Record<string, { perplexity: number; perplexity_window32_sinks4?: number }> }

describe('perplexity agrees with an independent reference', function () {
  this.timeout(600_000)
  if (!existsSync(shared)) {
    it(`needs ${shared} (texts and expected.json)`, function () { this.skip() })
    return
  }
  const { figures } = JSON.parse(readFileSync(path.join(shared, 'expected.json'), 'utf8')) as Expected
  const calibration = readFileSync(path.join(shared, 'calibration.txt'), 'utf8')
  const text = readFileSync(path.join(shared, 'evaluation.txt'), 'utf8')
  const captures = new Map<WeightKind, Captured>()
  let model: DecoderModel

  before(async () => { model = await DecoderModel.load(directory) })
  after(() => {
    for (const captured of captures.values()) captured.dispose()
    model.dispose()
  })

  const within = (actual: number, expected: number, share: number) => {
    assert.ok(Math.abs(actual / expected - 1) <= share, `perplexity ${actual.toFixed(4)}, expected ${expected} within ${share * 100} %`)
  }

  it('in full precision, within 0.1 %', async () => {
    const { perplexity, tokens } = await evaluate({ model: directory, text })
    assert.equal(tokens, 16 * 511)
    within(perplexity, figures['fp32']?.perplexity ?? NaN, 0.001)
  })

  for (const [name, figure] of Object.entries(figures)) {
    const [codec = '', weights = ''] = name.split(':')
    // Only plain CQ: integers are a rival.
    if (!codec.startsWith('cq-') || name.split(':').length !== 2) continue
    it(`${name}, within 2 %`, async () => {
      const kind = weights as WeightKind
      const captured = captures.get(kind) ?? await captureActivations(model, { text: calibration, directory, weights: kind, heldOut: 0 })
      captures.set(kind, captured)
      using codebook = await learnCodebook(captured, { codec, iterations: 30 })
      within((await evaluate({ model: directory, text, codebook, window: 0, sinks: 0 })).perplexity, figure.perplexity, 0.02)
      if (figure.perplexity_window32_sinks4 !== undefined) {
        const kept = await evaluate({ model: directory, text, codebook, window: 32, sinks: 4 })
        within(kept.perplexity, figure.perplexity_window32_sinks4, 0.02)
      }
    })
  }
})

import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'

import { calibrate, type CalibrateOptions } from '../../lib/calibrate'
import { evaluate } from '../../lib/evaluate'
import { tinyLlama } from '../onnx/files'

describe('the report of a calibration', function () {
  this.timeout(60_000)
  const document = readFileSync(join(__dirname, '../../docs/api.md'), 'utf8')
  const text = [...Buffer.from(document)].slice(0, 40 * 128)
  const options = { model: tinyLlama, text, length: 128, codec: 'cq-8c4b', weights: 'attention', iterations: 5, threads: 1 } satisfies CalibrateOptions

  it('says what codes lose on text that nothing was learned from', async () => {
    const { codebook, report } = await calibrate(options)
    assert.deepEqual(report.codec, { key: 'cq-8c4b', value: 'cq-8c4b' })
    assert.deepEqual(report.tokens, { run: 5120, learned: 36 * 128, heldOut: 4 * 128 })
    assert.deepEqual(report.pointsPerCentroid, { key: 288, value: 288 })
    assert.deepEqual(report.warnings, [])
    assert.equal(report.layers.length, 4)
    for (const side of ['key', 'value'] as const) {
      const ofSide = report.layers.map((layer) => layer[side])
      for (const { learned, heldOut, heads } of ofSide) {
        assert.ok(learned > 0 && learned < 1 && heldOut! > 0 && heldOut! < 1 && learned !== heldOut, `${learned} ${heldOut}`)
        assert.ok(heads.length === 2 && Math.min(...heads) <= heldOut! && Math.max(...heads) >= heldOut!)
      }
      assert.equal(report.error[side].heldOut, ofSide.reduce((sum, { heldOut }) => sum + heldOut!, 0) / 4)
    }
    // The chunks held out, as couplet eval would judge them.
    const heldOut = [5, 15, 25, 35].flatMap((chunk) => text.slice(chunk * 128, chunk * 128 + 128))
    const full = await evaluate({ model: tinyLlama, text: heldOut, length: 128, threads: 1 })
    const coded = await evaluate({ model: tinyLlama, text: heldOut, length: 128, codebook, threads: 1 })
    const { tokens, added, ...losses } = report.expected!
    assert.ok(Math.abs(added.loss - (losses.coded.loss - losses.full.loss)) < 1e-12 && added.standardError! > 0) // chunks of equal length
    assert.equal(tokens, full.tokens)
    assert.ok(Math.abs(losses.full.perplexity / full.perplexity - 1) < 1e-6)
    assert.ok(Math.abs(losses.coded.perplexity / coded.perplexity - 1) < 1e-6)
    assert.ok(losses.coded.loss > losses.full.loss)
    assert.deepEqual(report, JSON.parse(JSON.stringify(report)))
  })

  it('tells a text like the one learned from from another', async () => {
    const distanceOf = async (evalText: number[]) => {
      const { evaluation, warnings } = (await calibrate({ ...options, evalText })).report
      assert.ok(evaluation!.coded.perplexity > 0 && evaluation!.full.perplexity > 0)
      return { distance: evaluation!.distance!, codes: warnings.map(({ code }) => code) }
    }
    const like = await distanceOf([...Buffer.from(document)].slice(42 * 128, 50 * 128))
    const unlike = await distanceOf(Array.from({ length: 1024 }, (_, i) => 128 + (i * i * 31 + i * 7) % 128))
    assert.ok(like.distance < 1.15, `like: ${like.distance}`)
    assert.ok(unlike.distance > 1.5, `unlike: ${unlike.distance}`)
    assert.deepEqual([like.codes, unlike.codes], [[], ['UNLIKE_TEXT']])
  })

  it('warns of a text that is too short', async () => {
    const few = (await calibrate({ ...options, text: text.slice(0, 1000), codec: { key: 'cq-8c4b', value: 'cq-8c6b' } })).report
    assert.deepEqual(few.warnings.map(({ code }) => code), ['FEW_POINTS'])
    assert.match(few.warnings[0]!.message, /^13\.6 points a centroid are few: 4096 tokens learned from would make 64$/)
    const none = (await calibrate({ ...options, text: text.slice(0, 500), evalText: text.slice(600, 800) })).report
    assert.deepEqual(none.warnings.map(({ code }) => code), ['NOTHING_HELD_OUT', 'FEW_POINTS'])
    assert.deepEqual([none.tokens.heldOut, none.error.key.heldOut, none.expected, none.evaluation!.distance], [0, undefined, undefined, undefined])
    assert.ok(none.evaluation!.coded.perplexity > 0)
    await assert.rejects(calibrate({ ...options, evalText: [65] }), /at least two tokens for `evalText`/)
  })

  it('names layers and heads that lose more than the others', async () => {
    const { suffering, layers } = (await calibrate({ ...options, codec: 'cq-8c8b' })).report
    assert.ok(suffering.length > 0, 'the first layers of this model lose little, the last one most')
    for (const { layer, side, kvHead, error, median } of suffering) {
      const place = layers[layer]![side]
      assert.equal(error, kvHead === undefined ? place.heldOut : place.heads[kvHead])
      assert.ok(error > 1.5 * median)
    }
    const ratios = suffering.map(({ error, median }) => error / median)
    assert.deepEqual(ratios, [...ratios].sort((a, b) => b - a))
  })
})

// The path by which bench/quality evaluates: equal to the product where the product can do the same.
import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import path from 'node:path'
import { TwoVersionAttention } from '../../bench/quality/attention'
import { Calibration } from '../../bench/quality/calibration'
import { compare, evaluateMethod, fullPrecision } from '../../bench/quality/evaluate'
import { LayeredModel } from '../../bench/quality/layers'
import { codebookFile } from '../../bench/quality/methods/codebook'
import { cq } from '../../bench/quality/methods/cq'
import type { Quantizer } from '../../bench/quality/methods/method'
import { makeProbes, probeKinds } from '../../bench/quality/probes'
import { measureRecall } from '../../bench/quality/recall'
import { replaceBlock, type ResultFile, type ResultRow, type Subject, toMarkdown } from '../../bench/quality/results'
import { learnCodebook } from '../../lib/calibrate'
import { chunks } from '../../lib/chunks'
import { evaluate } from '../../lib/evaluate'
import { rewriteAttention } from '../../lib/onnx/rewrite'
import { decoder, type DecoderShape } from '../onnx/graphs'
import { farthest, PlainDecoder } from '../onnx/plain'

const root = path.join(__dirname, '..', '..')
const directory = path.join(root, 'models', 'tiny-llama-bytes')
const bytes = (file: string, count: number) => [...readFileSync(path.join(root, file)).subarray(0, count)]

describe('evaluation of bench/quality', function () {
  this.timeout(60_000)
  const folder = mkdtempSync(path.join(tmpdir(), 'couplet-quality-'))
  after(() => { rmSync(folder, { recursive: true }) })

  describe('on the small model', () => {
    const text = bytes('docs/layout.md', 600)
    let model: LayeredModel
    let attention: TwoVersionAttention
    before(async () => {
      model = await LayeredModel.load(directory)
      attention = new TwoVersionAttention()
    })
    after(async () => {
      await model.release()
      await attention.release()
    })

    it('full precision is what couplet eval says', async () => {
      const evaluation = { model, attention, chunks: [...chunks(text, 256, 2)] }
      const nothing: Quantizer = { tableBytes: 0, quantize: () => 0 }
      const full = await fullPrecision(evaluation)
      const { perplexity } = await evaluate({ model: directory, text, length: 256, threads: 1 })
      for (const kept of [{ sinks: 0, window: 0 }, { sinks: 4, window: 32 }]) {
        for (const rotated of [false, true]) {
          const figures = await evaluateMethod(evaluation, full, nothing, { ...kept, rotated })
          assert.ok(Math.abs(figures.perplexity / perplexity - 1) < 1e-5, `${figures.perplexity}, expected ${perplexity}`)
          assert.ok(figures.divergence < 1e-6 && figures.agreement > 0.99)
        }
      }
    })

    it('plain CQ on rows decoded here is what couplet eval computes on packed codes', async () => {
      const calibration = await Calibration.of(directory, bytes('docs/algorithm.md', 1024), { model, attention, length: 512, threads: 1 })
      const evaluation = { model, attention, chunks: [...chunks(text, 256, 2)] }
      const full = await fullPrecision(evaluation)
      const quantizer = await cq('8c6b', 'attention').fit(calibration)
      using codebook = await learnCodebook(calibration.captured, { codec: '8c6b', iterations: 30, threads: 1 })
      for (const kept of [{ sinks: 0, window: 0 }, { sinks: 4, window: 32 }, { sinks: 0, window: 1 }, { sinks: 300, window: 0 }]) {
        const { perplexity } = await evaluate({ model: directory, text, length: 256, codebook, threads: 1, ...kept })
        const figures = await evaluateMethod(evaluation, full, quantizer, { ...kept, rotated: false })
        assert.ok(Math.abs(figures.perplexity / perplexity - 1) < 1e-4, `${figures.perplexity}, expected ${perplexity} with ${JSON.stringify(kept)}`)
        if (kept.sinks < 256) assert.equal(figures.bits, 0.75)
      }
      const file = path.join(folder, 'saved.safetensors')
      codebook.saveSync(file)
      const saved = codebookFile(file)
      assert.deepEqual([saved.name, saved.width, saved.identity.length], ['saved', 0.75, 64])
      const kept = { sinks: 4, window: 32, rotated: false }
      const [a, b] = [await evaluateMethod(evaluation, full, quantizer, kept), await evaluateMethod(evaluation, full, await saved.fit(calibration), kept)]
      assert.deepEqual(b, a)
      calibration.dispose()
    })

    it('the command measures what is missing, and only that', function () {
      const out = path.join(folder, 'quality.json')
      const run = (...flags: string[]) => {
        const argv = ['--import', 'tsx', path.join(root, 'bench', 'quality', 'main.ts'), '--quick', '--tokens', '256', '--length', '128', '--out', out,
          '--text', path.join(root, 'docs', 'layout.md'), '--calibration', path.join(root, 'docs', 'onnx.md'), ...flags]
        const { status, stdout, stderr } = spawnSync(process.execPath, argv, { cwd: root, encoding: 'utf8' })
        assert.equal(status, 0, stderr)
        return stdout
      }
      assert.ok(!run('--only', 'int4').includes('measured before'))
      const rows = () => (JSON.parse(readFileSync(out, 'utf8')) as ResultFile).rows
      assert.deepEqual(rows().map(({ method, window }) => [method, window]), [['int4-mixed', 0], ['int4-mixed', 32]])
      const [first] = rows()
      const output = run('--only', 'int4,kivi-2')
      assert.equal(output.split('measured before').length - 1, 2)
      assert.deepEqual(rows()[0], first)
      assert.deepEqual(rows().map(({ method }) => method), ['int4-mixed', 'int4-mixed', 'kivi-2b', 'kivi-2b'])
      run('--only', 'int4')
      assert.deepEqual(rows().map(({ method }) => method).sort(), ['int4-mixed', 'int4-mixed', 'kivi-2b', 'kivi-2b'])
      assert.match(output, /### 4 bit\n\n\| method/)
    })
  })

  describe('on other graphs', () => {
    const shapes: Record<string, DecoderShape> = {
      'separate queries, keys and values': {},
      'packed, float16': { packed: true, type: 'float16' },
      'RotaryEmbedding nodes': { rotary: 'nodes' },
      'interleaved, partly rotated': { interleaved: true, rotaryDim: 16 },
      'softcap, scale, local window': { softcap: 5, scale: 0.3, localWindow: 3 },
      'a past that is measured': { measuredPast: true },
      'learned positions': { learnedPositions: true, layers: 1 },
    }
    for (const [name, shape] of Object.entries(shapes)) {
      it(`${name}: cut into layers, the same logits`, async () => {
        const tokens = Array.from({ length: 11 }, (_, i) => (i * 7) % 64)
        const plain = await PlainDecoder.create(decoder(shape))
        const graph = decoder(shape)
        const model = await LayeredModel.of({ graph, ...await rewriteAttention(graph, undefined) })
        const attention = new TwoVersionAttention()
        const [logits] = await fullPrecision({ model, attention, chunks: [tokens] })
        const difference = farthest(logits!, await plain.run(tokens))
        assert.ok(difference < (shape.type === 'float16' ? 2e-2 : 1e-4), `${difference}`)
        await Promise.all([plain.release(), model.release(), attention.release()])
      })
    }
  })

  describe('recall', () => {
    const encode = (text: string) => [...Buffer.from(text, 'latin1')]

    for (const kind of probeKinds) {
      it(`${kind}: same seed, same texts; said once at the distance asked, and not at all in the control`, () => {
        for (const distance of [0, 16, 300]) {
          const probes = makeProbes(kind, { distance, count: 5, seed: 3 })
          assert.deepEqual(makeProbes(kind, { distance, count: 5, seed: 3 }), probes)
          assert.notDeepEqual(makeProbes(kind, { distance, count: 5, seed: 4 }), probes)
          for (const { text, control, answer } of probes) {
            assert.equal(text.length, control.length)
            const said = text.slice(0, -answer).lastIndexOf(text.slice(-answer))
            const asked = text.slice(text.lastIndexOf('\n'))
            assert.ok(said > 0 && text.startsWith(asked), text)
            assert.equal(text.length - 2 * asked.length - 1 - distance, 0)
            assert.equal(control.slice(0, -answer).includes(text.slice(-answer)), false)
            assert.equal(control.slice(asked.length), text.slice(asked.length))
          }
        }
      })
    }

    it('one who continues what came after the same three bytes before has all answers right, and gains', async () => {
      const oracle = (tokens: readonly number[]) => {
        const logits = new Float32Array(tokens.length * 256)
        tokens.forEach((_, t) => {
          for (let before = t - 1; before > 0; before--) {
            if ([0, 1, 2].some((back) => tokens[before - back] !== tokens[t - back])) continue
            logits[t * 256 + tokens[before + 1]!] = 9
            break
          }
        })
        return Promise.resolve(logits)
      }
      for (const kind of probeKinds) {
        const probes = makeProbes(kind, { distance: 40, count: 8 })
        const recall = await measureRecall(oracle, encode, probes)
        assert.equal(recall.answers, 1)
        assert.equal(recall.tokens, 1)
        assert.ok(recall.controlTokens < 0.3 && recall.gain > 5, JSON.stringify(recall))
        const deaf = await measureRecall((tokens) => Promise.resolve(new Float32Array(tokens.length * 256).map((_, i) => Math.sin(i % 256))), encode, probes)
        assert.deepEqual([deaf.gain, deaf.error, deaf.answers], [0, 0, 0])
      }
    })
  })

  it('compare(): divergence and agreement of two distributions', () => {
    const { divergence, agrees } = compare(Float32Array.from([1, 1].map(Math.log)), Float32Array.from([1, 3].map(Math.log)))
    assert.ok(Math.abs(divergence - (Math.log(0.5 / 0.25) + Math.log(0.5 / 0.75)) / 2) < 1e-7)
    assert.equal(agrees, false)
    assert.deepEqual(compare(Float32Array.of(3, 1), Float32Array.of(3, 1)), { divergence: 0, agrees: true })
  })

  it('tables: by perplexity, with what keeps to the width', () => {
    const row = (method: string, perplexity: number, bits: number, window: number): ResultRow =>
      ({ method, width: 2, extended: false, sinks: window / 8, window, perplexity, divergence: 0, agreement: 1, bits, tableBytes: 0, key: `${method}${window}` })
    const rows = [row('b', 5, 2, 0), row('b', 4, 2, 32), row('a', 4.5, 3, 0), row('a', 4.4, 3, 32)]
    const markdown = toMarkdown({ perplexity: 3 } as Subject, rows, [4, 2])
    assert.ok(markdown.indexOf('| a |') < markdown.indexOf('| b |'))
    assert.match(markdown, /every token coded: a \(3\.00 bits\); of those within 2\.10 bits, b \(2\.00 bits\)\./)
    assert.match(markdown, /Lowest perplexity with sinks and window: b \(2\.00 bits\); of those within 2\.10 bits, b/)
    const document = path.join(folder, 'document.md')
    writeFileSync(document, 'before\n<!-- x: written by the benchmark -->\nold\n<!-- end of x -->\nafter\n')
    replaceBlock(document, 'x', 'new')
    replaceBlock(document, 'x', 'newer')
    assert.equal(readFileSync(document, 'utf8'), 'before\n<!-- x: written by the benchmark -->\n\nnewer\n\n<!-- end of x -->\nafter\n')
    assert.throws(() => { replaceBlock(document, 'y', '') }, /lacks the markers/)
  })
})

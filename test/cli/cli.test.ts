import assert from 'node:assert/strict'
import { spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { closeSync, existsSync, mkdtempSync, openSync, readdirSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import path from 'node:path'

import type { CalibrationReport, Capabilities } from '../../lib'

const root = path.join(__dirname, '..', '..')
const model = path.join(root, 'models', 'tiny-llama-bytes')

interface Ran { code: number | null; out: string; err: string }

/** How Node runs the command from its sources. */
const program = ['--import', 'tsx', path.join(root, 'lib', 'cli', 'couplet.ts')]

const couplet = (...args: string[]): Ran => coupletWith('', ...args)

function coupletWith(input: string, ...args: string[]): Ran {
  const done = spawnSync(process.execPath, [...program, ...args], { encoding: 'utf8', cwd: root, input })
  assert.equal(done.signal, null, `couplet ${args[0]} was ended by ${done.signal}: ${done.stderr}`)
  return { code: done.status, out: done.stdout, err: done.stderr }
}

describe('the couplet command', function () {
  this.timeout(120_000)
  let folder = ''
  const file = (name: string) => path.join(folder, name)
  before(() => {
    folder = mkdtempSync(path.join(tmpdir(), 'couplet-cli-'))
    const text = readFileSync(path.join(root, 'README.md'), 'utf8') + readFileSync(path.join(root, 'CHANGELOG.md'), 'utf8')
    writeFileSync(file('learn.txt'), text.slice(0, 4096))
    writeFileSync(file('predict.txt'), text.slice(4096, 5200))
  })
  after(() => { rmSync(folder, { recursive: true, force: true }) })

  it('calibrates, evaluates and generates', () => {
    const book = file('book.safetensors')
    const made = couplet('calibrate', '--model', model, '--text', file('learn.txt'), '--codec', 'cq-8c6b', '--device', 'auto', '--out', book)
    assert.equal(made.code, 0, made.err)
    assert.match(made.out, /cq-8c6b, 4 layers, 2 kv heads, headDim 64/)

    const full = couplet('eval', '--model', model, '--text', file('predict.txt'), '--length', '256', '--json')
    const coded = couplet('eval', '--model', model, '--text', file('predict.txt'), '--length', '256', '--json',
      '--codebooks', book, '--window', '0', '--sinks', '0')
    assert.equal(coded.code, 0, coded.err)
    const [exact, packed] = [full, coded].map((run) => JSON.parse(run.out) as Record<string, number>)
    assert.ok(exact && packed)
    assert.equal(packed['tokens'], exact['tokens'])
    assert.equal(exact['bitsPerChannel'], 32)
    assert.equal(packed['bitsPerChannel'], 0.75)
    assert.ok((packed['perplexity'] ?? 0) > (exact['perplexity'] ?? 0))
    assert.ok(Math.abs((packed['bitsPerToken'] ?? 0) - Math.log2(packed['perplexity'] ?? 0)) < 1e-9)

    const written = couplet('generate', '--model', model, '--prompt', 'The file ', '--codebooks', book, '--tokens', '12')
    assert.equal(written.code, 0, written.err)
    assert.ok(written.out.startsWith('The file '))
    assert.ok(written.out.length > 'The file \n'.length)
  })

  it('chooses codecs for a budget, and counts what they take', () => {
    const book = file('mixed.safetensors')
    const common = ['calibrate', '--model', model, '--text', file('learn.txt'), '--length', '128', '--out', book]
    const made = couplet(...common, '--bits', '0.5', '--candidates', '8c4b,16c4b,4c4b', '--measure', 'fisher', '--weights', 'fisher', '--iterations', '3')
    assert.equal(made.code, 0, made.err)
    assert.match(made.out, /^bits +0\.\d+ of 0\.5 by channel for codes; divergence expected 0\.\d+$/m)
    assert.match(made.out, /^layer 3 +(head 0 )?keys cq-\d+c4b, values cq-\d+c4b/m)
    const coded = couplet('eval', '--model', model, '--text', file('predict.txt'), '--length', '256', '--codebooks', book,
      '--window', '0', '--sinks', '0', '--shared-by', '100000')
    assert.equal(coded.code, 0, coded.err)
    const figure = (title: string) => Number(new RegExp(`^${title} +([\\d.]+)`, 'm').exec(coded.out)?.[1])
    assert.ok(figure('bits of codes') <= 0.5 && figure('bits of codes') > 0.4)
    assert.equal(figure('bits per channel'), figure('bits of codes')) // whole pages
    assert.equal(figure('bits with codebook'), Number((figure('bits per channel') + figure('codebook in memory') * 8 / 1e5 / 1024).toFixed(3)))
    const planned = couplet('plan', '--model', model, '--context', '4096', '--codebooks', book)
    assert.match(planned.out, /^mixed-0\.\d+ /m)
    assert.equal(couplet(...common, '--bits', '1', '--codec', 'cq-8c8b').code, 2)
    const alone = couplet(...common, '--measure', 'fisher')
    assert.equal(alone.code, 2)
    assert.match(alone.err, /go with --bits/)
  })

  it('calibrates from several files and standard input, and reports', () => {
    const [book, report] = [file('several.safetensors'), file('report.json')]
    writeFileSync(file('second.txt'), readFileSync(file('learn.txt'), 'utf8').slice(1000, 3000))
    const arguments_ = ['calibrate', '--model', model, '--text', '-', '--text', file('second.txt'), '--eval-text', file('predict.txt'), '--length', '128',
      '--codec', 'cq-8c6b', '--iterations', '5', '--out', book, '--report', report]
    const { code, out, err } = coupletWith(readFileSync(file('learn.txt'), 'utf8'), ...arguments_)
    assert.equal(code, 0, err)
    assert.match(out, /cq-8c6b, 4 layers, 2 kv heads, headDim 64\nlearned from +\d+ of 6\d+ tokens, [\d.]+ a centroid; \d+ others held out/)
    assert.match(out, /\nexpected +perplexity [\d.]+ -> [\d.]+ \([+-][\d.]+( ± [\d.]+)? %; window 32, sinks 4; \d+ tokens\) on text held out\n/)
    assert.match(out, /\nevaluation text perplexity .* coded error [\d.]+ times that of text held out/)
    const { tokens, layers } = JSON.parse(readFileSync(report, 'utf8')) as CalibrationReport
    assert.equal(tokens.run, readFileSync(file('learn.txt')).length + readFileSync(file('second.txt')).length)
    assert.equal(layers.length, 4)
    assert.ok(!existsSync(`${book}.checkpoint`))
    // A pipe gives what a file gives.
    const again = couplet('calibrate', ...arguments_.slice(1, 3), '--text', file('learn.txt'), ...arguments_.slice(5), '--out', file('again'))
    assert.equal(again.code, 0, again.err)
    assert.deepEqual(readFileSync(file('again')), readFileSync(book))
    assert.match(couplet(...arguments_, '--text', '-').err, /Standard input can be read once only/)
  })

  it('learns by fisher weights, and tunes', () => {
    const [book, tuned] = [file('fisher.safetensors'), file('tuned.safetensors')]
    const made = couplet('calibrate', '--model', model, '--text', file('learn.txt'), '--codec', 'cq-8c3b', '--weights', 'fisher', '--length', '256',
      '--out', book)
    assert.equal(made.code, 0, made.err)
    const done = couplet('tune', '--model', model, '--text', file('learn.txt'), '--codebooks', book, '--length', '64', '--steps', '3',
      '--window', '0', '--sinks', '0', '--out', tuned)
    assert.equal(done.code, 0, done.err)
    const [, before, after, best] = /KL divergence of held-out text (\S+) before, (\S+) after (\d) of 3 steps/.exec(done.out) ?? []
    assert.ok(Number(after) <= Number(before) && Number(best) <= 3, done.out)
    assert.ok(!existsSync(`${tuned}.checkpoint`))
    assert.equal(couplet('eval', '--model', model, '--text', file('predict.txt'), '--codebooks', tuned).code, 0)
  })

  it('draws what it evaluates, several codebooks at once', () => {
    const books = ['cq-8c4b', 'cq-4c4b'].map((codec) => {
      const book = file(`${codec}.safetensors`)
      assert.equal(couplet('calibrate', '--model', model, '--text', file('learn.txt'), '--codec', codec, '--iterations', '5', '--out', book).code, 0)
      return book
    })
    const given = ['--model', model, '--text', file('predict.txt'), '--length', '256']
    const done = couplet('eval', ...given, '--codebooks', ...books, '--report', file('quality.html'), '--json')
    assert.equal(done.code, 0, done.err)
    const all = JSON.parse(done.out) as { name: string; perplexity: number; codeBits?: number }[]
    assert.deepEqual(all.map(({ name, codeBits }) => [name, codeBits]), [['full precision', undefined], ['cq-8c4b', 0.5], ['cq-4c4b', 1]])
    assert.match(readFileSync(file('quality.html'), 'utf8'), /4 sinks and a window of 32 in full precision: cq-8c4b at 0\.5 bits has[^]*<svg/)
    const others = couplet('eval', ...given, '--report', file('other.html'), '--results', path.join(root, 'bench', 'results', '2026-11-24-quality.json'))
    assert.equal(others.code, 1)
    assert.match(others.err, /Expected figures of text [0-9a-f]{16}, length 256 but/)
    assert.equal(couplet('eval', ...given, '--report', file('other.html')).code, 2)
    assert.equal(couplet('eval', ...given, '--results', 'x').code, 2)
  })

  it('inspects', () => {
    const book = file('inspected.safetensors')
    const texts = ['--model', model, '--length', '128']
    assert.equal(couplet('calibrate', ...texts, '--text', file('learn.txt'), '--codec', 'cq-8c4b', '--out', book).code, 0)
    const done = couplet('inspect', ...texts, '--text', file('predict.txt'), '--codebooks', book, '--out', file('report.html'), '--json')
    assert.equal(done.code, 0, done.err)
    const { tokens, layers } = JSON.parse(done.out) as { tokens: number; layers: { key: { coding?: { headErrors: number[] } } }[] }
    assert.equal(tokens, 1104)
    assert.ok(layers.length === 4 && layers[0]?.key.coding?.headErrors.every((error) => error > 0 && error < 1))
    assert.match(readFileSync(file('report.html'), 'utf8'), /<title>What codes can save, and what they lose: tiny-llama-bytes<[^]*<svg[^]*<\/html>/)
    const nowhere = couplet('inspect', ...texts, '--text', file('predict.txt'), '--out', path.join(folder, 'nowhere', 'report.html'))
    assert.equal(nowhere.code, 1)
    assert.match(nowhere.err, /nowhere/)
  })

  it('plans memory, from a graph or from config.json alone', () => {
    const planned = couplet('plan', '--model', model, '--context', '4096', '--sequences', '8', '--budget', '0.1GB', '--codec', 'cq-8c8b', '--json')
    assert.equal(planned.code, 0, planned.err)
    const { caches, ...asked } = JSON.parse(planned.out) as { caches: { name: string; totalBytes: number; longestContext: number }[] }
    assert.deepEqual(asked, { layers: 4, kvHeads: 2, headDim: 64, context: 4096, sequences: 8, budget: 1e8, sinks: 4, window: 32 })
    assert.deepEqual(caches.map(({ name }) => name), ['float16', 'int8', 'int4', 'cq-8c8b'])
    assert.equal(caches[0]?.totalBytes, 8 * 4096 * 4 * 2 * 2 * 64 * 2)
    assert.ok((caches[3]?.longestContext ?? 0) > 10 * (caches[0]?.longestContext ?? 0))

    writeFileSync(file('config.json'), JSON.stringify({ num_hidden_layers: 32, num_attention_heads: 32, num_key_value_heads: 8, hidden_size: 4096 }))
    const table = couplet('plan', '--model', folder, '--context', '32768', '--budget', '24GiB')
    assert.equal(table.code, 0, table.err)
    assert.match(table.out, /32 layers, 8 kv heads, headDim 128; 1 x 32768 tokens/)
    assert.match(table.out, /float16 +16\.00 +4\.295 GB .*196608/)
    assert.equal(couplet('plan', '--model', model, '--context', '1', '--budget', 'much').code, 2)

    const drawn = couplet('plan', '--model', folder, '--context', '32768', '--out', file('plan.html'))
    assert.match(drawn.out, /float16 +16\.00/)
    assert.match(readFileSync(file('plan.html'), 'utf8'), /cq-8c8b takes [^<]+ where float16 takes 4\.295 GB[^]*<svg/)
  })

  it('gives the same codebook for the same seed', () => {
    for (const [name, threads] of [['a', '1'], ['b', '2']] as const) {
      const { code, err } = couplet('calibrate', '--model', model, '--text', file('learn.txt'), '--codec', 'cq-8c4b',
        '--seed', '7', '--threads', threads, '--out', file(name))
      assert.equal(code, 0, err)
    }
    assert.deepEqual(readFileSync(file('a')), readFileSync(file('b')))
  })

  it('says what is loaded', () => {
    const { code, out } = couplet('doctor')
    assert.equal(code, 0)
    assert.match(out, /^cpu +available, (avx512|avx2|portable)$/m)
    assert.match(out, /^ +device 0: CPU, .+ GiB free$/m)
    assert.match(out, /^cuda +(not available: .+|available, sm_\d+, driver for CUDA .+)$/m)
    const { backends } = JSON.parse(couplet('doctor', '--json').out) as Capabilities
    assert.ok(backends.cpu.available && backends.cpu.devices.length === 1)
    assert.equal('reason' in backends.cuda, !backends.cuda.available)
    assert.match(out, /^onnxruntime +1\.\d+\.\d+ /m)
    assert.match(out, /^ +CUDA execution provider: (available|not available: .+)$/m)
  })

  for (const [title, args] of [
    ['no such command', ['fly']],
    ['a missing option', ['calibrate', '--model', model]],
    ['an unknown option', ['doctor', '--loud']],
    ['a codec that is none', ['calibrate', '--model', model, '--text', 'x', '--out', 'y', '--codec', 'cq-8']],
    ['a share that is none', ['calibrate', '--model', model, '--text', 'x', '--out', 'y', '--held-out', '0.7']],
    ['a device that is none', ['calibrate', '--model', model, '--text', 'x', '--out', 'y', '--device', 'tpu']],
    ['a number that is none', ['eval', '--model', model, '--text', 'x', '--length', 'long']],
    ['options that go with another', ['calibrate', '--model', model, '--text', 'x', '--out', 'y', '--per', 'head']],
    ['standard input for two texts', ['calibrate', '--model', model, '--text', '-', '--text', '-', '--out', 'y']],
    ['standard input for two kinds of text', ['calibrate', '--model', model, '--text', '-', '--eval-text', '-', '--out', 'y']],
  ] as const) {
    it(`exits with 2 on ${title}`, () => {
      const { code, err } = couplet(...args)
      assert.equal(code, 2)
      assert.match(err, /error: /)
    })
  }

  for (const [title, args, message] of [
    ['a missing text', ['eval', '--model', model, '--text', 'nowhere.txt'], /nowhere\.txt/],
    ['a missing model', ['eval', '--model', 'nowhere', '--text', path.join(root, 'README.md')], /nowhere/],
    ['a codebook that is none', ['eval', '--model', model, '--text', __filename, '--codebooks', __filename], /cli\.test\.ts is not .*CODEBOOK_INVALID/],
    ['a folder for a file, before the work', ['tune', '--model', 'nowhere', '--text', __filename, '--codebooks', 'x', '--out', root], /is a folder/],
  ] as const) {
    it(`exits with 1 on ${title}`, () => {
      const { code, err } = couplet(...args)
      assert.equal(code, 1)
      assert.match(err, message)
      assert.doesNotMatch(err, /\n\s+at /)
    })
  }

  it('leaves no checkpoint where nothing was begun', () => {
    const { code } = couplet('calibrate', '--model', 'nowhere', '--text', __filename, '--out', file('never.safetensors'))
    assert.equal(code, 1)
    assert.deepEqual(readdirSync(folder).filter((name) => name.startsWith('never')), [])
  })

  it('says which config.json it cannot read', () => {
    writeFileSync(file('config.json'), '{')
    const { code, err } = couplet('plan', '--model', folder, '--context', '10')
    assert.equal(code, 1)
    assert.match(err, /config\.json is not JSON: .*ERR_COUPLET_UNSUPPORTED_MODEL/)
  })

  it('ends without a word when its reader has seen enough', async () => {
    const child = spawn(process.execPath, [...program, 'generate', '--model', model, '--prompt', 'On', '--tokens', '2000'])
    let err = ''
    child.stderr.on('data', (text) => { err += String(text) })
    child.stdout.once('data', () => { child.stdout.destroy() })
    const [code] = await once(child, 'exit') as [number | null]
    assert.deepEqual([code, err], [0, ''])
  })

  it('fails when its output cannot be written', function () {
    if (!existsSync('/dev/full')) this.skip()
    const full = openSync('/dev/full', 'w')
    for (const args of [['doctor'], ['generate', '--model', model, '--prompt', 'On', '--tokens', '3']]) {
      const { status, stderr } = spawnSync(process.execPath, [...program, ...args], { encoding: 'utf8', stdio: ['ignore', full, 'pipe'] })
      assert.equal(status, 1)
      assert.match(stderr, /^couplet: the output cannot be written: ENOSPC[^\n]*\n$/)
    }
    closeSync(full)
  })

  it('exits with 0 after help', () => {
    const { code, out } = couplet('--help')
    assert.equal(code, 0)
    for (const command of ['calibrate', 'tune', 'eval', 'generate', 'inspect', 'plan', 'doctor']) assert.match(out, new RegExp(`^ +${command} `, 'm'))
  })
})

import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { mkdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { Worker } from 'node:worker_threads'

import { codeOf } from '../../lib/errors'
import { DecoderModel } from '../../lib/onnx/model'
import { ids, prose, temporaryFolder, tinyLlama } from './files'
import { decoder } from './graphs'
import { farthest, PlainDecoder } from './plain'

const modelModule = JSON.stringify(join(__dirname, '../../lib/onnx/model.ts'))
const root = join(__dirname, '../..')

describe('onnx runtime', () => {
  const folder = temporaryFolder()
  let model: DecoderModel
  before(async () => { model = await DecoderModel.load(tinyLlama, { threads: 1 }) })
  after(() => model.dispose())

  it('keeps the event loop turning', async () => {
    let ticks = 0
    const timer = setInterval(() => ticks++, 1)
    const running = model.run([{ sequence: model.sequence(), tokens: prose(0, 1500) }], { logits: 'last' })
    let done = false
    void running.then(() => { done = true })
    await new Promise((resolve) => setTimeout(resolve, 20))
    assert.ok(!done, 'a run of 1500 tokens takes longer than this')
    await running
    clearInterval(timer)
    assert.ok(ticks >= 5, `${ticks} ticks`)
  })

  it('stops for an AbortSignal and leaves the sequence as it was', async () => {
    const sequence = model.sequence()
    await model.run([{ sequence, tokens: prose(0, 10) }])
    const reason = new Error('enough')
    await assert.rejects(model.run([{ sequence, tokens: prose(10, 20) }], { signal: AbortSignal.abort(reason) }), reason)

    const controller = new AbortController()
    const running = model.run([{ sequence, tokens: prose(10, 2300) }], { signal: controller.signal })
    setTimeout(() => controller.abort(reason), 15)
    await assert.rejects(running, reason)
    assert.equal(sequence.length, 10)

    const again = model.sequence()
    await model.run([{ sequence: again, tokens: prose(0, 10) }])
    const [a, b] = [await model.run([{ sequence, tokens: prose(10, 40) }]), await model.run([{ sequence: again, tokens: prose(10, 40) }])]
    assert.deepEqual(a.logits, b.logits)
  })

  it('runs sequences at the same time, each in one run only', async () => {
    const sequences = [model.sequence(), model.sequence(), model.sequence()]
    const results = await Promise.all(sequences.map((sequence, i) => model.run([{ sequence, tokens: prose(i, i + 60) }])))
    for (const [i, { logits }] of results.entries()) {
      const alone = await model.run([{ sequence: model.sequence(), tokens: prose(i, i + 60) }])
      assert.ok(farthest(logits, alone.logits) < 1e-4)
    }
    const [first, second] = await Promise.allSettled([1, 2].map(() => model.run([{ sequence: sequences[0]!, tokens: prose(0, 200) }])))
    assert.equal(first!.status, 'fulfilled')
    assert.equal(codeOf((second as PromiseRejectedResult).reason), 'ERR_COUPLET_BUSY')
  })

  it('holds two models at once, beside onnxruntime-node', async () => {
    using other = await DecoderModel.load(folder.save(decoder()), { threads: 2 })
    const plain = await PlainDecoder.create(decoder())
    const [mine, theirs] = await Promise.all([
      other.run([{ sequence: other.sequence(), tokens: ids(30) }]),
      model.run([{ sequence: model.sequence(), tokens: prose(0, 30) }]),
    ])
    assert.equal(theirs.dims[2], 256)
    assert.ok(farthest(mine.logits, await plain.run(ids(30))) < 1e-4)
    assert.notEqual(other.fingerprint, model.fingerprint)
    assert.match(model.fingerprint, /^sha256:[0-9a-f]{64}$/)
    await plain.release()
  })

  it('describes the model', () => {
    assert.deepEqual(model.shape, { layers: 4, queryHeads: 4, kvHeads: 2, headDim: 64, rotary: { kind: 'half', dim: 64, theta: 10000 } })
    assert.deepEqual([model.vocabulary, model.inputNames], [256, ['input_ids']])
  })

  it('gives the last logits alone when asked', async () => {
    const tokens = prose(0, 33)
    const all = await model.run([{ sequence: model.sequence(), tokens }])
    const last = await model.run([{ sequence: model.sequence(), tokens: tokens.map(BigInt) }], { logits: 'last' })
    assert.deepEqual([all.dims, last.dims], [[1, 33, 256], [1, 1, 256]])
    assert.ok(farthest(last.logits, all.logits.subarray(32 * 256)) < 1e-4)
    for (const shape of [{ finalSoftcap: true }, { keepInput: true }, { type: 'float16' as const }]) {
      using other = await DecoderModel.load(folder.save(decoder(shape)))
      const whole = await other.run([{ sequence: other.sequence(), tokens: ids(21) }])
      const end = await other.run([{ sequence: other.sequence(), tokens: ids(21) }], { logits: 'last' })
      assert.deepEqual([whole.dims, end.dims], [[1, 21, 64], [1, 1, 64]])
      assert.ok(farthest(end.logits, whole.logits.subarray(20 * 64)) < 1e-2)
    }
  })

  it('hands other outputs through', async () => {
    const graph = decoder()
    graph.graph.output.push(...decoder().graph.output.slice(0, 1).map((info) => ({ ...info, name: 'layers.0.stream', type: undefined })))
    using extended = await DecoderModel.load(folder.save(graph))
    const { outputs } = await extended.run([{ sequence: extended.sequence(), tokens: ids(5) }])
    assert.deepEqual(Object.keys(outputs), ['layers.0.stream'])
    assert.deepEqual(outputs['layers.0.stream']!.dims, [1, 5, 48])
    assert.ok(outputs['layers.0.stream']!.data instanceof Float32Array)
  })

  it('passes on what went wrong inside the operator, and goes on afterwards', async () => {
    using short = await DecoderModel.load(folder.save(decoder({ positions: 16 })))
    const sequence = short.sequence()
    await short.run([{ sequence, tokens: ids(10) }])
    await assert.rejects(short.run([{ sequence, tokens: ids(10) }]), { name: 'RangeError', code: 'ERR_COUPLET_INVALID_ARGUMENT' })
    assert.equal(sequence.length, 10)
    await short.run([{ sequence, tokens: ids(6) }])
    assert.equal(sequence.length, 16)
  })

  it('says what is wrong with rows and options', async () => {
    const sequence = model.sequence()
    const invalid = { code: 'ERR_COUPLET_INVALID_ARGUMENT' }
    for (const tokens of [[], [256], [-1], [1.5], ['a']]) await assert.rejects(model.run([{ sequence, tokens: tokens as number[] }]), invalid)
    await assert.rejects(model.run([{ sequence, tokens: [1] }], { logits: 'some' as 'all' }), invalid)
    await assert.rejects(model.run({} as []), invalid)
    await assert.rejects(model.run([{ sequence, tokens: [1] }, { sequence, tokens: [2] }]))
    assert.equal(sequence.length, 0)
    assert.deepEqual(await model.run([]), { logits: new Float32Array(0), dims: [0, 0, 256], outputs: {} })
  })

  it('is disposed of once', async () => {
    const gone = await DecoderModel.load(folder.save(decoder()))
    const running = gone.run([{ sequence: gone.sequence(), tokens: ids(60) }])
    gone.dispose()
    gone.dispose()
    await assert.rejects(running, { code: 'ERR_COUPLET_DISPOSED' })
    await assert.rejects(gone.run([]), { code: 'ERR_COUPLET_DISPOSED' })
  })

  it('tells why a model cannot be loaded', async () => {
    const unsupported = { code: 'ERR_COUPLET_UNSUPPORTED_MODEL' }
    await assert.rejects(DecoderModel.load(join(folder.path, 'nowhere')), { ...unsupported, message: /There is no model at/ })
    writeFileSync(join(folder.path, 'text.onnx'), 'this is not a model')
    await assert.rejects(DecoderModel.load(join(folder.path, 'text.onnx')), { ...unsupported, message: /cannot be read as an ONNX model/ })
    const odd = decoder()
    odd.graph.node.find(({ opType }) => opType === 'Add')!.opType = 'Teleport'
    await assert.rejects(DecoderModel.load(folder.save(odd)), { code: 'ERR_COUPLET_ONNXRUNTIME', message: /Teleport/ })
    const embeddings = decoder()
    embeddings.graph.input[0]!.name = 'tokens'
    embeddings.graph.node.find(({ input }) => input.includes('input_ids'))!.input[1] = 'tokens'
    await assert.rejects(DecoderModel.load(folder.save(embeddings)), { ...unsupported, message: /input "tokens"/ })
  })

  it('tells why an onnxruntime cannot be used', async () => {
    const unusable = async (onnxruntime: unknown, message: RegExp) =>
      assert.rejects(DecoderModel.load(tinyLlama, { onnxruntime }), { code: 'ERR_COUPLET_ONNXRUNTIME', message })
    await unusable(folder.path, /npm install onnxruntime-node/)
    await unusable({}, /Expected `onnxruntime` to be/)
    const bin = join(folder.path, 'fake/bin/napi-v6', process.platform, process.arch)
    mkdirSync(bin, { recursive: true })
    writeFileSync(join(bin, 'libonnxruntime.so.1'), 'this is not a library')
    await unusable(join(folder.path, 'fake'), /cannot be opened/)
    const module: unknown = await import('onnxruntime-node')
    ;(await DecoderModel.load(tinyLlama, { onnxruntime: module })).dispose()
  })

  it('works in worker_threads, which may end in the middle of a run', async function () {
    this.timeout(60_000)
    const code = (end: string) => `
      const { parentPort } = require('node:worker_threads')
      require(${modelModule}).DecoderModel.load(${JSON.stringify(tinyLlama)}, { threads: 1 }).then(async (model) => {
        const { logits } = await model.run([{ sequence: model.sequence(), tokens: ${JSON.stringify(prose(0, 20))} }])
        parentPort.postMessage(logits)
        ${end}
      })`
    const start = (end: string) => new Worker(code(end), { eval: true, execArgv: ['--require', 'tsx/cjs'] })
    const expected = (await model.run([{ sequence: model.sequence(), tokens: prose(0, 20) }])).logits
    const message = (worker: Worker) => new Promise<Float32Array>((resolve, reject) => worker.once('message', resolve).once('error', reject))

    const workers = [start('model.dispose()'), start('')]
    const exits = workers.map((worker) => new Promise((resolve) => worker.once('exit', resolve)))
    for (const logits of await Promise.all(workers.map(message))) assert.ok(farthest(logits, expected) < 1e-4)
    assert.deepEqual(await Promise.all(exits), [0, 0])

    const busy = start('await model.run([{ sequence: model.sequence(), tokens: new Array(2000).fill(65) }])')
    await message(busy)
    await new Promise((resolve) => setTimeout(resolve, 10))
    await busy.terminate()
    assert.ok(farthest((await model.run([{ sequence: model.sequence(), tokens: prose(0, 20) }])).logits, expected) < 1e-4)
  })

  const child = (body: string) => {
    const code = `const { DecoderModel } = require(${modelModule})\nconst tiny = ${JSON.stringify(tinyLlama)}\nvoid (async () => {${body}})()`
    const { status, signal, stderr } = spawnSync(process.execPath, ['--import', 'tsx', '--eval', code], { cwd: root, encoding: 'utf8' })
    assert.deepEqual({ status, signal }, { status: 0, signal: null }, stderr)
  }

  it('lets the process exit in the middle of a run', function () {
    this.timeout(60_000)
    child(`
      const model = await DecoderModel.load(tiny, { threads: 2 })
      void model.run([{ sequence: model.sequence(), tokens: new Array(2000).fill(65) }])
      setTimeout(() => process.exit(0), 20)`)
  })

  it('shares its library with an onnxruntime-node that is loaded later', function () {
    this.timeout(60_000)
    child(`
      const model = await DecoderModel.load(tiny, { threads: 1 })
      await model.run([{ sequence: model.sequence(), tokens: [65, 66] }])
      const ort = require('onnxruntime-node')
      const session = await ort.InferenceSession.create(tiny + '/onnx/model.onnx')
      await model.run([{ sequence: model.sequence(), tokens: [65, 66] }])
      await session.release()
      const maps = require('node:fs').readFileSync('/proc/self/maps', 'utf8').match(/\\S*libonnxruntime\\S*/g)
      require('node:assert').equal(new Set(maps).size, 1)
      await model.run([{ sequence: model.sequence(), tokens: [65, 66] }])`)
  })

  it('does without onnxruntime-node until a model is loaded', function () {
    this.timeout(60_000)
    child(`require(${JSON.stringify(join(root, 'lib/index.ts'))})
      const loaded = Object.keys(require.cache).filter((path) => path.includes('onnxruntime'))
      require('node:assert').deepEqual(loaded.filter((path) => path.includes('node_modules')), [])
      require('node:assert').ok(!require('node:fs').readFileSync('/proc/self/maps', 'utf8').includes('libonnxruntime'))`)
  })
})

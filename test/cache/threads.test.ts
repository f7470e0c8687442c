// Caches in worker threads, and environments that end while a layer is computed.
import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { join } from 'node:path'
import { Worker } from 'node:worker_threads'

// Begins a step of many tokens; `attend` takes a second or so.
const prelude = `
  require('tsx/cjs')
  const { Cache } = require(${JSON.stringify(join(__dirname, '../../lib/cache.ts'))})
  const model = require(${JSON.stringify(join(__dirname, 'model.ts'))})
  const begin = (tokens) => {
    const cache = new Cache({ ...model.shape, codebook: model.codebook, rotary: model.rotary, threads: 1 })
    const sequence = cache.sequence()
    return { sequence, step: cache.begin([{ sequence, tokens }]), inputs: model.newTokens(tokens, model.random(3)) }
  }
`
const start = (body: string): Worker => new Worker(`${prelude}\n${body}`, { eval: true })
const run = (body: string) => spawnSync(process.execPath, ['-e', `${prelude}\n${body}`], { encoding: 'utf8', cwd: join(__dirname, '../..'), timeout: 60_000 })

describe('cache in several threads', function () {
  this.timeout(60_000)

  it('works in worker_threads at the same time, with the same results', async () => {
    const body = `
      const { parentPort } = require('node:worker_threads')
      const { sequence, step, inputs } = begin(300)
      const attend = async () => {
        let sum = 0
        for (const [layer, input] of inputs.entries()) sum += (await step.attend(layer, [input]))[0].reduce((sum, value) => sum + Math.abs(value), 0)
        step.commit()
        return { sum, length: sequence.length }
      }
      attend().then((result) => parentPort.postMessage(result))
    `
    const workers = [start(body), start(body), start(body)]
    const results = await Promise.all(workers.map(async (worker) => ((await once(worker, 'message')) as [unknown])[0]))
    await Promise.all(workers.map((worker) => worker.terminate()))
    assert.deepEqual(results[1], results[0])
    assert.deepEqual(results[2], results[0])
    assert.equal((results[0] as { length: number }).length, 300)
  })

  it('ends with its worker in mid-call', async () => {
    for (let i = 0; i < 3; i++) {
      const worker = start(`
        const { parentPort } = require('node:worker_threads')
        const { step, inputs } = begin(6000)
        step.attend(0, [inputs[0]]).then(() => parentPort.postMessage('too late'))
        parentPort.postMessage('attending')
      `)
      assert.deepEqual(await once(worker, 'message'), ['attending'])
      assert.equal(await worker.terminate(), 1)
    }
  })

  it('lets the process exit in mid-call', () => {
    const { status, stderr } = run(`
      const { step, inputs } = begin(6000)
      step.attend(0, [inputs[0]])
      setImmediate(() => process.exit(7))
    `)
    assert.equal(status, 7, stderr)
  })

  it('lets an uncaught error end the process in mid-call', () => {
    const { status, stderr } = run(`
      const { step, inputs } = begin(6000)
      step.attend(0, [inputs[0]])
      setImmediate(() => { throw new Error('on purpose') })
    `)
    assert.equal(status, 1, stderr)
    assert.match(stderr, /on purpose/)
  })

  it('keeps the process alive until its call has ended, and no longer', () => {
    const { status, stdout, stderr } = run(`
      const { step, inputs } = begin(1000)
      step.attend(0, [inputs[0]]).then(() => console.log('attended'))
    `)
    assert.equal(status, 0, stderr)
    assert.equal(stdout, 'attended\n')
  })
})

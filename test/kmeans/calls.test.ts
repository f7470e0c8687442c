// What every promise of the addon does (native/binding/worker.h), shown on its longest call.
import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { join } from 'node:path'
import { setTimeout as sleep } from 'node:timers/promises'
import { Worker } from 'node:worker_threads'

import { codec, encode, kmeans } from '../../lib'
import type { KmeansProgress } from '../../lib'

/** Seconds of work if nobody stops it. */
const long = { problems: 64, points: 8192, channels: 8, centroids: 256, iterations: 1000, tolerance: 0 }
const short = { ...long, problems: 2, points: 2048, centroids: 16, iterations: 5 }
const values = Float32Array.from({ length: long.problems * long.points * long.channels }, (_, index) => Math.sin(index * index))

/** Time in ms until the promise settles. */
async function settled(promise: Promise<unknown>): Promise<number> {
  const begin = performance.now()
  await promise.catch(() => undefined)
  return performance.now() - begin
}

describe('a call that runs off the JS thread', () => {
  it('leaves the event loop alone', async () => {
    let ticks = 0
    const timer = setInterval(() => ticks++, 5)
    const begin = performance.now()
    await kmeans(values, { ...long, problems: 16, iterations: 40 })
    clearInterval(timer)
    const elapsed = performance.now() - begin
    assert.ok(elapsed > 50, `too short to tell: ${elapsed} ms`)
    assert.ok(ticks > elapsed / 5 / 4, `${ticks} ticks of 5 ms in ${elapsed} ms`) // on cores that others use as well
  })

  it("leaves libuv's threads alone", async () => {
    const stop = new AbortController()
    const calls = Array.from({ length: 6 }, () => kmeans(values, { ...long, threads: 1, signal: stop.signal }))
    const { stat } = await import('node:fs/promises')
    const elapsed = await settled(stat(__filename)) // needs one of the four
    stop.abort()
    await Promise.allSettled(calls)
    assert.ok(elapsed < 1000, `${elapsed} ms for a stat`)
  })

  for (const [what, start] of Object.entries({
    kmeans: (signal: AbortSignal) => kmeans(values, { ...long, signal }),
    'kmeans of one large problem': (signal: AbortSignal) =>
      kmeans(values, { ...long, problems: 1, points: long.problems * long.points, centroids: 4096, signal }),
    encode: (signal: AbortSignal) => {
      const shape = { codec: codec('8c12b'), tokens: values.length / 1024, kvHeads: 8, headDim: 128 }
      return encode(values, { ...shape, tables: new Float32Array(8 * 128 * 4096).map((_, index) => Math.sin(index)), signal })
    },
  }))
    it(`ends within 100 ms of an AbortSignal: ${what}`, async () => {
      const times: number[] = []
      for (const delay of [1, 30, 150]) {
        const stop = new AbortController()
        const reason = new Error('enough')
        const call = start(stop.signal)
        const rejection = assert.rejects(call, (error) => error === reason)
        await sleep(delay)
        stop.abort(reason)
        times.push(await settled(call))
        await rejection
      }
      assert.ok(Math.min(...times) < 100, `took ${times.map(Math.round).join(', ')} ms`) // the best of three: this machine has other work
    })

  it('rejects with an AbortError for abort() without a reason, and does not start for a signal that fired before', async () => {
    const stop = new AbortController()
    const call = kmeans(values, { ...long, signal: stop.signal })
    stop.abort()
    await assert.rejects(call, { name: 'AbortError', code: 20 }) // a DOMException, as of fetch
    await assert.rejects(kmeans(values, { ...long, signal: stop.signal }), { name: 'AbortError' })
    await assert.rejects(kmeans(values, { ...long, signal: AbortSignal.timeout(20) }), { name: 'TimeoutError' })
  })

  it('is not changed by a signal that comes too late', async () => {
    const stop = new AbortController()
    const result = await kmeans(values, { ...short, signal: stop.signal })
    stop.abort()
    assert.ok(result.centroids.length > 0)
  })

  it('reports progress in order, up to the end', async () => {
    const seen: KmeansProgress[] = []
    await kmeans(values, { ...long, iterations: 40, problems: 3, onProgress: (progress) => seen.push(progress) })
    assert.ok(seen.length >= 1)
    for (const [index, { done, total, problem, iteration }] of seen.entries()) {
      assert.ok(done >= (seen[index - 1]?.done ?? 0) && done <= total)
      assert.ok(problem >= 0 && problem < 3 && iteration >= 0 && iteration <= 40)
    }
    assert.equal(seen.at(-1)?.done, seen.at(-1)?.total)
  })

  it('is stopped and rejected by what onProgress throws', async () => {
    for (const error of [new Error('no more'), Object.freeze(new Error('no more')), 'no more', undefined, null, 0, Symbol('no more')]) {
      const onProgress = (): never => {
        throw error as Error // that people throw
      }
      const thrown: unknown = await kmeans(values, { ...long, onProgress }).then(() => 'nothing', (reason: unknown) => reason)
      assert.equal(thrown, error)
    }
  })

  it('runs beside others', async () => {
    const alone = await kmeans(values, { ...short, seed: 3 })
    const stop = new AbortController()
    const stopped = kmeans(values, { ...long, signal: stop.signal })
    const results = await Promise.all(Array.from({ length: 100 }, () => kmeans(values, { ...short, seed: 3 })))
    stop.abort()
    await assert.rejects(stopped, { name: 'AbortError' })
    for (const result of results) assert.deepEqual(result, alone)
  })

  it('rejects when a buffer is transferred away meanwhile', async () => {
    const points = values.slice()
    const stop = new AbortController()
    const call = kmeans(points, { ...long, problems: 8, iterations: 3, signal: stop.signal })
    const taken = structuredClone(points, { transfer: [points.buffer] })
    await assert.rejects(call, { name: 'TypeError', code: 'ERR_COUPLET_INVALID_ARGUMENT', message: /`points`.* detached/ })
    assert.equal(taken.length, values.length)
  })

  it('keeps its arrays when nobody else does', function () {
    this.timeout(60000)
    const { stdout, status, stderr } = child(
      `const { kmeans } = load()
       const points = () => Float32Array.from({ length: 1 << 20 }, (_, i) => i % 97)
       const calls = Array.from({ length: 4 }, () => kmeans(points(), { problems: 4, points: 1 << 15, channels: 8, centroids: 64, iterations: 5, seed: 1 }))
       const garbage = setInterval(() => { gc(); points() }, 1)
       Promise.all(calls).then((results) => {
         clearInterval(garbage)
         console.log(results.every(({ centroids }) => centroids.every((value, i) => value === results[0].centroids[i])))
       })`,
      ['--expose-gc'],
    )
    assert.deepEqual([stdout.trim(), status], ['true', 0], stderr)
  })
})

const setUp = `require(${JSON.stringify(require.resolve('tsx/cjs'))})
const load = () => require(${JSON.stringify(join(__dirname, '..', '..', 'lib', 'index.ts'))})
const long = ${JSON.stringify(long)}
const longCall = (options) => load().kmeans(new Float32Array(long.problems * long.points * long.channels).map((_, i) => Math.sin(i * i)), { ...long, ...options })
`

function child(code: string, flags: string[] = []): { stdout: string; stderr: string; status: number | null; elapsed: number } {
  const begin = performance.now()
  const { stdout, stderr, status } = spawnSync(process.execPath, [...flags, '-e', setUp + code], { encoding: 'utf8', timeout: 50000 })
  return { stdout, stderr, status, elapsed: performance.now() - begin }
}

describe('a process that ends in mid-call', () => {
  it('ends at once by process.exit', function () {
    this.timeout(60000)
    const { status, stderr } = child('longCall(); setTimeout(() => process.exit(0), 100)')
    assert.equal(status, 0, stderr)
  })

  it('ends by an uncaught exception with its status', function () {
    this.timeout(60000)
    const { status, stderr } = child('longCall(); setTimeout(() => { throw new Error("planned") }, 100)')
    assert.equal(status, 1)
    assert.match(stderr, /planned/)
  })

  it('waits for a call that nobody stops, like for any promise that works', function () {
    this.timeout(60000)
    const { stdout, status, stderr } = child('longCall({ problems: 2, iterations: 3 }).then(() => console.log("done"))')
    assert.deepEqual([stdout.trim(), status], ['done', 0], stderr)
  })

  it('does not wait for a call that is over', function () {
    this.timeout(60000)
    const { status, stderr } = child('longCall({ signal: AbortSignal.timeout(50) }).catch(() => {})')
    assert.equal(status, 0, stderr)
  })
})

describe('worker_threads', () => {
  const start = (code: string): Worker => new Worker(setUp + code, { eval: true })
  const message = (worker: Worker): Promise<unknown> =>
    new Promise((resolve, reject) => {
      worker.once('message', resolve)
      worker.once('error', reject)
    })

  it('load couplet each for itself and run at the same time', async function () {
    this.timeout(60000)
    const workers = Array.from({ length: 3 }, () =>
      start('longCall({ problems: 2, iterations: 3 }).then(({ inertia }) => require("node:worker_threads").parentPort.postMessage(inertia))'),
    )
    const [first, ...others] = await Promise.all(workers.map(message))
    for (const other of others) assert.deepEqual(other, first)
    await Promise.all(workers.map((worker) => worker.terminate()))
  })

  it('are terminated in mid-call, soon, and others go on', async function () {
    this.timeout(60000)
    const code = 'longCall({ onProgress: () => {} }); require("node:worker_threads").parentPort.postMessage("started")'
    const times: number[] = []
    for (let round = 0; round < 3; round++) {
      const worker = start(code)
      await message(worker)
      await sleep(50)
      times.push(await settled(worker.terminate()))
    }
    assert.ok(Math.min(...times) < 500, `took ${times.map(Math.round).join(', ')} ms`)
    await kmeans(values, short)
  })

  it('end in mid-call with the process, which ends well', function () {
    this.timeout(60000)
    const inner = JSON.stringify(`${setUp}longCall(); require("node:worker_threads").parentPort.postMessage(1)`)
    const outer = `const { Worker } = require('node:worker_threads')
      for (let i = 0; i < 3; i++) new Worker(${inner}, { eval: true }).on('message', () => setTimeout(() => process.exit(0), 50))`
    const { status, stderr } = child(outer)
    assert.equal(status, 0, stderr)
  })

  it('may be the only ones that load the addon, one after another', function () {
    this.timeout(60000)
    const inner = JSON.stringify(`${setUp}longCall({ problems: 1, iterations: 1 })`)
    const outer = `const { Worker } = require('node:worker_threads')
      const run = (left) => left && new Worker(${inner}, { eval: true }).on('exit', (code) => { if (code) process.exit(code); run(left - 1) })
      run(3)`
    const { status, stderr } = child(outer)
    assert.equal(status, 0, stderr)
  })
})

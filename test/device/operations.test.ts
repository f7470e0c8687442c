// Operations on memory of a device, and what they leave behind when they fail; the operations' own tests run on every device as well.
import assert from 'node:assert/strict'
import { join } from 'node:path'
import { Worker } from 'node:worker_threads'

import fc from 'fast-check'

import { calibrate, codec, codesBytes, decodeSync, DeviceBuffer, encodeSync, float16FromFloat32, float32FromFloat16, PreparedTables } from '../../lib'
import type { DeviceName } from '../../lib'
import { noise } from '../codebook/samples'
import { child } from './child'
import { describeOn, gpus, operationsOn } from './devices'

const shape = { codec: codec('8c4b'), tokens: 70, kvHeads: 2, headDim: 32 }
const rows = noise(70 * 64, 1)
const tables = noise(64 * 16, 2)
const codes = encodeSync(rows, { ...shape, tables })

const shapes = fc
  .record({
    codec: fc.constantFrom('1c2b', '2c4b', '4c6b', '8c8b', '8c5b', '16c3b').map((name) => codec(name)),
    tokens: fc.integer({ min: 1, max: 60 }),
    firstToken: fc.nat(70),
    kvHeads: fc.integer({ min: 1, max: 2 }),
    pageTokens: fc.constantFrom(8, 24, 64),
    seed: fc.nat(),
    onDevice: fc.tuple(fc.boolean(), fc.boolean(), fc.boolean()),
  })
  .map((one) => ({ ...one, headDim: 16 }))

describeOn('all', 'encode and decode in memory of the device', (device) => {
  const { decode, encode } = operationsOn(device)
  const place = async (array: Float32Array | Uint8Array, there: boolean) => (there ? DeviceBuffer.from(array, { device }) : array)
  const back = async (place: Float32Array | Uint8Array | DeviceBuffer) =>
    place instanceof DeviceBuffer ? place.read(Uint8Array) : new Uint8Array(place.buffer, place.byteOffset, place.byteLength)

  it('give what they give on the CPU, wherever rows, codes and tables are', async () => {
    await fc.assert(
      fc.asyncProperty(shapes, async ({ seed, onDevice: [rowsThere, codesThere, tablesThere], ...one }) => {
        const width = one.kvHeads * one.headDim
        const values = noise(one.tokens * width, seed)
        const centroids = noise(width * one.codec.centroids, seed + 1)
        const before = Uint8Array.from(noise(codesBytes({ ...one, tokens: one.firstToken + one.tokens }), seed + 2), (value) => value * 100)
        const expected = encodeSync(values, { ...one, tables: centroids, out: before.slice() })
        const given = tablesThere ? await PreparedTables.prepare(centroids, { ...one, device }) : centroids
        const input = await place(values, rowsThere)
        const packed = (await place(before.slice(), codesThere)) as Uint8Array | DeviceBuffer
        assert.equal(await encode(input as Float32Array, { ...one, tables: given, out: packed }), packed)
        assert.deepEqual(await back(packed), expected)
        const out = await place(new Float32Array(values.length), rowsThere)
        await decode(packed, { ...one, tables: given, out: out as Float32Array })
        assert.deepEqual(await back(out), new Uint8Array(decodeSync(expected, { ...one, tables: centroids }).buffer))
        for (const held of [given, input, packed, out]) if ('dispose' in held) held.dispose()
      }),
      { numRuns: 30 },
    )
  })

  it('work where the memory is, unless told', async () => {
    using buffer = DeviceBuffer.fromSync(rows, { device })
    const { encode: anywhere } = operationsOn(undefined as never)
    assert.deepEqual(await anywhere(buffer, { ...shape, tables }), codes)
    assert.deepEqual(await anywhere({ address: buffer.address, bytes: buffer.bytes }, { ...shape, tables, device }), codes)
    const other = device === 'cpu' ? gpus[0] : 'cpu'
    if (other) await assert.rejects(anywhere(buffer, { ...shape, tables, device: other }), { name: 'RangeError', message: /on device 0 of .* for `rows`/ })
  })

  it('read the element type that is stated', async () => {
    const halves = float16FromFloat32(rows)
    using buffer = DeviceBuffer.fromSync(halves, { device })
    assert.deepEqual(await encode(buffer, { ...shape, tables, dtype: 'float16' }), codes)
    assert.deepEqual(await encode({ address: buffer.address, bytes: buffer.bytes, dtype: 'float16' }, { ...shape, tables }), codes)
    using out = DeviceBuffer.allocateSync({ bytes: halves.byteLength, device })
    await decode(codes, { ...shape, tables, dtype: 'float16', out })
    assert.deepEqual(float32FromFloat16(out.readSync(Uint16Array)), decodeSync(codes, { ...shape, tables }))
  })
})

describeOn('gpus', 'on a GPU', (device) => {
  const { decode, encode, kmeans, kmeansSync } = operationsOn(device)

  it('encode and decode know bfloat16', async () => {
    const bits = new Uint16Array(rows.length).map((_, index) => new Uint16Array(rows.buffer)[2 * index + 1] ?? 0) // cut off
    const same = new Float32Array(Uint32Array.from(bits, (bit) => bit << 16).buffer)
    const expected = encodeSync(same, { ...shape, tables })
    assert.deepEqual(await encode(bits, { ...shape, tables, dtype: 'bfloat16' }), expected)
    const decoded = await decode(expected, { ...shape, tables: same.subarray(0, tables.length), dtype: 'bfloat16' })
    assert.ok(decoded instanceof Uint16Array)
    const widened = new Float32Array(Uint32Array.from(decoded, (bit) => bit << 16).buffer)
    assert.deepEqual(widened, decodeSync(expected, { ...shape, tables: same.subarray(0, tables.length) }))
    assert.throws(() => encodeSync(bits, { ...shape, tables, dtype: 'bfloat16' }), { code: 'ERR_COUPLET_UNSUPPORTED', message: /CPU/ })
  })

  it('kmeans gives the same from memory of the device', async () => {
    const batch = { problems: 3, points: 60, channels: 4, centroids: 8, assignments: true }
    const points = noise(3 * 60 * 4, 3)
    const weights = noise(60, 4).map(Math.abs)
    const expected = kmeansSync(points, { ...batch, weights })
    const on = { points: DeviceBuffer.fromSync(points, { device }), weights: DeviceBuffer.fromSync(weights, { device }) }
    using out = DeviceBuffer.allocateSync({ bytes: expected.centroids.byteLength, device })
    const { centroids, ...rest } = await kmeans(on.points, { ...batch, weights: on.weights, out, stream: 0n })
    assert.equal(centroids, out)
    assert.deepEqual({ centroids: out.readSync(Float32Array), ...rest }, expected)
    assert.deepEqual(await kmeans(on.points, { ...batch, weights }), expected)
    assert.deepEqual(await kmeans(points, { ...batch, weights: on.weights }), expected)
    const inertia = operationsOn('cpu').kmeansSync(points, { ...batch, weights }).inertia
    for (const [index, value] of expected.inertia.entries()) assert.ok(value < (inertia[index] ?? NaN) * 1.5, `${value} against ${inertia[index]} of the CPU`)
    on.points.dispose()
    on.weights.dispose()
  })

  it('a call with a stream only enqueues', async () => {
    using prepared = await PreparedTables.prepare(tables, { ...shape, device })
    using input = await DeviceBuffer.from(rows, { device })
    using packed = await DeviceBuffer.from(new Uint8Array(codes.length), { device })
    using out = await DeviceBuffer.allocate({ bytes: rows.byteLength, device })
    const call = { ...shape, tables: prepared, stream: 0n }
    await encode(input, { ...call, out: packed })
    await decode(packed, { ...call, out })
    assert.deepEqual(await packed.read(Uint8Array, { stream: 0n }), codes)
    assert.deepEqual(await out.read(Float32Array, { stream: 0n }), decodeSync(codes, { ...shape, tables }))
    const message = /as the call has a `stream`/
    await assert.rejects(encode(rows, { ...call, out: packed }), { name: 'TypeError', message })
    await assert.rejects(encode(input, call), { name: 'TypeError', message })
    await assert.rejects(encode(input, { ...call, tables, out: packed }), { name: 'TypeError', message })
  })

  it('tables that are prepared keep to their shape', async () => {
    using prepared = PreparedTables.prepareSync(tables, { ...shape, device })
    assert.deepEqual([prepared.device, prepared.deviceIndex, prepared.codec.name], [device, 0, 'cq-8c4b'])
    assert.ok(prepared.bytes >= tables.byteLength)
    await assert.rejects(encode(rows, { ...shape, codec: '4c4b', tables: prepared }), { name: 'RangeError', message: /codec/ })
    await assert.rejects(PreparedTables.prepare(tables.map(() => NaN), { ...shape, device }), { code: 'ERR_COUPLET_NOT_FINITE' })
    prepared.dispose()
    await assert.rejects(encode(rows, { ...shape, tables: prepared }), { code: 'ERR_COUPLET_DISPOSED', message: 'This PreparedTables has been disposed' })
  })

  it('kmeans tells its progress, and ends when it is told to', async () => {
    // Long enough to be stopped: 30 ms of a GPU.
    const size = device === 'cuda' ? { problems: 132, points: 16384, centroids: 256 } : { problems: 20, points: 200, centroids: 16 }
    const batch = { ...size, channels: 8, tolerance: 0 }
    const points = noise(batch.problems * batch.points * 8, 5)
    const reason = new Error('enough')
    const stop = new AbortController()
    const call = kmeans(points, { ...batch, signal: stop.signal })
    setTimeout(() => { stop.abort(reason) }, 5)
    await assert.rejects(call, (error) => error === reason)
    let last = { done: 0, total: 1 }
    await kmeans(points, { ...batch, problems: 1, onProgress: (progress) => { last = progress } })
    assert.equal(last.done, last.total)
    await assert.rejects(kmeans(points, { ...batch, problems: 1, signal: AbortSignal.abort() }), { name: 'AbortError' })
  })

  it('encode ends when it is told to', async () => {
    const one = { codec: codec('8c6b'), tokens: device === 'cuda' ? 2_000_000 : 100_000, kvHeads: 1, headDim: 64 } // slices of 65,536 tokens
    const stop = new AbortController()
    const call = encode(new Float32Array(one.tokens * 64), { ...one, tables: noise(64 * 64, 6), signal: stop.signal })
    setTimeout(() => { stop.abort() }, 5)
    await assert.rejects(call, { name: 'AbortError' })
    assert.deepEqual(await encode(rows, { ...shape, tables }), codes)
  })

  it('calibrate learns centroids there', async () => {
    const text = Array.from({ length: 96 }, (_, index) => (index * 37) % 90 + 32)
    const options = { model: join(__dirname, '../../models/tiny-llama-bytes'), text, codec: 'cq-8c2b', weights: 'attention' as const, iterations: 3 }
    using theirs = (await calibrate({ ...options, device })).codebook
    using ours = (await calibrate(options)).codebook
    assert.deepEqual(theirs.metadata, ours.metadata)
    for (let layer = 0; layer < ours.layers; layer++) {
      const table = theirs.keyTable(layer)
      assert.ok(table.every(Number.isFinite) && table.some((value) => value !== 0))
      assert.equal(table.length, ours.keyTable(layer).length)
    }
  })

  it('worker_threads work side by side, and end in mid-call', async function () {
    this.timeout(60_000)
    const code = `require(${JSON.stringify(require.resolve('tsx/cjs'))})
      const { kmeans } = require(${JSON.stringify(require.resolve('../../lib/index.ts'))})
      const { parentPort, workerData } = require('node:worker_threads')
      const points = Float32Array.from({ length: 4 * 100 * 4 }, (_, i) => Math.sin(i * i))
      const run = (problems) => kmeans(points, { problems, points: 100, channels: 4, centroids: 8, device: workerData })
      run(4).then(({ inertia }) => { parentPort.postMessage(inertia); return run(4) })`
    const workers = Array.from({ length: 3 }, () => new Worker(code, { eval: true, workerData: device }))
    const results = await Promise.all(workers.map((worker) => new Promise((resolve, reject) => {
      worker.once('message', resolve)
      worker.once('error', reject)
    })))
    await Promise.all(workers.map((worker) => worker.terminate()))
    for (const result of results) assert.deepEqual(result, results[0])
    assert.deepEqual(await encode(rows, { ...shape, tables }), codes)
  })
})

describe('auto', () => {
  it('is cuda where it can be had, and the CPU where it cannot', async () => {
    const device: DeviceName = 'auto'
    using buffer = await DeviceBuffer.from(rows, { device })
    assert.equal(buffer.device, gpus.includes('cuda') ? 'cuda' : 'cpu')
    assert.deepEqual(encodeSync(rows, { ...shape, tables, device }), codes)
  })
})

describe('the simulator, as other machines are', () => {
  before(function () {
    if (!gpus.includes('sim' as DeviceName)) this.skip()
    this.timeout(60_000)
  })
  const run = (code: string, env: Record<string, string>) => {
    const { status, stderr } = child(`
      const shape = { codec: '8c4b', tokens: 70, kvHeads: 2, headDim: 32 }
      const rows = noise(70 * 64, 1)
      const tables = noise(64 * 16, 2)
      const expected = couplet.encodeSync(rows, { ...shape, tables })
      const { DeviceBuffer, encode, encodeSync, kmeans } = couplet
      ${code}`, env)
    assert.equal(status, 0, stderr)
  }

  it('two devices: each has its own memory', () => {
    run(`const buffers = [0, 1].map((deviceIndex) => DeviceBuffer.fromSync(rows, { device, deviceIndex }))
      for (const [deviceIndex, buffer] of buffers.entries()) {
        assert.equal(buffer.deviceIndex, deviceIndex)
        assert.deepEqual(await encode(buffer, { ...shape, tables }), expected)
        assert.deepEqual(await encode(rows, { ...shape, tables, device, deviceIndex }), expected)
        await assert.rejects(encode(buffer, { ...shape, tables, device, deviceIndex: 1 - deviceIndex }), { message: /on device . of sim for .rows. but/ })
      }
      const both = await Promise.all([0, 1, 0, 1].map((deviceIndex) => kmeans(rows, { problems: 2, points: 100, channels: 8, centroids: 4, device, deviceIndex })))
      for (const one of both) assert.deepEqual(one, both[0])
      await assert.rejects(encode(rows, { ...shape, tables, device, deviceIndex: 2 }), { name: 'RangeError', message: /0 to 1 for .deviceIndex. but received 2/ })`,
    { COUPLET_SIM_DEVICES: '2' })
  })

  it('memory exhausted: said so, and freed', () => {
    run(`for (let round = 0; round < 3; round++) {
        await assert.rejects(kmeans(new Float32Array(1 << 18), { problems: 1, points: 1 << 15, channels: 8, centroids: 4, device }),
          { code: 'ERR_COUPLET_OUT_OF_MEMORY', message: /no memory for \\d+ bytes on device 0 of sim/ })
        const held = DeviceBuffer.allocateSync({ bytes: 300_000, device })
        await assert.rejects(DeviceBuffer.allocate({ bytes: 300_000, device }), { code: 'ERR_COUPLET_OUT_OF_MEMORY' })
        held.dispose()
        assert.deepEqual(await encode(rows, { ...shape, tables, device }), expected)
      }`, { COUPLET_SIM_MEMORY: String(1 << 19) })
  })

  it('a device that is lost: said so from then on, and the CPU goes on', () => {
    run(`const buffer = DeviceBuffer.fromSync(rows, { device })
      const lost = { code: 'ERR_COUPLET_DEVICE', nativeCode: 719 }
      await assert.rejects(encode(rows, { ...shape, tables, device }), { ...lost, message: /cudaErrorLaunchFailure.*lost/s })
      for (let round = 0; round < 2; round++) {
        await assert.rejects(encode(rows, { ...shape, tables, device }), { ...lost, message: /Device 0 is lost since it reported cudaErrorLaunchFailure/ })
        await assert.rejects(buffer.read(Float32Array), lost)
        assert.throws(() => DeviceBuffer.allocateSync({ bytes: 8, device }), lost)
      }
      buffer.dispose()
      assert.deepEqual(encodeSync(rows, { ...shape, tables }), expected)`, { COUPLET_SIM_BREAK: '1' })
  })

  it('none: the reason', () => {
    run('await assert.rejects(encode(rows, { ...shape, tables, device }), { code: \'ERR_COUPLET_BACKEND_UNAVAILABLE\', message: /no device/ })',
      { COUPLET_SIM_DEVICES: '0' })
  })
})

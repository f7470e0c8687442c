/** Caches on a GPU: rows of the host and of the device, streams, element types, copies between devices, and what can go wrong. */
import assert from 'node:assert/strict'
import { once } from 'node:events'
import { join } from 'node:path'
import { Worker } from 'node:worker_threads'

import type { CacheOptions, CacheRows, Sequence } from '../../lib'
import { Cache, Codebook, DeviceBuffer, float16FromFloat32, float32FromFloat16 } from '../../lib'
import type { LayerInput } from '../cache/model'
import { codebook, keyCodec, newTokens, random, rotary, rows, shape, valueCodec } from '../cache/model'
import { child } from './child'
import { describeOn } from './devices'

const next = random(11)
const options: CacheOptions = { ...shape, codebook, rotary, sinks: 4, window: 8, threads: 1 }
const tolerance = 4e-3 // of values up to 2 in size: a prefill multiplies with the 10 bits of tf32
const defaultStream = 1n // cudaStreamLegacy

function append(sequence: Sequence, inputs: readonly LayerInput[], tokens: number): void {
  const step = sequence.cache.begin([{ sequence, tokens }])
  inputs.forEach((input, layer) => step.appendSync(layer, [input]))
  step.commit()
}

function assertClose(received: Float32Array, expected: Float32Array, most = tolerance): void {
  assert.equal(received.length, expected.length)
  const worst = received.reduce((worst, value, index) => Math.max(worst, Math.abs(value - expected[index]!)), 0)
  assert.ok(worst <= most, `differs by ${worst}`)
}

/** What 40 tokens and then one more give in every layer, by way of whatever `place` makes of rows and results. */
async function outputsOf(cache: Cache, inputs: readonly LayerInput[][], place: Place, sequence = cache.sequence()): Promise<Float32Array[]> {
  const results: Float32Array[] = []
  for (const input of inputs) {
    const tokens = input[0]!.keys.length / 64
    const step = cache.begin([{ sequence, tokens }])
    const outs: CacheRows[] = []
    for (const [layer, row] of input.entries()) {
      const [out] = await step.attend(layer, [await place.row(row)], { dtype: place.dtype, outDtype: place.dtype, stream: place.stream })
      outs.push(out!)
    }
    step.commit()
    for (const out of outs) results.push(await place.read(out))
  }
  return results
}

interface Place<Row extends CacheRows = CacheRows> {
  row(input: LayerInput): Promise<{ queries: Row; keys: Row; values: Row; out?: Row | undefined }>
  read(out: CacheRows): Promise<Float32Array>
  dtype?: 'float32' | 'float16'
  stream?: bigint
}

const onHost: Place = { row: (input) => Promise.resolve(input), read: (out) => Promise.resolve(out as Float32Array) }

describeOn('gpus', 'Cache', (device) => {
  const toDevice = (array: Float32Array | Uint16Array): Promise<DeviceBuffer> => DeviceBuffer.from(array, { device })
  const onDevice = {
    row: async ({ queries, keys, values }: LayerInput) => ({
      queries: await toDevice(queries), keys: await toDevice(keys), values: await toDevice(values), out: await toDevice(new Float32Array(queries.length)),
    }),
    read: (out: CacheRows) => (out as DeviceBuffer).read(Float32Array),
  }
  const atAddress: Place = {
    row: async (input) => {
      const { queries, keys, values, out } = await onDevice.row(input)
      const at = (buffer: DeviceBuffer) => ({ address: buffer.address, bytes: buffer.bytes, buffer })
      return { queries: at(queries), keys: at(keys), values: at(values), out: at(out) }
    },
    read: (out) => (out as unknown as { buffer: DeviceBuffer }).buffer.read(Float32Array),
  }
  const bitsOf = ({ queries, keys, values }: LayerInput) => ({
    queries: float16FromFloat32(queries), keys: float16FromFloat32(keys), values: float16FromFloat32(values),
  })
  const halves: Place = {
    row: (input) => Promise.resolve(bitsOf(input)),
    read: (out) => Promise.resolve(float32FromFloat16(out as Uint16Array)),
    dtype: 'float16',
  }
  const halvesOnDevice: Place = {
    row: async (input) => {
      const { queries, keys, values } = bitsOf(input)
      return {
        queries: await toDevice(queries), keys: await toDevice(keys), values: await toDevice(values), out: await toDevice(new Uint16Array(queries.length)),
      }
    },
    read: async (out) => float32FromFloat16(await (out as DeviceBuffer).read(Uint16Array)),
    dtype: 'float16',
  }

  const places: [string, Place][] = [
    ['arrays', onHost], ['memory of the device', onDevice], ['addresses', atAddress], ['arrays of float16', halves],
    ['float16 in memory of the device', halvesOnDevice], ['arrays and a stream', { ...onHost, stream: defaultStream }],
    ['memory of the device and a stream', { ...onDevice, stream: defaultStream }],
  ]
  for (const [what, place] of places)
    it(`gives what the CPU gives, with ${what}`, async () => {
      const inputs = [newTokens(40, next), newTokens(1, next), newTokens(1, next)]
      using cpu = new Cache(options)
      using cache = new Cache({ ...options, device })
      assert.deepEqual({ device: cache.device, deviceIndex: cache.deviceIndex }, { device, deviceIndex: 0 })
      const sequences = [cpu.sequence(), cache.sequence()] as const
      const expected = await outputsOf(cpu, inputs, onHost, sequences[0])
      const received = await outputsOf(cache, inputs, place, sequences[1])
      received.forEach((output, index) => { assertClose(output, expected[index]!) })
      const own = { bookkeepingBytes: 0, codebookBytes: 0, bitsPerChannel: 0 } // of each backend
      assert.deepEqual({ ...cache.statistics(), ...own }, { ...cpu.statistics(), ...own })
      assert.deepEqual(sequences.map(({ length }) => length), [42, 42]) // a sequence that is garbage is in no statistics
    })

  it('mixes arrays and memory of the device between inputs and outputs', async () => {
    const [input] = newTokens(3, next)
    using cpu = new Cache({ ...options, layers: 1, codebook: undefined, window: Infinity })
    using cache = new Cache({ ...options, layers: 1, codebook: undefined, window: Infinity, device })
    const expected = cpu.begin([{ sequence: cpu.sequence(), tokens: 3 }]).attendSync(0, [input!])[0]!
    const { queries, keys, values } = await onDevice.row(input!)
    const [array] = await cache.begin([{ sequence: cache.sequence(), tokens: 3 }]).attend(0, [{ queries, keys, values }])
    assertClose(array!, expected)
    using out = await toDevice(new Float32Array(expected.length))
    const [same] = await cache.begin([{ sequence: cache.sequence(), tokens: 3 }]).attend(0, [{ ...input!, out }])
    assert.equal(same, out)
    assertClose(await out.read(Float32Array), expected)
  })

  it('refuses rows of two kinds, short memory, memory of another device and an overlap', async () => {
    const invalid = { code: 'ERR_COUPLET_INVALID_ARGUMENT' }
    using cache = new Cache({ ...options, device })
    const [input] = newTokens(2, next)
    const row = await onDevice.row(input!)
    const step = cache.begin([{ sequence: cache.sequence(), tokens: 2 }])
    using short = await DeviceBuffer.allocate({ bytes: 100, device })
    using elsewhere = await DeviceBuffer.from(input!.keys)
    await assert.rejects(step.attend<CacheRows>(0, [{ ...row, keys: input!.keys }]), { ...invalid, message: /same kind of memory as for/ })
    await assert.rejects(step.attend(0, [{ ...row, keys: short }]), { ...invalid, message: /512 or more bytes for `keys`/ })
    await assert.rejects(step.attend(0, [{ ...row, keys: elsewhere }]), { ...invalid, message: /memory of device 0 of .* for `keys`/ })
    await assert.rejects(step.attend(0, [{ ...row, out: row.queries }]), { ...invalid, message: /shares no memory/ })
    await assert.rejects(step.attend(0, [{ ...row, out: { address: 0n, bytes: 4096 } }]), { ...invalid, message: /address/ })
    await assert.rejects(step.attend(0, [row], { dtype: 'float64' as never }), { ...invalid, message: /`dtype`/ })
    const gone = await toDevice(input!.keys)
    gone.dispose()
    await assert.rejects(step.attend(0, [{ ...row, keys: gone }]), { code: 'ERR_COUPLET_DISPOSED' })
    await step.attend(0, [row]) // nothing was lost
  })

  for (const [what, place] of [['arrays', onHost], ['memory of the device', onDevice]] as const)
    it(`refuses a NaN in ${what}, and leaves the sequence as it was`, async () => {
      using cache = new Cache({ ...options, device })
      const sequence = cache.sequence()
      append(sequence, newTokens(3, next), 3)
      for (const token of [0, 20, 39]) {
        const step = cache.begin([{ sequence, tokens: 40 }])
        const bad = newTokens(40, next)[1]!
        bad.values[token * 64 + 32 + 5] = NaN
        await assert.rejects(step.attend(1, [await place.row(bad)]), {
          name: 'RangeError', code: 'ERR_COUPLET_NOT_FINITE', layer: 1, kvHead: 1, token: 3 + token, channel: 5, message: /finite values/,
        })
        assert.throws(() => step.commit(), { code: 'ERR_COUPLET_INVALID_ARGUMENT', message: /abort the step/ })
        step.abort()
      }
      append(sequence, newTokens(1, next), 1)
      assert.equal(sequence.length, 4)
    })

  it('tells of a NaN in what a stream was given when the step synchronizes or commits', async () => {
    using cache = new Cache({ ...options, device })
    const sequence = cache.sequence()
    for (const how of ['commit', 'synchronize'] as const) {
      const inputs = newTokens(40, next)
      inputs[0]!.keys[39 * 64] = Infinity
      const step = cache.begin([{ sequence, tokens: 40 }])
      for (const [layer, input] of inputs.entries()) await step.attend(layer, [await onDevice.row(input)], { stream: defaultStream })
      const expected = { code: 'ERR_COUPLET_NOT_FINITE', layer: 0, kvHead: 0, token: 39, channel: 0 }
      if (how === 'commit') assert.throws(() => step.commit(), expected)
      else await assert.rejects(step.synchronize(), expected)
      step.abort()
      assert.equal(sequence.length, 0)
    }
  })

  it('does not block the event loop', async () => {
    using cache = new Cache({ ...options, device })
    const [input] = newTokens(200, next)
    const step = cache.begin([{ sequence: cache.sequence(), tokens: 200 }])
    let turns = 0
    let done = false
    const attending = step.attend(0, [input!]).then(() => { done = true })
    while (!done) {
      await new Promise(setImmediate)
      turns++
    }
    await attending
    assert.ok(turns > 1)
  })

  it('copies a sequence between devices, byte for byte', async () => {
    const inputs = newTokens(150, next)
    const probe = newTokens(1, next)
    const after = (sequence: Sequence): Float32Array => {
      using step = sequence.cache.begin([{ sequence, tokens: 1 }])
      return step.attendSync(1, [probe[1]!])[0]!
    }
    using cpu = new Cache(options)
    using there = new Cache({ ...options, device })
    using back = new Cache(options)
    const original = cpu.sequence()
    append(original, inputs, 150)
    const expected = after(original)
    const copy = await original.copyTo(there)
    assert.equal(copy.cache, there)
    assert.equal(copy.length, 150)
    assertClose(after(copy), expected)
    assert.deepEqual(after(copy.copyToSync(back)), expected)
    assert.deepEqual(back.statistics().pageBytes, cpu.statistics().pageBytes)
    append(original, newTokens(1, next), 1)
    assert.equal(copy.length, 150)
  })

  it('refuses to copy a sequence where it would mean something else, or does not fit', async () => {
    using cpu = new Cache(options)
    const sequence = cpu.sequence()
    append(sequence, newTokens(150, next), 150)
    const tables = (centroids: number) => Array.from({ length: 2 }, () => rows(64 * centroids, next))
    using other = Codebook.fromTables({ keyTables: tables(8), valueTables: tables(32), keyCodec, valueCodec, kvHeads: 2, headDim: 32 })
    const mismatch = { code: 'ERR_COUPLET_CODEBOOK_MISMATCH' }
    await assert.rejects(sequence.copyTo(new Cache({ ...options, codebook: other, device })), mismatch)
    await assert.rejects(sequence.copyTo(new Cache({ ...options, window: 9, device })), mismatch)
    await assert.rejects(sequence.copyTo({} as Cache), { code: 'ERR_COUPLET_INVALID_ARGUMENT' })
    using small = new Cache({ ...options, memory: 20_000, device })
    await assert.rejects(sequence.copyTo(small), { code: 'ERR_COUPLET_CACHE_FULL' })
    assert.equal(small.statistics().sequences, 0)
    const step = cpu.begin([{ sequence, tokens: 1 }])
    await assert.rejects(sequence.copyTo(new Cache({ ...options, device })), { code: 'ERR_COUPLET_BUSY' })
    step.abort()
    // The same centroids in another object.
    const [keyTables, valueTables] = [[0, 1].map((layer) => codebook.keyTable(layer)), [0, 1].map((layer) => codebook.valueTable(layer))]
    using equal = Codebook.fromTables({ keyTables, valueTables, keyCodec, valueCodec, kvHeads: 2, headDim: 32 })
    assert.equal((await sequence.copyTo(new Cache({ ...options, codebook: equal, device }))).length, 150)
  })

  it('works in worker_threads at the same time, with the same results', async () => {
    const body = `
      require('tsx/cjs')
      const { parentPort } = require('node:worker_threads')
      const { Cache } = require(${JSON.stringify(join(__dirname, '../../lib/cache.ts'))})
      const model = require(${JSON.stringify(join(__dirname, '../cache/model.ts'))})
      const cache = new Cache({ ...model.shape, codebook: model.codebook, rotary: model.rotary, device: ${JSON.stringify(device)} })
      const step = cache.begin([{ sequence: cache.sequence(), tokens: 30 }])
      const attend = async () => {
        const results = []
        for (const [layer, input] of model.newTokens(30, model.random(3)).entries()) results.push((await step.attend(layer, [input]))[0])
        step.commit()
        parentPort.postMessage(results)
      }
      attend()
    `
    const workers = [0, 1, 2].map(() => new Worker(body, { eval: true }))
    const results = await Promise.all(workers.map(async (worker) => ((await once(worker, 'message')) as [Float32Array[]])[0]))
    await Promise.all(workers.map((worker) => worker.terminate()))
    assert.deepEqual(results[1], results[0])
    assert.deepEqual(results[2], results[0])
  }).timeout(60_000)
})

describe('Cache and devices', () => {
  it('takes the CPU for auto where there is no CUDA, and refuses an index that is not there', () => {
    using cache = new Cache({ ...options, device: 'auto' })
    assert.ok(['cpu', 'cuda'].includes(cache.device))
    assert.throws(() => new Cache({ ...options, deviceIndex: 1 }), { code: 'ERR_COUPLET_INVALID_ARGUMENT', message: /deviceIndex/ })
  })

  it('takes memory outside of the heap on the CPU, but neither float16 nor a stream', async () => {
    using cache = new Cache(options)
    const [input] = newTokens(2, next)
    const step = cache.begin([{ sequence: cache.sequence(), tokens: 2 }])
    const bits = { queries: float16FromFloat32(input!.queries), keys: float16FromFloat32(input!.keys), values: float16FromFloat32(input!.values) }
    await assert.rejects(step.attend(0, [bits]), { code: 'ERR_COUPLET_UNSUPPORTED', message: /float32/ })
    await assert.rejects(step.attend(0, [input!], { stream: 1n }), { code: 'ERR_COUPLET_INVALID_ARGUMENT', message: /`stream`/ })
    const [expected] = await step.attend(0, [input!])
    const again = cache.begin([{ sequence: cache.sequence(), tokens: 2 }])
    const [queries, keys, values] = [await DeviceBuffer.from(input!.queries), await DeviceBuffer.from(input!.keys), await DeviceBuffer.from(input!.values)]
    assert.deepEqual((await again.attend(0, [{ queries, keys, values }]))[0], expected)
  })
})

describeOn('gpus', 'Cache in a process of its own', (device) => {
  if (device === 'cuda') return // the simulator's variables mean nothing to it
  const prelude = `
    const { Cache } = couplet
    const model = require(${JSON.stringify(join(__dirname, '../cache/model.ts'))})
    const options = { ...model.shape, codebook: model.codebook, rotary: model.rotary, window: 8, device }
    const run = (cache, inputs) => {
      const sequence = cache.sequence()
      const tokens = inputs[0].keys.length / 64
      const step = cache.begin([{ sequence, tokens }])
      const outputs = inputs.map((input, layer) => step.attendSync(layer, [input])[0])
      step.commit()
      return { sequence, outputs }
    }
  `
  const passes = (code: string, env: Record<string, string>): void => {
    const { status, stderr } = child(prelude + code, env)
    assert.equal(status, 0, stderr)
  }

  it('lives on one device of two, beside another on the other', () => {
    passes(`
      const inputs = model.newTokens(40, model.random(5))
      const caches = [0, 1].map((deviceIndex) => new Cache({ ...options, deviceIndex }))
      assert.deepEqual(caches.map((cache) => cache.deviceIndex), [0, 1])
      const [one, other] = caches.map((cache) => run(cache, inputs))
      assert.deepEqual(one.outputs, other.outputs)
      const copy = await one.sequence.copyTo(caches[1])
      assert.equal(copy.length, 40)
      const foreign = await couplet.DeviceBuffer.from(inputs[0].keys, { device, deviceIndex: 1 })
      const step = caches[0].begin([{ sequence: caches[0].sequence(), tokens: 40 }])
      await assert.rejects(step.append(0, [{ keys: foreign, values: foreign }]), /memory of device 0/)
      assert.throws(() => new Cache({ ...options, deviceIndex: 2 }), { code: 'ERR_COUPLET_INVALID_ARGUMENT' })
    `, { COUPLET_SIM_DEVICES: '2' })
  })

  it('says that the device has no memory left, and goes on with what there is', () => {
    passes(`
      const cache = new Cache({ ...options, codebook: undefined, window: Infinity })
      const { sequence } = run(cache, model.newTokens(40, model.random(5)))
      const held = cache.statistics()
      assert.throws(() => cache.begin([{ sequence, tokens: 20000 }]), { code: 'ERR_COUPLET_OUT_OF_MEMORY' })
      assert.equal(cache.statistics().rawBytes, held.rawBytes)
      const step = cache.begin([{ sequence, tokens: 1 }])
      model.newTokens(1, model.random(6)).forEach((input, layer) => step.attendSync(layer, [input]))
      step.commit()
      assert.equal(sequence.length, 41)
    `, { COUPLET_SIM_MEMORY: String(8 << 20) })
  })

  it('says that the device has no memory for the tables', () => {
    passes(`
      const large = new Float32Array(64 * 4096).fill(1)
      const tables = { keyTables: [large], valueTables: [large], keyCodec: 'cq-8c12b', valueCodec: 'cq-8c12b', kvHeads: 2, headDim: 32 }
      const given = { ...options, layers: 1, codebook: couplet.Codebook.fromTables(tables) }
      await assert.rejects(Cache.create(given), { code: 'ERR_COUPLET_OUT_OF_MEMORY' })
      assert.throws(() => new Cache(given), { code: 'ERR_COUPLET_OUT_OF_MEMORY' })
      ;(await Cache.create(options)).dispose()
    `, { COUPLET_SIM_MEMORY: String(1 << 20) })
  })

  it('tells a device that fails, and can still be disposed', () => {
    passes(`
      const cache = new Cache(options)
      const sequence = cache.sequence()
      const step = cache.begin([{ sequence, tokens: 20 }])
      const [input] = model.newTokens(20, model.random(5))
      assert.throws(() => step.attendSync(0, [input]), { code: 'ERR_COUPLET_DEVICE' })
      step.abort()
      assert.equal(sequence.length, 0)
      assert.throws(() => cache.begin([{ sequence, tokens: 1 }]), { code: 'ERR_COUPLET_DEVICE' })
      cache.dispose()
      const healthy = new Cache({ ...options, device: 'cpu' })
      assert.equal(run(healthy, model.newTokens(20, model.random(5))).sequence.length, 20)
    `, { COUPLET_SIM_BREAK: '1' })
  })
})

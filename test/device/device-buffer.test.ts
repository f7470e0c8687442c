import assert from 'node:assert/strict'

import fc from 'fast-check'

import { codec, codesBytes, DeviceBuffer, encode, encodeSync, kmeansSync } from '../../lib'
import { noise } from '../codebook/samples'
import { child } from './child'
import { describeOn, gpus } from './devices'

const shape = { codec: codec('4c4b'), tokens: 40, kvHeads: 2, headDim: 16 }
const rows = noise(40 * 32, 1)
const tables = noise(32 * 16, 2)

describeOn('all', 'DeviceBuffer', (device) => {
  it('holds the bytes of any typed array', async () => {
    const kinds = [Int8Array, Uint8Array, Uint16Array, Int32Array, Float32Array, Float64Array]
    await fc.assert(
      fc.asyncProperty(fc.constantFrom(...kinds), fc.uint8Array({ minLength: 8, maxLength: 300 }), async (kind, bytes) => {
        const array = new kind(bytes.slice(0, bytes.length & ~7).buffer)
        using buffer = await DeviceBuffer.from(array, { device })
        assert.deepEqual([buffer.bytes, buffer.device, buffer.deviceIndex], [array.byteLength, device, 0])
        assert.deepEqual(Buffer.from((await buffer.read(kind as typeof Uint8Array)).buffer), Buffer.from(array.buffer))
        using blocking = DeviceBuffer.fromSync(array, { device })
        assert.deepEqual(Buffer.from(blocking.readSync(kind as typeof Uint8Array).buffer), Buffer.from(array.buffer))
      }),
      { numRuns: 30 },
    )
    const large = new BigUint64Array(3).fill(2n ** 63n)
    using buffer = DeviceBuffer.fromSync(large, { device })
    assert.deepEqual(buffer.readSync(BigUint64Array), large)
  })

  it('is written and read in parts', async () => {
    await fc.assert(
      fc.asyncProperty(fc.nat(99), fc.nat(60), async (offset, length) => {
        using buffer = await DeviceBuffer.from(new Uint8Array(100).fill(7), { device })
        const part = Uint8Array.from({ length }, (_, index) => index)
        const expected = new Uint8Array(100).fill(7)
        if (offset + length > 100) {
          const error = { name: 'RangeError', code: 'ERR_COUPLET_INVALID_ARGUMENT', message: /`offset`/ }
          await assert.rejects(buffer.write(part, { offset }), error)
          assert.throws(() => buffer.readSync(part, { offset }), error)
        } else {
          await buffer.write(part, { offset })
          expected.set(part, offset)
          assert.deepEqual(await buffer.read(new Uint8Array(length), { offset }), part)
          assert.deepEqual(buffer.readSync(Uint8Array, { offset, length }), part)
        }
        assert.deepEqual(buffer.readSync(Uint8Array), expected)
        assert.deepEqual(buffer.readSync(Uint16Array, { offset: 99 }), new Uint16Array(0)) // whole elements
      }),
      { numRuns: 40 },
    )
  })

  it('has an address until it is disposed', async () => {
    const buffer = await DeviceBuffer.from(rows, { device })
    assert.ok(typeof buffer.address === 'bigint' && buffer.address > 0n)
    buffer.dispose()
    buffer.dispose()
    const error = { code: 'ERR_COUPLET_DISPOSED', message: 'This DeviceBuffer has been disposed' }
    assert.throws(() => buffer.address, error)
    assert.throws(() => { buffer.writeSync(rows) }, error)
    await assert.rejects(buffer.read(Float32Array), error)
    await assert.rejects(encode(buffer, { ...shape, tables }), error)
    assert.throws(() => kmeansSync(buffer, { problems: 1, points: 10, channels: 4, centroids: 2 }), error)
    assert.equal(buffer.bytes, rows.byteLength)
  })

  it('may be disposed while a call uses it', async () => {
    const buffer = await DeviceBuffer.from(rows, { device })
    const codes = encode(buffer, { ...shape, tables })
    buffer.dispose()
    assert.deepEqual(await codes, encodeSync(rows, { ...shape, tables }))
  })

  it('says when there is no memory, and all goes on', async () => {
    const error = { code: 'ERR_COUPLET_OUT_OF_MEMORY', message: /no memory for \d+ bytes on device 0/ }
    await assert.rejects(DeviceBuffer.allocate({ bytes: 2 ** 50, device }), error)
    assert.throws(() => DeviceBuffer.allocateSync({ bytes: Number.MAX_SAFE_INTEGER, device }), error)
    using buffer = await DeviceBuffer.allocate({ bytes: codesBytes(shape), device })
    buffer.writeSync(new Uint8Array(buffer.bytes))
    assert.equal(await encode(rows, { ...shape, tables, out: buffer }), buffer)
    assert.deepEqual(await buffer.read(Uint8Array), encodeSync(rows, { ...shape, tables }))
  })

  const buffer = () => DeviceBuffer.allocateSync({ bytes: 8, device })
  const refused: [string, () => unknown, object][] = [
    ['no options', () => DeviceBuffer.allocateSync(undefined as never), { name: 'TypeError', message: /`options`/ }],
    ['no bytes', () => DeviceBuffer.allocateSync({ bytes: 0, device }), { name: 'RangeError', message: /`bytes` but received 0/ }],
    ['half a byte', () => DeviceBuffer.allocateSync({ bytes: 0.5, device }), { name: 'RangeError', message: /`bytes`/ }],
    ['no array', () => DeviceBuffer.fromSync([1, 2] as never, { device }), { name: 'TypeError', message: /typed array for `array` but received an array/ }],
    ['an offset that is none', () => buffer().readSync(Uint8Array, { offset: 1n as never }), { name: 'TypeError', message: /`offset` but received a bigint/ }],
    ['a class of no typed array', () => buffer().readSync(Array as never), { name: 'TypeError', message: /`out` but received a function/ }],
    ['a device of another index', () => DeviceBuffer.allocateSync({ bytes: 8, device, deviceIndex: 99 }), { name: 'RangeError', message: /`deviceIndex`/ }],
    ['a negative index', () => DeviceBuffer.allocateSync({ bytes: 8, device, deviceIndex: -1 }), { name: 'RangeError', message: /`deviceIndex`/ }],
    [
      'a device that nobody knows',
      () => DeviceBuffer.allocateSync({ bytes: 8, device: 'tpu' as never }),
      { message: /"tpu"/ },
    ],
    ['an address of nothing', () => encodeSync({ address: 0n, bytes: 1e6 }, { ...shape, tables, device }), { name: 'RangeError', message: /`address`/ }],
    [
      'an address that is a number',
      () => encodeSync({ address: 5 as never, bytes: 1e6 }, { ...shape, tables, device }),
      { name: 'TypeError', message: /bigint .* `address`/ },
    ],
    ['an address of no device', () => encodeSync({ address: 64n, bytes: 1e6 }, { ...shape, tables }), { name: 'TypeError', message: /`device`/ }],
    [
      'an address between elements',
      () => encodeSync({ address: 66n, bytes: 1e6 }, { ...shape, tables, device }),
      { name: 'RangeError', message: /multiple of 4/ },
    ],
    [
      'too little memory',
      () => encodeSync({ address: 64n, bytes: 5119 }, { ...shape, tables, device }),
      { name: 'RangeError', message: /5120 or more bytes for `rows` but received memory of 5119/ },
    ],
    ['something else', () => encodeSync({ bytes: 5120 } as never, { ...shape, tables, device }), { name: 'TypeError', message: /`rows`/ }],
  ]
  for (const [what, call, error] of refused) it(`refuses ${what}`, () => { assert.throws(call, { code: 'ERR_COUPLET_INVALID_ARGUMENT', ...error }) })

  it('refuses a stream that is none', async () => {
    using buffer = DeviceBuffer.fromSync(rows, { device })
    assert.throws(() => { buffer.writeSync(rows, { stream: 7 as never }) }, { name: 'TypeError', message: /`stream`/ })
    await assert.rejects(buffer.read(rows, { stream: -1n }), { name: 'RangeError', message: /`stream`/ })
    if (device === 'cpu') assert.throws(() => { buffer.writeSync(rows, { stream: 0n }) }, { name: 'RangeError', message: /no `stream` for the CPU/ })
  })
})

describe('DeviceBuffer, as garbage', () => {
  it('frees its memory', function () {
    if (!gpus.includes('sim' as never)) this.skip()
    this.timeout(60_000)
    // 32 MiB in all: without a finalizer, the 17th of 2 MiB would not fit.
    const { status, stderr } = child(
      `for (let i = 0; i < 60; i++) {
         new Array(4).fill(0).forEach(() => couplet.DeviceBuffer.allocateSync({ bytes: 1 << 21, device }))
         await couplet.DeviceBuffer.from(new Uint8Array(1 << 20), { device })
         gc()
         await new Promise(setImmediate)
       }`,
      { COUPLET_SIM_MEMORY: String(32 << 20) },
      ['--expose-gc'],
    )
    assert.equal(status, 0, stderr)
  })
})

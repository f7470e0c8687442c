import assert from 'node:assert/strict'

import fc from 'fast-check'

import { codec, codesBytes, float16FromFloat32, float32FromFloat16 } from '../../lib'
import type { EncodeOptions } from '../../lib'
import { noise } from '../codebook/samples'
import { describeOn, gpus, operationsOn } from '../device/devices'
import type { Shape } from './reference'
import { codeAt, decoded, nearest } from './reference'

const names = ['1c1b', '1c2b', '1c4b', '2c2b', '2c8b', '4c4b', '4c8b', '8c8b', '8c10b', '16c12b', '3c5b', '5c7b']

/** A codec, and a shape that it fits. */
const shapes = fc
  .record({
    codec: fc.constantFrom(...names).map((name) => codec(name)),
    tokens: fc.integer({ min: 0, max: 150 }),
    kvHeads: fc.integer({ min: 1, max: 3 }),
    groups: fc.integer({ min: 1, max: 3 }),
    pageTokens: fc.constantFrom(8, 16, 64, 72),
    seed: fc.nat(),
  })
  .map(({ groups, ...shape }) => ({ ...shape, headDim: groups * shape.codec.groupChannels * Math.ceil(8 / shape.codec.groupChannels) }))

function sample(shape: Shape, seed: number): { rows: Float32Array; tables: Float32Array } {
  const { codec: { centroids }, tokens, kvHeads, headDim } = shape
  return { rows: noise(tokens * kvHeads * headDim, seed), tables: noise(kvHeads * headDim * centroids, seed + 1) }
}

const plain: Shape = { codec: codec('8c8b'), tokens: 100, kvHeads: 2, headDim: 32, pageTokens: 64 }

describeOn('all', 'encode', (device) => {
  const { decodeSync, encode, encodeSync } = operationsOn(device)

  it('finds the nearest centroid of every group', async () => {
    await fc.assert(
      fc.asyncProperty(shapes, async ({ seed, ...shape }) => {
        const { rows, tables } = sample(shape, seed)
        const codes = await encode(rows, { ...shape, tables })
        assert.equal(codes.length, codesBytes(shape))
        for (let token = 0; token < shape.tokens; token += 7)
          for (let kvHead = 0; kvHead < shape.kvHeads; kvHead++)
            for (let group = 0; group < shape.headDim / shape.codec.groupChannels; group++) {
              const { code, distances } = nearest(rows, tables, shape, token, kvHead, group)
              const found = codeAt(codes, shape, token, kvHead, group)
              // Two centroids whose distances differ by less than float32 rounding of sums of squares up to 64 may swap.
              const bound = 64 * 2 ** -23
              if ((distances[found] ?? NaN) - (distances[code] ?? NaN) !== 0)
                assert.ok(Math.abs((distances[found] ?? NaN) - (distances[code] ?? NaN)) <= bound, `token ${token} head ${kvHead} group ${group}`)
              else assert.equal(found, code) // an exact tie goes to the lowest index
            }
      }),
      { numRuns: device === 'cpu' ? 60 : 15 },
    )
  })

  it('gives the same bytes in both forms and on any number of threads', async () => {
    const shape = { ...plain, tokens: device === 'cpu' ? 1000 : 200 }
    const { rows, tables } = sample(shape, 5)
    const once = encodeSync(rows, { ...shape, tables, threads: 1 })
    for (const threads of [0, 2, 3, 16]) {
      assert.deepEqual(await encode(rows, { ...shape, tables, threads }), once)
      assert.deepEqual(encodeSync(rows, { ...shape, tables, threads }), once)
    }
  })

  it('gives the same bytes with a signal, which makes it work in slices', async () => {
    const shape = { ...plain, codec: codec('16c12b'), tokens: 777, pageTokens: 24 }
    const { rows, tables } = sample(shape, 6)
    const signal = new AbortController().signal
    assert.deepEqual(await encode(rows, { ...shape, tables, signal }), encodeSync(rows, { ...shape, tables }))
  })

  it('reads float16 as it reads the same numbers in float32', () => {
    const { rows, tables } = sample(plain, 7)
    const halves = float16FromFloat32(rows)
    assert.deepEqual(encodeSync(halves, { ...plain, tables }), encodeSync(float32FromFloat16(halves), { ...plain, tables }))
  })

  it('takes a Float16Array where the runtime has one', () => {
    const { rows, tables } = sample(plain, 7)
    const halves = float16FromFloat32(rows)
    // What Node 24 has; here, a Uint16Array that says it is one.
    class Float16Array extends Uint16Array {
      override get [Symbol.toStringTag](): never {
        return 'Float16Array' as never
      }
    }
    const half = new Float16Array(halves)
    assert.deepEqual(encodeSync(half as never, { ...plain, tables }), encodeSync(halves, { ...plain, tables }))
  })

  it('follows strides', () => {
    const { tokens, kvHeads, headDim } = plain
    const { rows, tables } = sample(plain, 8)
    const heads = new Float32Array(kvHeads * (tokens * headDim + 5)).fill(NaN) // [kvHeads][tokens][headDim], with a gap that nobody may read
    for (let token = 0; token < tokens; token++)
      for (let head = 0; head < kvHeads; head++) {
        const from = (token * kvHeads + head) * headDim
        heads.set(rows.subarray(from, from + headDim), head * (tokens * headDim + 5) + token * headDim)
      }
    const strides = { tokenStride: headDim, headStride: tokens * headDim + 5 }
    assert.deepEqual(encodeSync(heads, { ...plain, ...strides, tables }), encodeSync(rows, { ...plain, tables }))
    const codes = encodeSync(rows, { ...plain, tables })
    const out = heads.map((value) => (Number.isNaN(value) ? 77 : 0))
    decodeSync(codes, { ...plain, ...strides, tables, out })
    for (let token = 0; token < tokens; token += 9)
      assert.equal(out[strides.headStride + token * headDim], decodeSync(codes, { ...plain, tables })[(token * kvHeads + 1) * headDim])
    assert.ok(out.subarray(tokens * headDim, tokens * headDim + 5).every((value) => value === 77))
  })

  it('appends behind earlier tokens, which stay as they are', () => {
    fc.assert(
      fc.property(fc.nat(150), fc.nat(100), fc.constantFrom('8c8b', '4c3b', '8c10b', '1c1b'), fc.constantFrom(8, 64), (first, more, name, pageTokens) => {
        const shape = { ...plain, codec: codec(name), pageTokens, tokens: first + more }
        const { rows, tables } = sample(shape, first)
        const split = first * shape.kvHeads * shape.headDim
        const out = new Uint8Array(codesBytes(shape))
        encodeSync(rows.subarray(0, split), { ...shape, tokens: first, tables, out })
        encodeSync(rows.subarray(split), { ...shape, tokens: more, firstToken: first, tables, out })
        assert.deepEqual(out, encodeSync(rows, { ...shape, tables }))
      }),
      { numRuns: device === 'cpu' ? 40 : 12 },
    )
  })

  it('works in memory that is not aligned, not its own, and shared', async () => {
    const { rows, tables } = sample(plain, 9)
    const expected = encodeSync(rows, { ...plain, tables })
    const pool = Buffer.alloc(expected.length + 100, 0)
    const out = new Uint8Array(pool.buffer, pool.byteOffset + 3, expected.length)
    assert.equal(await encode(rows, { ...plain, tables, out }), out)
    assert.deepEqual(Uint8Array.from(out), expected)
    const shared = new Float32Array(new SharedArrayBuffer(rows.byteLength))
    shared.set(rows)
    assert.deepEqual(await encode(shared, { ...plain, tables }), expected)
  })

  for (const bad of [NaN, Infinity, -Infinity])
    it(`refuses ${bad} and says where it is`, async () => {
      const { rows, tables } = sample(plain, 10)
      rows[(77 * plain.kvHeads + 1) * plain.headDim + 13] = bad
      const error = { name: 'RangeError', code: 'ERR_COUPLET_NOT_FINITE', token: 77, kvHead: 1, channel: 13, message: /token 77, kv head 1, channel 13/ }
      await assert.rejects(encode(rows, { ...plain, tables }), error)
      assert.throws(() => encodeSync(float16FromFloat32(rows), { ...plain, tables }), error)
    })

  it('says where a NaN is when it works in slices', async () => {
    const shape = device === 'cpu' ? { ...plain, codec: codec('8c12b'), tokens: 3000 } : { ...plain, codec: codec('8c1b'), tokens: 70_000 }
    const { rows, tables } = sample(shape, 10)
    rows[(2900 * shape.kvHeads + 1) * shape.headDim + 5] = NaN
    const signal = new AbortController().signal
    await assert.rejects(encode(rows, { ...shape, tables, signal }), { token: 2900, kvHead: 1, channel: 5, message: /token 2900, kv head 1, channel 5/ })
  })

  it('refuses a NaN in the tables', () => {
    const { rows, tables } = sample(plain, 10)
    tables[100] = NaN
    assert.throws(() => encodeSync(rows, { ...plain, tables }), { code: /ERR_COUPLET_(NOT_FINITE|INVALID_ARGUMENT)/ })
  })
})

describeOn('all', 'decode', (device) => {
  const { decode, decodeSync, encodeSync } = operationsOn(device)

  it('gives the centroids that the codes name', async () => {
    await fc.assert(
      fc.asyncProperty(shapes, async ({ seed, ...shape }) => {
        const { tables } = sample(shape, seed)
        const codes = Uint8Array.from(noise(codesBytes(shape), seed), (value) => value * 128) // any bytes are codes
        const expected = decoded(codes, tables, shape)
        assert.deepEqual(await decode(codes, { ...shape, tables }), expected)
        assert.deepEqual(decodeSync(codes, { ...shape, tables, threads: 1 }), expected)
        assert.deepEqual(decodeSync(codes, { ...shape, tables, dtype: 'float16' }), float16FromFloat32(expected))
      }),
      { numRuns: device === 'cpu' ? 60 : 15 },
    )
  })

  it('rounds to float16 to nearest, ties to even', () => {
    const shape = { ...plain, codec: codec('8c8b'), tokens: 64 }
    const tables = sample(shape, 11).tables.map((value) => value * 1.0009765625 * 1.3)
    const codes = Uint8Array.from(noise(codesBytes(shape), 12), (value) => value * 128)
    assert.deepEqual(decodeSync(codes, { ...shape, tables, dtype: 'float16' }), float16FromFloat32(decoded(codes, tables, shape)))
  })

  it('decodes from the middle, into memory of the caller, of the type of that memory', () => {
    const { rows, tables } = sample(plain, 13)
    const codes = encodeSync(rows, { ...plain, tables })
    const all = decodeSync(codes, { ...plain, tables })
    const row = plain.kvHeads * plain.headDim
    const out = new Float32Array(20 * row)
    assert.equal(decodeSync(codes, { ...plain, firstToken: 57, tokens: 20, tables, out }), out)
    assert.deepEqual(out, all.slice(57 * row, 77 * row))
    const halves = new Uint16Array(plain.tokens * row)
    assert.equal(decodeSync(codes, { ...plain, tables, out: halves }), halves)
    assert.deepEqual(halves, float16FromFloat32(all))
  })

  it('is what encode of its own result gives back', () => {
    const { rows, tables } = sample(plain, 14)
    const codes = encodeSync(rows, { ...plain, tables })
    assert.deepEqual(encodeSync(decodeSync(codes, { ...plain, tables }), { ...plain, tables }), codes)
  })
})

describe('codesBytes', () => {
  it('counts whole pages and states its only padding', () => {
    fc.assert(
      fc.property(shapes, ({ codec: { codeBits, groupChannels }, headDim, ...shape }) => {
        const page = Math.ceil(((headDim / groupChannels) * shape.pageTokens * codeBits) / 8 / 64) * 64
        const expected = Math.ceil(shape.tokens / shape.pageTokens) * shape.kvHeads * page
        assert.equal(codesBytes({ ...shape, headDim, codec: { codeBits, groupChannels } }), expected)
      }),
    )
    assert.equal(codesBytes({ codec: '8c8b', tokens: 32768, kvHeads: 8, headDim: 128 }), (32768 * 8 * 128) / 8) // 1 bit per channel
  })
})

describeOn('all', 'encode and decode refuse', (device) => {
  const { decodeSync, encode, encodeSync } = operationsOn(device)
  const { rows, tables } = sample(plain, 20)
  const codes = encodeSync(rows, { ...plain, tables })
  const detached = rows.slice()
  structuredClone(detached, { transfer: [detached.buffer] })
  type Resizable = new (bytes: number, options: { maxByteLength: number }) => ArrayBuffer
  const resizable = new Float32Array(new (ArrayBuffer as unknown as Resizable)(rows.byteLength, { maxByteLength: 2 * rows.byteLength }))

  const cases: [string, unknown, Partial<Record<keyof EncodeOptions, unknown>>, object][] = [
    ['no rows', undefined, {}, { name: 'TypeError', message: /`rows` but received undefined/ }],
    ['plain numbers', [1, 2, 3], {}, { name: 'TypeError', message: /`rows` but received an array/ }],
    ['doubles', new Float64Array(rows), {}, { name: 'TypeError', message: /a Float64Array of 6400 elements/ }],
    ['too few rows', rows.subarray(1), {}, { name: 'RangeError', message: /6400 or more elements for `rows` but received .* 6399 elements/ }],
    ['a detached buffer', detached, {}, { name: 'RangeError', message: /`rows` but received a Float32Array whose buffer is detached/ }],
    ['a resizable buffer', resizable, {}, { name: 'RangeError', message: /buffer of fixed length for `rows`/ }],
    ['an unknown codec', rows, { codec: 'gzip' }, { name: 'RangeError', message: /"gzip"/ }],
    ['no codec', rows, { codec: undefined }, { name: 'TypeError', message: /`codec` but received undefined/ }],
    ['groups that do not divide headDim', rows, { codec: '7c2b' }, { message: /divisor of 32 \(`headDim`\) for `groupChannels` but received 7/ }],
    ['a negative number of tokens', rows, { tokens: -1 }, { name: 'RangeError', message: /integer from 0 to 2147483647 for `tokens` but received -1/ }],
    ['half a token', rows, { tokens: 0.5 }, { name: 'RangeError', message: /`tokens` but received 0.5/ }],
    ['a text for a number', rows, { kvHeads: '2' }, { name: 'TypeError', message: /`kvHeads` but received "2"/ }],
    ['a head of 4 channels', rows, { headDim: 4 }, { name: 'RangeError', message: /`headDim`/ }],
    ['short tables', rows, { tables: tables.subarray(1) }, { name: 'RangeError', message: /`tables`/ }],
    ['tables of doubles', rows, { tables: new Float64Array(tables) }, { name: 'TypeError', message: /`tables`/ }],
    ['pages of 12 tokens', rows, { pageTokens: 12 }, { name: 'RangeError', message: /multiple of 8/ }],
    ['pages of no tokens', rows, { pageTokens: 0 }, { name: 'RangeError', message: /`pageTokens`/ }],
    ['a stride past the end', rows, { tokenStride: 65 }, { name: 'RangeError', message: /`rows`/ }],
    ['a stride beyond all memory', rows, { tokenStride: Number.MAX_SAFE_INTEGER }, { name: 'RangeError', message: /`rows`/ }],
    ['a negative stride', rows, { tokenStride: -64 }, { name: 'RangeError', message: /`tokenStride`/ }],
    ['a huge first token', rows, { firstToken: 2 ** 40, out: new Uint8Array(10) }, { name: 'RangeError', message: /`out`/ }],
    ['a short out', rows, { out: codes.subarray(1) }, { name: 'RangeError', message: /`out`/ }],
    ['an out of another type', rows, { out: new Uint16Array(codes.length) }, { name: 'TypeError', message: /a Uint8Array for `out`/ }],
    ['257 threads', rows, { threads: 257 }, { name: 'RangeError', message: /`threads`/ }],
    ...(gpus.includes('cuda') ? [] : [['a device that is not there', rows, { device: 'cuda' }, { code: 'ERR_COUPLET_BACKEND_UNAVAILABLE' }]] as never),
    ['a device that nobody knows', rows, { device: 'tpu' }, { message: /"tpu"/ }],
    ['a device that is not a text', rows, { device: 1 }, { name: 'TypeError', message: /`device`/ }],
  ]
  for (const [what, input, change, error] of cases)
    it(what, async () => {
      const options = { ...plain, tables, ...change } as never
      const expected = { code: 'ERR_COUPLET_INVALID_ARGUMENT', ...error }
      assert.throws(() => encodeSync(input as never, options), expected)
      await assert.rejects(encode(input as never, options), expected)
    })

  it('no options', () => {
    assert.throws(() => encodeSync(rows, undefined as never), { name: 'TypeError', message: 'Expected an object for `options` but received undefined' })
  })

  it('short codes, rows that overlap and an unknown dtype', () => {
    assert.throws(() => decodeSync(codes.subarray(1), { ...plain, tables }), { name: 'RangeError', message: /`codes`/ })
    assert.throws(() => decodeSync(codes, { ...plain, tables, tokenStride: 0 }), { name: 'RangeError', message: /overlap/ })
    assert.throws(() => decodeSync(codes, { ...plain, tables, tokenStride: 32, headStride: 32 }), { name: 'RangeError', message: /overlap/ })
    assert.throws(() => decodeSync(codes, { ...plain, tables, dtype: 'int8' as never }), { name: 'RangeError', message: /"int8"/ })
    assert.throws(() => decodeSync(codes, { ...plain, tables, dtype: 'float32', out: new Uint16Array(6400) } as never), { name: 'TypeError', message: /`out`/ })
  })

  it('a signal in the Sync form', () => {
    assert.throws(() => encodeSync(rows, { ...plain, tables, signal: AbortSignal.abort() } as never), { name: 'TypeError', message: /`signal`/ })
    assert.throws(() => decodeSync(codes, { ...plain, tables, signal: AbortSignal.abort() } as never), { name: 'TypeError', message: /`signal`/ })
  })
})

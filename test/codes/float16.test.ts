import assert from 'node:assert/strict'

import fc from 'fast-check'

import { float16FromFloat32, float32FromFloat16 } from '../../lib'

/** The number that float16 bits stand for, by the definition of the format. */
function valueOf(bits: number): number {
  const sign = bits & 0x8000 ? -1 : 1
  const exponent = (bits >> 10) & 0x1f
  const fraction = bits & 0x3ff
  if (exponent === 31) return fraction === 0 ? sign * Infinity : NaN
  return sign * (exponent === 0 ? fraction * 2 ** -24 : (1024 + fraction) * 2 ** (exponent - 25))
}

const all = Uint16Array.from({ length: 65536 }, (_, bits) => bits)
const narrow = (value: number): number => float16FromFloat32(Float32Array.of(value))[0] ?? NaN

describe('float16', () => {
  it('widens all 65536 patterns exactly', () => {
    const wide = float32FromFloat16(all)
    for (const bits of all) assert.ok(Object.is(wide[bits], valueOf(bits)), `bits ${bits}: ${wide[bits]}`)
  })

  it('gives all of them back, NaNs as quiet NaNs', () => {
    const back = float16FromFloat32(float32FromFloat16(all))
    for (const bits of all) assert.equal(back[bits], Number.isNaN(valueOf(bits)) ? bits | 0x200 : bits)
  })

  it('rounds to nearest, ties to even, between all neighbours', () => {
    for (let bits = 0; bits < 0x7bff; bits++) {
      const [low, high] = [valueOf(bits), valueOf(bits + 1)]
      const middle = (low + high) / 2 // a float32 number, as its neighbours below are
      const step = (high - low) / 4096
      assert.equal(narrow(middle), bits + (bits & 1), `between ${low} and ${high}`)
      assert.equal(narrow(middle - step), bits)
      assert.equal(narrow(middle + step), bits + 1)
      assert.equal(narrow(-middle), 0x8000 | (bits + (bits & 1)))
    }
  })

  it('overflows from 65520 on, half a step above its largest number', () => {
    assert.deepEqual([65504, 65519.99609375, 65520, 1e10, 3.4e38, Infinity, -65520].map(narrow), [0x7bff, 0x7bff, 0x7c00, 0x7c00, 0x7c00, 0x7c00, 0xfc00])
  })

  it('underflows to zero up to 2^-25, half of its smallest number', () => {
    assert.deepEqual([0, -0, 1e-45, 2 ** -25, 2 ** -25 * (1 + 2 ** -23), 2 ** -24, -1e-45].map(narrow), [0, 0x8000, 0, 0, 1, 1, 0x8000])
  })

  it('picks the nearest of any float32', () => {
    fc.assert(
      fc.property(fc.float({ noNaN: true, min: -65504, max: 65504 }), (value) => {
        const bits = narrow(value)
        const error = Math.abs(valueOf(bits) - value)
        const magnitude = bits & 0x7fff
        for (const other of [magnitude - 1, magnitude + 1])
          if (other >= 0 && other < 0x7c00) assert.ok(error <= Math.abs(valueOf((bits & 0x8000) | other) - value))
      }),
      { numRuns: 2000 },
    )
  })

  it('writes into memory of the caller, at any offset', () => {
    const out = new Uint16Array(5).subarray(1, 4)
    assert.equal(float16FromFloat32(Float32Array.of(9, 1, -2, 0.5).subarray(1), out), out)
    assert.deepEqual([...out], [0x3c00, 0xc000, 0x3800])
    const wide = new Float32Array(4).subarray(1)
    assert.equal(float32FromFloat16(out, wide), wide)
    assert.deepEqual([...wide], [1, -2, 0.5])
  })

  it('refuses arrays whose buffer was transferred away', () => {
    const gone = new Float32Array(4)
    structuredClone(gone.buffer, { transfer: [gone.buffer] })
    const detached = { code: 'ERR_COUPLET_INVALID_ARGUMENT', message: /whose buffer is detached/ }
    assert.throws(() => float16FromFloat32(gone), detached)
    assert.throws(() => float32FromFloat16(new Uint16Array(0), gone), detached)
  })

  it('refuses other arrays, and an out that is too short', () => {
    const invalid = { code: 'ERR_COUPLET_INVALID_ARGUMENT' }
    assert.throws(() => float16FromFloat32([1] as never), { ...invalid, name: 'TypeError', message: /`values`/ })
    assert.throws(() => float32FromFloat16(new Float32Array(1) as never), { ...invalid, name: 'TypeError', message: /`bits`/ })
    assert.throws(() => float16FromFloat32(new Float32Array(2), new Uint16Array(1)), { ...invalid, name: 'RangeError', message: /`out`/ })
    assert.throws(() => float32FromFloat16(new Uint16Array(2), new Float32Array(1)), { ...invalid, name: 'RangeError', message: /`out`/ })
  })
})

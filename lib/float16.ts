/**
 * float16 (IEEE 754 binary16) for a runtime without Float16Array: the bits of the numbers, in Uint16Arrays.
 * Both directions are exact; float32 to float16 rounds to nearest, ties to even, and overflows to infinity from 65520 on.
 */
import { requireArray, requireAttached, resultArray } from './arguments'

const scratch = new DataView(new ArrayBuffer(4))

/** Element i of the result is the float16 nearest to values[i]. A NaN stays a quiet NaN with the high bits of its payload. */
export function float16FromFloat32(values: Float32Array, out?: Uint16Array): Uint16Array {
  requireArray(values, 'values', Float32Array, 0)
  requireAttached(values, 'values')
  const halves = resultArray(out, Uint16Array, values.length)
  const bits = new Uint32Array(values.buffer, values.byteOffset, values.length)
  for (let index = 0; index < bits.length; index++) halves[index] = narrow(bits[index] ?? 0)
  return halves
}

/** Element i of the result is the number whose float16 bits are bits[i]. */
export function float32FromFloat16(bits: Uint16Array, out?: Float32Array): Float32Array {
  requireArray(bits, 'bits', Uint16Array, 0)
  const values = resultArray(out, Float32Array, bits.length)
  requireAttached(values, 'out')
  const outBits = new Uint32Array(values.buffer, values.byteOffset, values.length)
  for (let index = 0; index < bits.length; index++) outBits[index] = widen(bits[index] ?? 0)
  return values
}

/** Bits of a float32 to bits of the nearest float16. */
function narrow(bits: number): number {
  const sign = (bits >>> 16) & 0x8000
  const magnitude = bits & 0x7fffffff
  if (magnitude > 0x7f800000) return sign | 0x7e00 | ((magnitude >>> 13) & 0x3ff) // NaN
  if (magnitude >= 0x477ff000) return sign | 0x7c00 // 65520 and more
  if (magnitude < 0x38800000) {
    // Below 2^-14: a float16 subnormal counts units of 2^-24. Adding 0.5, whose last bit is 2^-24, rounds to that unit.
    scratch.setUint32(0, magnitude)
    scratch.setFloat32(0, scratch.getFloat32(0) + 0.5)
    return sign | (scratch.getUint32(0) - 0x3f000000)
  }
  const tie = (magnitude >>> 13) & 1 // half a unit less one, plus one if the unit's last bit is odd: ties go to even
  return sign | ((magnitude - 0x38000000 + 0xfff + tie) >>> 13)
}

/** Bits of a float16 to bits of the same number as float32. */
function widen(bits: number): number {
  const sign = (bits & 0x8000) << 16
  const magnitude = bits & 0x7fff
  if (magnitude >= 0x7c00) return sign | 0x7f800000 | ((magnitude & 0x3ff) << 13)
  if (magnitude >= 0x0400) return sign | ((magnitude << 13) + 0x38000000)
  scratch.setFloat32(0, magnitude * 2 ** -24)
  return sign | scratch.getUint32(0)
}

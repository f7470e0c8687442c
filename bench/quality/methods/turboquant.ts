/**
 * TurboQuant (arXiv 2504.19874): a random rotation makes every channel nearly normal, so one scalar quantizer fits all.
 *
 * `mse`: a row x of a head is |x| (float16) times a unit vector; R x / |x| is multiplied by sqrt(headDim) and each channel becomes the
 * nearest of the 2^b levels that are best for a standard normal number (Lloyd and Max). Decoding undoes all of it. `prod`, for keys,
 * whose products with queries must be unbiased: b - 1 bits as above and one bit for the signs of S r, r the error that is left and S a
 * Gaussian matrix; sqrt(pi / 2) / headDim * |r| * S^T sign(S r) is added in decoding. Values as in `mse`. Bits: b + 16 / headDim, and
 * 16 / headDim more for |r|. Needs no calibration. Keys after rotary embedding.
 */
import { half, halfBits, type Method, nearest, norm, normalQuantiles, type Quantizer, rowRun, type Rows } from './method'
import { normals } from '../../measure'

export function turboQuant(bits: number, kind: 'mse' | 'prod'): Method {
  return {
    name: `turboquant-${kind}-${bits}b`, width: bits, file: 'turboquant.ts', rotated: true,
    fit: ({ shape: { headDim } }): Promise<Quantizer> => {
      const rotation = randomRotation(headDim, 1)
      const sketch = normals(headDim * headDim, 2)
      const levels = normalLevels(bits)
      const fewer = normalLevels(bits - 1)
      return Promise.resolve({
        tableBytes: 0, // both matrices come from a seed
        quantize: (rows, { side }) => {
          const sketched = kind === 'prod' && side === 'key'
          for (let head = 0; head < rows.heads; head++) {
            for (let token = 0; token < rows.tokens; token++) quantizeRow(rows, head, token, rotation, sketched ? fewer : levels, sketched ? sketch : undefined)
          }
          return rows.data.length * bits + rows.heads * rows.tokens * halfBits * (sketched ? 2 : 1)
        },
      })
    },
  }
}

function quantizeRow(rows: Rows, head: number, token: number, rotation: Float64Array, levels: readonly number[], sketch: Float32Array | undefined): void {
  const run = rowRun(rows, head, token)
  const size = run.count
  const row = rows.data.subarray(run.first, run.first + size)
  const length = half(norm(rows.data, run))
  if (length === 0) return
  const unit = Float64Array.from(row, (value) => value * Math.sqrt(size) / length)
  const turned = multiply(rotation, unit, false).map((value) => nearest(levels, value))
  const back = multiply(rotation, turned, true)
  if (sketch) {
    const left = unit.map((value, i) => value - back[i]!)
    const leftLength = half(Math.hypot(...left))
    const signs = multiply(sketch, left, false).map((value) => value >= 0 ? 1 : -1)
    const correction = multiply(sketch, signs, true)
    for (let i = 0; i < size; i++) back[i]! += Math.sqrt(Math.PI / 2) / size * leftLength * correction[i]!
  }
  for (let i = 0; i < size; i++) row[i] = back[i]! * length / Math.sqrt(size)
}

/** Matrix [n][n] times vector, or its transpose. */
function multiply(matrix: Float32Array | Float64Array, vector: Float64Array, transposed: boolean): Float64Array {
  const size = vector.length
  const out = new Float64Array(size)
  for (let i = 0; i < size; i++) {
    if (transposed) {
      const factor = vector[i]!
      for (let j = 0; j < size; j++) out[j]! += matrix[i * size + j]! * factor
    } else {
      let sum = 0
      for (let j = 0; j < size; j++) sum += matrix[i * size + j]! * vector[j]!
      out[i] = sum
    }
  }
  return out
}

/** An orthogonal matrix of a seed, its rows orthonormal: Gaussian rows, each made orthogonal to the ones before, twice against rounding. */
export function randomRotation(size: number, seed: number): Float64Array {
  const matrix = Float64Array.from(normals(size * size, seed))
  for (let i = 0; i < size; i++) {
    const row = matrix.subarray(i * size, (i + 1) * size)
    for (let before = 0; before < 2 * i; before++) {
      const other = matrix.subarray((before % i) * size, (before % i + 1) * size)
      const product = row.reduce((sum, value, j) => sum + value * other[j]!, 0)
      for (let j = 0; j < size; j++) row[j]! -= product * other[j]!
    }
    const length = Math.hypot(...row)
    for (let j = 0; j < size; j++) row[j]! /= length
  }
  return matrix
}

/** 2^bits levels with the least mean squared error for a standard normal number: Lloyd's iteration on its quantiles. */
export function normalLevels(bits: number): number[] {
  const sample = normalQuantiles(1 << 14)
  let levels = Array.from(normalQuantiles(2 ** bits))
  for (let iteration = 0; iteration < 200; iteration++) {
    const sums = levels.map(() => ({ sum: 0, count: 0 }))
    let index = 0
    for (const value of sample) {
      while (index + 1 < levels.length && value > (levels[index]! + levels[index + 1]!) / 2) index++
      sums[index]!.sum += value
      sums[index]!.count += 1
    }
    levels = sums.map(({ sum, count }, i) => count > 0 ? sum / count : levels[i]!)
  }
  return levels
}

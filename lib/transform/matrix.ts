/** Small dense matrices in double, row by row: what transforms are learned with. */

/** Symmetric matrices as they are: all eigenvalues, and their eigenvectors in the rows of `vectors`. */
export interface Eigen {
  values: Float64Array
  vectors: Float64Array
}

/** Jacobi's rotations; `size` to 256. */
export function eigen(matrix: Float64Array, size: number): Eigen {
  const vectors = identity(size)
  const a = Float64Array.from(matrix)
  for (let sweep = 0; sweep < 40; sweep++) {
    let [off, diagonal] = [0, 0]
    for (let i = 0; i < size; i++) {
      diagonal += a[i * size + i]! ** 2
      for (let j = 0; j < i; j++) off += 2 * a[i * size + j]! ** 2
    }
    if (off <= 1e-24 * diagonal) break
    for (let p = 0; p < size; p++) for (let q = p + 1; q < size; q++) rotate(a, vectors, size, p, q)
  }
  return { values: Float64Array.from({ length: size }, (_, i) => a[i * size + i]!), vectors }
}

/** Makes a[p][q] zero. */
function rotate(a: Float64Array, vectors: Float64Array, size: number, p: number, q: number): void {
  const entry = a[p * size + q]!
  if (entry === 0) return
  const theta = (a[q * size + q]! - a[p * size + p]!) / (2 * entry)
  const tangent = (theta < 0 ? -1 : 1) / (Math.abs(theta) + Math.hypot(theta, 1))
  const cosine = 1 / Math.hypot(tangent, 1)
  const sine = tangent * cosine
  const turn = (matrix: Float64Array, first: number, second: number, step: number) => {
    for (let k = 0; k < size; k++) {
      const [x, y] = [matrix[first + k * step]!, matrix[second + k * step]!]
      matrix[first + k * step] = cosine * x - sine * y
      matrix[second + k * step] = sine * x + cosine * y
    }
  }
  turn(a, p, q, size)
  turn(a, p * size, q * size, 1)
  turn(vectors, p * size, q * size, 1)
}

/** All eigenvalues of a symmetric matrix, in no order: for matrices by the thousand, some twenty times as fast as {@link eigen}. */
export function eigenvalues(matrix: Float64Array, size: number): Float64Array {
  const { diagonal, beside } = tridiagonal(Float64Array.from(matrix), size)
  for (let last = size - 1, steps = 0; last > 0;) {
    const isZero = (k: number) => Math.abs(beside[k]!) <= 2 ** -52 * (Math.abs(diagonal[k]!) + Math.abs(diagonal[k + 1]!))
    if (isZero(last - 1) || ++steps > 40 * size) {
      last--
      continue
    }
    let first = last - 1
    while (first > 0 && !isZero(first - 1)) first--
    chase(diagonal, beside, first, last)
  }
  return diagonal
}

/** The same eigenvalues on a diagonal and the entries beside it, by Householder's reflections. `a` is used up. */
function tridiagonal(a: Float64Array, size: number): { diagonal: Float64Array; beside: Float64Array } {
  const [diagonal, beside] = [new Float64Array(size), new Float64Array(size - 1)]
  const [mirror, through] = [new Float64Array(size), new Float64Array(size)]
  for (let k = 0; k < size; k++) {
    diagonal[k] = a[k * size + k]!
    if (k === size - 1) break
    let length = 0
    for (let i = k + 1; i < size; i++) length += a[i * size + k]! ** 2
    length = a[(k + 1) * size + k]! > 0 ? -Math.sqrt(length) : Math.sqrt(length)
    beside[k] = length
    // The reflection I - v vᵀ / scale takes the column to (length, 0, ..., 0).
    for (let i = k + 1; i < size; i++) mirror[i] = a[i * size + k]!
    mirror[k + 1]! -= length
    const scale = -length * mirror[k + 1]!
    if (!(scale > 0)) continue
    let product = 0
    for (let i = k + 1; i < size; i++) {
      let sum = 0
      for (let j = k + 1; j < size; j++) sum += a[i * size + j]! * mirror[j]!
      through[i] = sum / scale
      product += mirror[i]! * through[i]!
    }
    for (let i = k + 1; i < size; i++) through[i]! -= (product / (2 * scale)) * mirror[i]!
    for (let i = k + 1; i < size; i++) for (let j = k + 1; j < size; j++) a[i * size + j]! -= mirror[i]! * through[j]! + through[i]! * mirror[j]!
  }
  return { diagonal, beside }
}

/** One implicit QR step on entries `first` to `last`, shifted by the eigenvalue of the last two that is near the last. */
function chase(diagonal: Float64Array, beside: Float64Array, first: number, last: number): void {
  const half = (diagonal[last - 1]! - diagonal[last]!) / 2
  const square = beside[last - 1]! ** 2
  const shift = diagonal[last]! - square / (half + (half < 0 ? -1 : 1) * Math.sqrt(half * half + square))
  let [x, z] = [diagonal[first]! - shift, beside[first]!]
  for (let k = first; k < last; k++) {
    const length = Math.sqrt(x * x + z * z)
    const [cosine, sine] = length > 0 ? [x / length, z / length] : [1, 0]
    if (k > first) beside[k - 1] = length
    const [one, other, between] = [diagonal[k]!, diagonal[k + 1]!, beside[k]!]
    const cross = 2 * cosine * sine * between
    diagonal[k] = cosine * cosine * one + cross + sine * sine * other
    diagonal[k + 1] = sine * sine * one - cross + cosine * cosine * other
    beside[k] = cosine * sine * (other - one) + (cosine * cosine - sine * sine) * between
    if (k === last - 1) break
    x = beside[k]!
    z = sine * beside[k + 1]!
    beside[k + 1]! *= cosine
  }
}

export function identity(size: number): Float64Array {
  const matrix = new Float64Array(size * size)
  for (let i = 0; i < size; i++) matrix[i * size + i] = 1
  return matrix
}

/**
 * Hadamard's matrix and its inverse, in blocks of the largest power of two that divides `size`: entries of one magnitude, powers of two
 * whose product is 1 / block, so that both are exact in float16 and undo each other exactly.
 */
export function hadamard(size: number): { matrix: Float64Array; inverse: Float64Array } {
  const block = size & -size
  const magnitude = 2 ** -Math.floor(Math.log2(block) / 2)
  const [matrix, inverse] = [new Float64Array(size * size), new Float64Array(size * size)]
  for (let i = 0; i < size; i++) {
    const first = i - (i % block)
    for (let j = first; j < first + block; j++) {
      let sign = 1
      for (let common = (i - first) & (j - first); common > 0; common &= common - 1) sign = -sign
      matrix[i * size + j] = sign * magnitude
      inverse[i * size + j] = sign / block / magnitude
    }
  }
  return { matrix, inverse }
}

/** The square root of a positive matrix, and its inverse; eigenvalues are taken to be at least `least` of their mean. */
export function squareRoot(matrix: Float64Array, size: number, least = 1e-6): { root: Float64Array; inverse: Float64Array } {
  const { values, vectors } = eigen(matrix, size)
  const floor = least * values.reduce((sum, value) => sum + value, 0) / size
  const [root, inverse] = [new Float64Array(size * size), new Float64Array(size * size)]
  for (let k = 0; k < size; k++) {
    const factor = Math.sqrt(Math.max(values[k]!, floor))
    for (let i = 0; i < size; i++) {
      for (let j = 0; j < size; j++) {
        const part = vectors[k * size + i]! * vectors[k * size + j]!
        root[i * size + j]! += part * factor
        inverse[i * size + j]! += part / factor
      }
    }
  }
  return { root, inverse }
}

/** L of L Lᵀ, below the diagonal and on it (Cholesky); where the matrix is not positive, as if it were just. */
export function lowerRoot(matrix: Float64Array, size: number): Float64Array {
  const root = new Float64Array(size * size)
  for (let i = 0; i < size; i++) {
    for (let j = 0; j <= i; j++) {
      let rest = matrix[i * size + j]!
      for (let k = 0; k < j; k++) rest -= root[i * size + k]! * root[j * size + k]!
      if (i === j) root[i * size + i] = Math.sqrt(Math.max(rest, 1e-12 * matrix[i * size + i]!, Number.MIN_VALUE))
      else root[i * size + j] = rest / root[j * size + j]!
    }
  }
  return root
}

/** By Gauss and Jordan, with the largest pivot of each column; of a matrix that has an inverse. */
export function invert(matrix: Float64Array, size: number): Float64Array {
  const left = Float64Array.from(matrix)
  const right = identity(size)
  for (let column = 0; column < size; column++) {
    let pivot = column
    for (let row = column; row < size; row++) if (Math.abs(left[row * size + column]!) > Math.abs(left[pivot * size + column]!)) pivot = row
    for (const side of [left, right]) {
      const moved = side.slice(pivot * size, (pivot + 1) * size)
      side.copyWithin(pivot * size, column * size, (column + 1) * size)
      side.set(moved, column * size)
    }
    const factor = 1 / left[column * size + column]!
    for (const side of [left, right]) for (let k = 0; k < size; k++) side[column * size + k]! *= factor
    for (let row = 0; row < size; row++) {
      const share = left[row * size + column]!
      if (row === column || share === 0) continue
      for (const side of [left, right]) for (let k = 0; k < size; k++) side[row * size + k]! -= share * side[column * size + k]!
    }
  }
  return right
}

/** a b */
export function product(a: Float64Array, b: Float64Array, size: number): Float64Array {
  const out = new Float64Array(size * size)
  for (let i = 0; i < size; i++) {
    for (let k = 0; k < size; k++) {
      const factor = a[i * size + k]!
      for (let j = 0; j < size; j++) out[i * size + j]! += factor * b[k * size + j]!
    }
  }
  return out
}

export function transposed<Matrix extends Float32Array | Float64Array>(matrix: Matrix, size: number): Matrix {
  const out = matrix.slice() as Matrix
  for (let i = 0; i < size; i++) for (let j = 0; j < size; j++) out[j * size + i] = matrix[i * size + j]!
  return out
}

/** Rows of some channels of a head. */
export interface RowSet {
  data: Float32Array
  /** Element of the first row's first channel, and elements from a row to the next. */
  first: number
  stride: number
  count: number
  channels: number
}

/** Mean of x xᵀ over rows, less that of their mean when `centered`: [channels][channels]. */
export function secondMoment({ data, first, stride, count, channels }: RowSet, centered: boolean): Float64Array {
  const [moment, mean, row] = [new Float64Array(channels * channels), new Float64Array(channels), new Float64Array(channels)]
  for (let n = 0, at = first; n < count; n++, at += stride) {
    for (let i = 0; i < channels; i++) {
      const value = row[i] = data[at + i]!
      mean[i]! += value
      for (let j = 0, to = i * channels; j <= i; j++, to++) moment[to]! += value * row[j]!
    }
  }
  for (let i = 0; i < channels; i++) {
    for (let j = 0; j <= i; j++) {
      const entry = moment[i * channels + j]! / count - (centered ? (mean[i]! / count) * (mean[j]! / count) : 0)
      moment[i * channels + j] = moment[j * channels + i] = entry
    }
  }
  return moment
}

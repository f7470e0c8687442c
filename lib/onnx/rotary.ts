/** Rotary tables as a graph holds them, and the plain base behind them if there is one. */

export interface RotaryTables {
  /** `half`: channel i pairs with i + dim / 2; `interleaved`: channel 2i pairs with 2i + 1. */
  readonly kind: 'half' | 'interleaved'
  /** Rotated channels of a head, the first ones. */
  readonly dim: number
  /** Rows of the tables: the positions that the graph can tell apart. */
  readonly positions: number
  /** float32 [positions][dim / 2] */
  readonly cos: Float32Array
  /** float32 [positions][dim / 2] */
  readonly sin: Float32Array
  /** The angle of pair i at position t is t * theta^(-2i / dim); undefined when the tables are scaled in any way. */
  readonly theta: number | undefined
}

/** The base of plain rotary tables, or undefined for tables of another kind (linear, dynamic, llama3, yarn, longrope scaling). */
export function plainTheta(cos: Float32Array, sin: Float32Array, dim: number): number | undefined {
  const pairs = dim / 2
  const positions = cos.length / pairs
  if (positions < 2 || pairs < 2) return undefined
  const last = pairs - 1
  const angle = (position: number) => Math.atan2(sin[position * pairs + last]!, cos[position * pairs + last]!) / position
  // The slowest pair, read where it has turned by about one radian: there rounding of the table weighs least.
  const far = Math.min(positions - 1, Math.max(1, Math.floor(1 / Math.max(angle(1), 1e-9))))
  const estimate = angle(far) ** (-pairs / last)
  if (!Number.isFinite(estimate) || estimate <= 1) return undefined
  return [Number(estimate.toPrecision(2)), Math.round(estimate), estimate].find((theta) => fits(theta, cos, sin, pairs))
}

/** Whether tables agree with `theta` at rows 0, 1, 2, 4, ... and the last, but for rounding of float32 angles or float16 entries. */
function fits(theta: number, cos: Float32Array, sin: Float32Array, pairs: number): boolean {
  const positions = cos.length / pairs
  const rows = [0, positions - 1]
  for (let row = 1; row < positions; row *= 2) rows.push(row)
  return rows.every((row) => {
    for (let pair = 0; pair < pairs; pair++) {
      const angle = row * theta ** (-pair / pairs)
      const tolerance = 1e-3 + angle * 4e-7
      if (Math.abs(Math.cos(angle) - cos[row * pairs + pair]!) > tolerance) return false
      if (Math.abs(Math.sin(angle) - sin[row * pairs + pair]!) > tolerance) return false
    }
    return true
  })
}

import { throwExpected } from '../errors'
import type { RotaryOption } from '../cache'

/**
 * Rotary embedding of key rows in JavaScript, and its exact inverse. (x, y) of pair i at position t becomes
 * (x cos - y sin, y cos + x sin); the amplitude of the tables need not be 1.
 */
export class Rotation {
  readonly #half: boolean
  readonly #pairs: number
  readonly #theta: number | undefined
  #cos: Float32Array
  #sin: Float32Array

  constructor(option: NonNullable<RotaryOption>, headDim: number) {
    const dim = option.dim ?? headDim
    if (dim < 2 || dim % 2 !== 0 || dim > headDim) throwExpected(`an even number from 2 to ${headDim}`, 'rotary.dim', dim)
    this.#half = option.kind === 'half'
    this.#pairs = dim / 2
    if ('cos' in option) {
      if (option.cos.length !== option.sin.length || option.cos.length % this.#pairs !== 0) {
        throwExpected(`tables of ${this.#pairs} columns and equal length`, 'rotary', option.cos)
      }
      this.#cos = option.cos
      this.#sin = option.sin
    } else {
      this.#theta = option.theta
      this.#cos = new Float32Array(0)
      this.#sin = new Float32Array(0)
    }
  }

  /** Bytes of the tables. */
  get bytes(): number {
    return this.#cos.byteLength + this.#sin.byteLength
  }

  /** Rotates `rows`, float32 [heads][tokens][channels], in place; token i stands at position max(0, first + i). */
  apply(rows: Float32Array, shape: RowsShape, first: number): void {
    this.#turn(rows, shape, first, false)
  }

  /** Takes the rotation back. */
  undo(rows: Float32Array, shape: RowsShape, first: number): void {
    this.#turn(rows, shape, first, true)
  }

  #turn(rows: Float32Array, { heads, tokens, channels }: RowsShape, first: number, back: boolean): void {
    this.#reach(first + tokens)
    const pairs = this.#pairs
    const step = this.#half ? 1 : 2
    const across = this.#half ? pairs : 1
    for (let token = 0; token < tokens; token += 1) {
      const angles = Math.max(0, first + token) * pairs
      for (let pair = 0; pair < pairs; pair += 1) {
        const amplitudeCos = this.#cos[angles + pair]!
        const amplitudeSin = this.#sin[angles + pair]!
        const norm = back ? 1 / (amplitudeCos * amplitudeCos + amplitudeSin * amplitudeSin) : 1
        const cos = amplitudeCos * norm
        const sin = back ? -amplitudeSin * norm : amplitudeSin
        for (let head = 0; head < heads; head += 1) {
          const at = (head * tokens + token) * channels + pair * step
          const x = rows[at]!
          const y = rows[at + across]!
          rows[at] = x * cos - y * sin
          rows[at + across] = y * cos + x * sin
        }
      }
    }
  }

  /** Makes sure that positions below `positions` are in the tables. */
  #reach(positions: number): void {
    const have = this.#cos.length / this.#pairs
    if (positions <= have) return
    if (this.#theta === undefined) throwExpected(`tables of at least ${positions} positions`, 'rotary', this.#cos)
    const rows = Math.max(positions, 2 * have, 256)
    const cos = new Float32Array(rows * this.#pairs)
    const sin = new Float32Array(rows * this.#pairs)
    cos.set(this.#cos)
    sin.set(this.#sin)
    for (let pair = 0; pair < this.#pairs; pair += 1) {
      const frequency = this.#theta ** (-pair / this.#pairs)
      for (let position = have; position < rows; position += 1) {
        cos[position * this.#pairs + pair] = Math.cos(position * frequency)
        sin[position * this.#pairs + pair] = Math.sin(position * frequency)
      }
    }
    this.#cos = cos
    this.#sin = sin
  }
}

export interface RowsShape {
  readonly heads: number
  readonly tokens: number
  readonly channels: number
}

/** A uniform sample of tokens with the gradients of their keys and values. */
import { requireInteger, resultArray } from '../arguments'
import { CoupletError } from '../errors'
import type { Sample } from '../onnx/capture'
import type { ModelShape } from '../onnx/decoder'
import type { Side } from './attention'
import { sides } from './attention'

/** Rows of one layer and side, [tokens][kvHeads][headDim]; token t begins at offset + t * tokenStride. */
export interface LayerRows {
  readonly data: Float32Array
  readonly offset: number
  readonly tokenStride: number
}

/** Some tokens in all layers. */
export interface TokenRows {
  readonly tokens: number
  readonly rows: Record<Side, readonly LayerRows[]>
  /** Of the loss with respect to `rows`. */
  readonly gradients: Record<Side, readonly LayerRows[]>
}

/**
 * The same tokens as Capture keeps for the same seed. Weights are squared gradients, float32 [tokensKept][layers][kvHeads][headDim]:
 * summed over the channels of a group they are its Fisher weight. Takes points * layers * kvHeads * headDim * 16 bytes.
 */
export class GradientSample implements Sample {
  readonly #shape: ModelShape
  readonly #points: number
  readonly #random: () => bigint
  readonly #rows: Record<Side, Float32Array>
  readonly #squares: Record<Side, Float32Array>
  #seen = 0

  /** @throws {CoupletError} `ERR_COUPLET_OUT_OF_MEMORY` */
  constructor({ shape, points, seed }: { shape: ModelShape; points: number; seed: number | bigint }) {
    requireInteger(points, 'points', 1)
    const { layers, kvHeads, headDim } = shape
    const array = () => resultArray(undefined, Float32Array, points * layers * kvHeads * headDim)
    this.#shape = shape
    this.#points = points
    this.#random = splitmix64(BigInt(seed))
    this.#rows = { key: array(), value: array() }
    this.#squares = { key: array(), value: array() }
  }

  /** @throws {CoupletError} `ERR_COUPLET_NOT_FINITE` for a gradient that is a NaN or an infinity; `token` counts from the first one added. */
  add({ tokens, rows, gradients }: TokenRows): void {
    const { layers, kvHeads, headDim } = this.#shape
    const width = kvHeads * headDim
    for (let token = 0; token < tokens; token++) {
      const slot = this.#drawSlot()
      for (const side of slot < 0 ? [] : sides) {
        for (let layer = 0; layer < layers; layer++) {
          const place = (slot * layers + layer) * width
          this.#rows[side].set(rowOf(rows[side][layer]!, token, width), place)
          const gradient = rowOf(gradients[side][layer]!, token, width)
          for (let i = 0; i < width; i++) {
            if (!Number.isFinite(gradient[i])) throw notFinite({ layer, kvHead: Math.floor(i / headDim), token: this.#seen - 1, channel: i % headDim }, side)
            this.#squares[side][place + i] = gradient[i]! ** 2
          }
        }
      }
    }
  }

  get tokensKept(): number {
    return Math.min(this.#seen, this.#points)
  }

  get keys(): Float32Array {
    return this.#kept(this.#rows.key)
  }

  get values(): Float32Array {
    return this.#kept(this.#rows.value)
  }

  get keyWeights(): Float32Array {
    return this.#kept(this.#squares.key)
  }

  get valueWeights(): Float32Array {
    return this.#kept(this.#squares.value)
  }

  /** Nothing native to let go of. */
  dispose(): void {}

  #kept(all: Float32Array): Float32Array {
    const { layers, kvHeads, headDim } = this.#shape
    return all.subarray(0, this.tokensKept * layers * kvHeads * headDim)
  }

  /** Of the next token, or -1: native/onnxruntime/capture.cc draws in the same way. */
  #drawSlot(): number {
    const index = this.#seen++
    if (index < this.#points) return index
    const slot = Number((this.#random() * BigInt(index + 1)) >> 64n)
    return slot < this.#points ? slot : -1
  }
}

function rowOf({ data, offset, tokenStride }: LayerRows, token: number, width: number): Float32Array {
  const start = offset + token * tokenStride
  return data.subarray(start, start + width)
}

function notFinite(place: { layer: number; kvHead: number; token: number; channel: number }, side: Side): CoupletError {
  const { layer, kvHead, token, channel } = place
  return new CoupletError('ERR_COUPLET_NOT_FINITE', `Expected finite gradients but the ${side} of layer ${layer}, kv head ${kvHead}, token ${token}, channel ${channel} has a NaN or an infinity`, place)
}

function splitmix64(seed: bigint): () => bigint {
  let state = BigInt.asUintN(64, seed)
  return () => {
    let z = (state = BigInt.asUintN(64, state + 0x9e3779b97f4a7c15n))
    z = BigInt.asUintN(64, (z ^ (z >> 30n)) * 0xbf58476d1ce4e5b9n)
    z = BigInt.asUintN(64, (z ^ (z >> 27n)) * 0x94d049bb133111ebn)
    return z ^ (z >> 31n)
  }
}

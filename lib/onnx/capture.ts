import { requireInteger, requireObject, resultArray } from '../arguments'
import { disposedError, throwExpected } from '../errors'
import { addon } from '../native/addon'
import type { NativeCapture } from '../native/onnxruntime'
import type { DecoderModel } from './model'

export interface CaptureOptions {
  model: DecoderModel
  /** Tokens kept at most. The sample takes points * layers * kvHeads * headDim * 8 bytes, and a little for weights. */
  points: number
  /**
   * `uniform`: keys and values alone. `attention`: how much the attention of its text pays to each token as well; every run then
   * has to begin with fresh sequences, and a text is what one run gives.
   */
  weights: 'uniform' | 'attention'
  /** Same seed, same tokens; default 0. */
  seed?: number | bigint
}

/** Tokens with their keys and values in every layer: what codebooks are learned from. */
export interface Sample {
  /** Tokens in the sample. */
  readonly tokensKept: number
  /** float32 [tokensKept][layers][kvHeads][headDim], before rotary embedding. */
  readonly keys: Float32Array
  /** float32 [tokensKept][layers][kvHeads][headDim] */
  readonly values: Float32Array
  /**
   * float32 [tokensKept][layers][kvHeads]: one weight for all groups of a head; or [tokensKept][layers][kvHeads][headDim]: the weight of a
   * group is the sum over its channels. undefined: all alike.
   */
  readonly keyWeights: Float32Array | undefined
  readonly valueWeights: Float32Array | undefined
  dispose(): void
}

/**
 * A uniform sample of the tokens that `model.run(rows, { capture })` runs, with the keys (before rotary embedding) and values
 * of every layer: what codebooks are learned from. Memory does not grow with the text. After a run that failed the sample is
 * not whole, and further runs with it reject with `ERR_COUPLET_BUSY`.
 */
export class Capture implements Sample {
  readonly #rowLength: number
  readonly #headDim: number
  #memory: { keys: Float32Array; values: Float32Array; keyWeights?: Float32Array; valueWeights?: Float32Array } | undefined
  #native: NativeCapture | undefined

  /** @throws {CoupletError} `ERR_COUPLET_OUT_OF_MEMORY` */
  constructor(options: CaptureOptions) {
    requireObject(options, 'options')
    const { model, points, weights, seed = 0 } = options
    requireObject(model, 'model')
    requireInteger(points, 'points', 1)
    if (!['uniform', 'attention'].includes(weights)) throwExpected('"uniform" or "attention"', 'weights', weights)
    if (!('shape' in model)) throwExpected('a DecoderModel', 'model', model) // the class itself is in a file that imports this one
    const { layers, queryHeads, kvHeads, headDim } = model.shape
    this.#headDim = headDim
    this.#rowLength = layers * kvHeads
    const rows = points * this.#rowLength
    const array = (length: number): Float32Array => resultArray(undefined, Float32Array, length)
    this.#memory = {
      keys: array(rows * headDim),
      values: array(rows * headDim),
      ...(weights === 'attention' && { keyWeights: array(rows), valueWeights: array(rows) }),
    }
    this.#native = addon().createCapture({ layers, queryHeads, kvHeads, headDim, points, seed, ...this.#memory })
  }

  /** @internal */
  get native(): NativeCapture {
    if (this.#native === undefined) throw disposedError('capture')
    return this.#native
  }

  /** Tokens that runs have shown so far. */
  get tokensSeen(): number {
    return addon().captureTokens(this.native).seen
  }

  /** Tokens in the sample: the smaller of tokensSeen and `points`. */
  get tokensKept(): number {
    return addon().captureTokens(this.native).kept
  }

  /** float32 [tokensKept][layers][kvHeads][headDim], before rotary embedding; a view that further runs write to. */
  get keys(): Float32Array {
    return this.#kept('keys', this.#headDim)!
  }

  /** float32 [tokensKept][layers][kvHeads][headDim]; a view that further runs write to. */
  get values(): Float32Array {
    return this.#kept('values', this.#headDim)!
  }

  /** float32 [tokensKept][layers][kvHeads]; undefined for uniform weights. */
  get keyWeights(): Float32Array | undefined {
    return this.#kept('keyWeights', 1)
  }

  /** float32 [tokensKept][layers][kvHeads]; undefined for uniform weights. */
  get valueWeights(): Float32Array | undefined {
    return this.#kept('valueWeights', 1)
  }

  /** Lets go of the sample; views that were taken stay valid. */
  dispose(): void {
    this.#native = undefined
    this.#memory = undefined
  }

  [Symbol.dispose](): void {
    this.dispose()
  }

  #kept(side: 'keys' | 'values' | 'keyWeights' | 'valueWeights', width: number): Float32Array | undefined {
    if (this.#memory === undefined) throw disposedError('capture')
    return this.#memory[side]?.subarray(0, this.tokensKept * this.#rowLength * width)
  }
}

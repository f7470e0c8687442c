/** Keys, values and weights of a calibration text, in the layout that methods read. */
import { type Captured, captureActivations, type SideActivations } from '../../lib/calibrate'
import { DecoderModel } from '../../lib/onnx/model'
import type { TwoVersionAttention } from './attention'
import type { LayeredModel, Rows } from './layers'
import type { Place } from './methods/method'

export interface Shape {
  readonly layers: number
  readonly kvHeads: number
  readonly headDim: number
}

export interface CalibrationOptions {
  model: LayeredModel
  attention: TwoVersionAttention
  /** Tokens of a chunk. */
  length: number
  threads: number
}

export class Calibration {
  readonly shape: Shape
  readonly #rows = new Map<string, Rows>()

  /**
   * @param captured with attention weights
   * @param withFisher the same tokens, with fisher weights
   * @param sides what `withFisher` has, by layer
   */
  private constructor(readonly captured: Captured, readonly withFisher: Captured, private readonly sides: Record<Place['side'], SideActivations[]>,
    readonly threads: number, private readonly model: LayeredModel, private readonly attention: TwoVersionAttention, private readonly length: number) {
    const { layers, kvHeads, headDim } = captured.model.shape
    this.shape = { layers, kvHeads, headDim }
  }

  /** Runs a text in chunks of `length` tokens, each a sequence of its own, and keeps all of it. */
  static async of(directory: string, tokens: ArrayLike<number>, { model, attention, length, threads }: CalibrationOptions): Promise<Calibration> {
    const whole = await DecoderModel.load(directory, { threads })
    const options = { text: tokens, length, points: tokens.length, heldOut: 0, threads }
    const captured = await captureActivations(whole, { ...options, weights: 'attention' })
    const withFisher = await captureActivations(whole, { ...options, weights: 'fisher' })
    const sides: Record<Place['side'], SideActivations[]> = { key: [], value: [] }
    for (let layer = 0; layer < whole.shape.layers; layer++) {
      for (const side of ['key', 'value'] as const) sides[side].push(await withFisher.sample.side(layer, side))
    }
    return new Calibration(captured, withFisher, sides, threads, model, attention, length)
  }

  get tokens(): number {
    return this.captured.sample.tokensKept
  }

  /** All tokens of one layer and side; keys before rotary embedding, or `rotated` at their place in their chunk. Not to be written. */
  rows({ layer, side }: Place, rotated = false): Rows {
    const name = `${layer} ${side} ${rotated}`
    let rows = this.#rows.get(name)
    if (!rows) this.#rows.set(name, (rows = this.#collect(layer, side, rotated && side === 'key')))
    return rows
  }

  /** Squared gradients of the loss, in the layout of {@link rows}. */
  fisher({ layer, side }: Place): Rows {
    return this.#headsFirst(this.sides[side][layer]!.weights!.map((gradient) => gradient ** 2))
  }

  dispose(): void {
    this.captured.dispose()
    this.withFisher.dispose()
    this.captured.model.dispose()
  }

  #collect(layer: number, side: 'key' | 'value', rotated: boolean): Rows {
    const rows = this.#headsFirst(this.sides[side][layer]!.rows)
    return rotated ? this.#rotate(layer, rows) : rows
  }

  /** From [tokens][kvHeads][headDim]. */
  #headsFirst(all: Float32Array): Rows {
    const { kvHeads, headDim } = this.shape
    const { tokens } = this
    const data = new Float32Array(kvHeads * tokens * headDim)
    for (let token = 0; token < tokens; token++) {
      for (let head = 0; head < kvHeads; head++) {
        const from = (token * kvHeads + head) * headDim
        data.set(all.subarray(from, from + headDim), (head * tokens + token) * headDim)
      }
    }
    return { data, heads: kvHeads, tokens, channels: headDim }
  }

  /** Every chunk begins at position 0; a head's tokens of one chunk are one matrix. */
  #rotate(layer: number, rows: Rows): Rows {
    const { tokens, channels } = rows
    for (let head = 0; head < rows.heads; head++) {
      for (let start = 0; start < tokens; start += this.length) {
        const count = Math.min(this.length, tokens - start)
        const first = (head * tokens + start) * channels
        const chunk = { data: rows.data.subarray(first, first + count * channels), heads: 1, tokens: count, channels }
        this.attention.rotate(this.model.layers[layer]!, chunk, 0)
      }
    }
    return rows
  }
}

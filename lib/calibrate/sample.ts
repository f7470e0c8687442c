/** A uniform sample of tokens with their keys, values and weights in every layer: what centroids are learned from. */
import { requireInteger, resultArray } from '../arguments'
import { disposedError } from '../errors'
import type { Side } from '../gradient/attention'
import { sides } from '../gradient/attention'
import type { ModelShape } from '../onnx/decoder'

/** Rows of one layer and side; token t begins at offset + t * tokenStride. */
export interface LayerRows {
  readonly data: Float32Array
  readonly offset: number
  readonly tokenStride: number
}

/** Some tokens in all layers. */
export interface TokenRows {
  readonly tokens: number
  /** [kvHeads][headDim] a token. */
  readonly rows: Record<Side, readonly LayerRows[]>
  /** As WeightWidth says; absent for uniform weights. */
  readonly weights?: Record<Side, readonly LayerRows[]>
}

/** How many weights a token has in a layer and side: none, [kvHeads], or [kvHeads][headDim]. */
export type WeightWidth = 'none' | 'heads' | 'channels'

/** The sample of one layer and side. */
export interface SideActivations {
  /** float32 [tokensKept][kvHeads][headDim], keys before rotary embedding. */
  readonly rows: Float32Array
  /**
   * float32 [tokensKept][kvHeads]: one weight for all groups of a head; or gradients, [tokensKept][kvHeads][headDim]: the weight of a
   * group is the sum of their squares over its channels. undefined: all alike.
   */
  readonly weights: Float32Array | undefined
}

/** A sample, of which a layer and side at a time is read. */
export interface Activations {
  readonly tokensKept: number
  /** Not to be written: it may be the sample's own memory. */
  side(layer: number, side: 'key' | 'value'): Promise<SideActivations>
}

/** Which array of a sample. */
export interface SamplePart {
  layer: number
  side: Side
  kind: 'rows' | 'weights'
}

/** Slots from `slot` on, and what they now hold. */
export interface SlotRun {
  slot: number
  data: Float32Array
}

/** Where a sample lies: arrays of slots of `width` elements. Writing the same again changes nothing. */
export interface SampleStore {
  write(part: SamplePart, width: number, runs: readonly SlotRun[]): Promise<void>
  /** The first `slots`, float32 [slots][width]. */
  read(part: SamplePart, width: number, slots: number): Promise<Float32Array>
  /** Lets go of what it holds in memory. */
  dispose(): void
}

/** In memory, which grows by doubling up to `points` slots. */
export class MemoryStore implements SampleStore {
  readonly #points: number
  readonly #arrays = new Map<string, Float32Array>()
  #disposed = false

  constructor(points: number) {
    this.#points = points
  }

  /** Bytes of all arrays. */
  get bytes(): number {
    return [...this.#arrays.values()].reduce((sum, { byteLength }) => sum + byteLength, 0)
  }

  /** @throws {CoupletError} `ERR_COUPLET_OUT_OF_MEMORY` */
  // eslint-disable-next-line @typescript-eslint/require-await -- other stores wait
  async write(part: SamplePart, width: number, runs: readonly SlotRun[]): Promise<void> {
    const name = partName(part)
    for (const { slot, data } of runs) {
      let array = this.#arrays.get(name)
      const end = slot * width + data.length
      if (array === undefined || array.length < end) {
        const larger = resultArray(undefined, Float32Array, Math.min(this.#points * width, Math.max(end, 2 * (array?.length ?? 0))))
        if (array) larger.set(array)
        this.#arrays.set(name, (array = larger))
      }
      array.set(data, slot * width)
    }
  }

  // eslint-disable-next-line @typescript-eslint/require-await -- other stores wait
  async read(part: SamplePart, width: number, slots: number): Promise<Float32Array> {
    if (this.#disposed) throw disposedError('sample')
    return this.#arrays.get(partName(part))?.subarray(0, slots * width) ?? new Float32Array(0)
  }

  dispose(): void {
    this.#disposed = true
    this.#arrays.clear()
  }
}

export const partName = ({ layer, side, kind }: SamplePart): string => `layers.${layer}.${side}.${kind}`

/**
 * A reservoir: every token added so far is in it with the same probability, and which ones they are depends on their number and
 * the seed alone. The same tokens as onnx/Capture keeps for the same seed.
 */
export class ActivationSample implements Activations {
  readonly #shape: ModelShape
  readonly #points: number
  readonly #weightWidth: number
  readonly #store: SampleStore
  readonly #random: () => bigint
  #seen = 0

  constructor({ shape, points, seed, weights, store }: {
    shape: ModelShape; points: number; seed: number | bigint; weights: WeightWidth; store: SampleStore
  }) {
    requireInteger(points, 'points', 1)
    this.#shape = shape
    this.#points = points
    this.#weightWidth = { none: 0, heads: shape.kvHeads, channels: shape.kvHeads * shape.headDim }[weights]
    this.#store = store
    this.#random = splitmix64(BigInt(seed))
  }

  get tokensKept(): number {
    return Math.min(this.#seen, this.#points)
  }

  async add({ tokens, rows, weights }: TokenRows): Promise<void> {
    const slots = Array.from({ length: tokens }, () => this.#drawSlot())
    const { kvHeads, headDim, layers } = this.#shape
    for (let layer = 0; layer < layers; layer++) {
      for (const side of sides) {
        await this.#write({ layer, side, kind: 'rows' }, kvHeads * headDim, rows[side][layer]!, slots)
        if (weights) await this.#write({ layer, side, kind: 'weights' }, this.#weightWidth, weights[side][layer]!, slots)
      }
    }
  }

  /** Counts tokens that were added to the same store in an earlier process. */
  skip(tokens: number): void {
    for (let token = 0; token < tokens; token++) this.#drawSlot()
  }

  async side(layer: number, side: Side): Promise<SideActivations> {
    const { kvHeads, headDim } = this.#shape
    return {
      rows: await this.#store.read({ layer, side, kind: 'rows' }, kvHeads * headDim, this.tokensKept),
      weights: this.#weightWidth === 0 ? undefined : await this.#store.read({ layer, side, kind: 'weights' }, this.#weightWidth, this.tokensKept),
    }
  }

  /** Neighbouring tokens in neighbouring slots are written at once. */
  async #write(part: SamplePart, width: number, { data, offset, tokenStride }: LayerRows, slots: readonly number[]): Promise<void> {
    const runs: SlotRun[] = []
    for (let token = 0, end = 0; token < slots.length; token = end) {
      const slot = slots[token]!
      end = token + 1
      if (slot < 0) continue
      while (slots[end] === slot + (end - token)) end++
      const run = new Float32Array((end - token) * width)
      for (let t = token; t < end; t++) {
        const start = offset + t * tokenStride
        run.set(data.subarray(start, start + width), (t - token) * width)
      }
      runs.push({ slot, data: run })
    }
    if (runs.length > 0) await this.#store.write(part, width, runs)
  }

  /** Of the next token, or -1: native/onnxruntime/capture.cc draws in the same way. */
  #drawSlot(): number {
    const index = this.#seen++
    if (index < this.#points) return index
    const slot = Number((this.#random() * BigInt(index + 1)) >> 64n)
    return slot < this.#points ? slot : -1
  }
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

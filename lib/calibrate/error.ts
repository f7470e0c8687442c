/** What codes lose of keys and values, as a share of their variance. */
import type { SidePart } from '../codec'
import { decode, encode } from '../codes'
import { enterSide } from '../transform/apply'
import type { SideTransforms } from '../transform/learn'
import type { SideActivations } from './sample'

/** Tokens that are coded at a time; adding up those of 8 heads of 128 channels takes some 3 ms of the JavaScript thread. */
const sliceTokens = 512

/** One layer and side, and what codes it. */
export interface CodedPlace {
  readonly kvHeads: number
  readonly headDim: number
  readonly parts: readonly SidePart[]
  /** The parts one after another, float32 [heads][groups][centroids][groupChannels]. */
  readonly table: Float32Array
  readonly transforms?: SideTransforms
  readonly threads?: number | undefined
}

/** Sums over any number of tokens of one layer and side, from which their coded error comes. */
export class CodedError {
  readonly #place: CodedPlace
  /** [kvHeads] squared distances to the centroids; [kvHeads][headDim] sums of rows, their squares, and weights. */
  readonly #lost: Float64Array
  readonly #sums: Float64Array
  readonly #squares: Float64Array
  readonly #weights: Float64Array

  constructor(place: CodedPlace) {
    this.#place = place
    const channels = place.kvHeads * place.headDim
    this.#lost = new Float64Array(place.kvHeads)
    this.#sums = new Float64Array(channels)
    this.#squares = new Float64Array(channels)
    this.#weights = new Float64Array(channels)
  }

  /** Rows and gradients as they are coded: what is added is of these. */
  mixed(side: SideActivations, tokens: number): Promise<SideActivations> {
    const { transforms = {}, kvHeads, headDim } = this.#place
    return enterSide(side, transforms, { tokens, kvHeads, headDim })
  }

  /**
   * @param weights [tokens][kvHeads], or those of groups for each of their channels, [tokens][kvHeads][headDim]; undefined: all alike
   */
  async add({ rows, weights }: SideActivations, tokens: number, signal?: AbortSignal): Promise<void> {
    const { kvHeads, headDim, parts, table, transforms: { metric } = {}, threads } = this.#place
    const width = kvHeads * headDim
    for (let first = 0; first < tokens; first += sliceTokens) {
      const count = Math.min(sliceTokens, tokens - first)
      const slice = rows.subarray(first * width, (first + count) * width)
      const decoded = new Float32Array(slice.length)
      let [at, matrix] = [0, 0]
      for (const { firstHead, heads, codec } of parts) {
        const tables = table.subarray(at, at += heads * headDim * codec.centroids)
        const call = { codec, tokens: count, kvHeads: heads, headDim, tables, tokenStride: width, threads, signal }
        const near = metric?.subarray(matrix, matrix += heads * headDim * codec.groupChannels)
        const codes = await encode(slice.subarray(firstHead * headDim), { ...call, metric: near })
        await decode(codes, { ...call, out: decoded.subarray(firstHead * headDim) })
      }
      const weightWidth = weights ? weights.length / tokens : 0
      this.#accumulate(slice, decoded, weights?.subarray(first * weightWidth, (first + count) * weightWidth))
    }
  }

  get parts(): readonly SidePart[] {
    return this.#place.parts
  }

  /** Of all heads: 0 when nothing is lost, 1 when centroids are no better than the mean; 0 for rows that are all alike. */
  get share(): number {
    const { kvHeads } = this.#place
    const heads = Array.from({ length: kvHeads }, (_, head) => head)
    return quotient(this.#lost.reduce((sum, lost) => sum + lost, 0), heads.reduce((sum, head) => sum + this.#variance(head), 0))
  }

  /** Of each kv head. */
  get headShares(): number[] {
    return [...this.#lost].map((lost, head) => quotient(lost, this.#variance(head)))
  }

  #variance(head: number): number {
    const { headDim } = this.#place
    let variance = 0
    for (let channel = head * headDim; channel < (head + 1) * headDim; channel++) {
      const weight = this.#weights[channel]!
      if (weight > 0) variance += Math.max(0, this.#squares[channel]! - this.#sums[channel]! ** 2 / weight)
    }
    return variance
  }

  #accumulate(rows: Float32Array, decoded: Float32Array, weights: Float32Array | undefined): void {
    const { kvHeads, headDim } = this.#place
    const sharing = weights ? rows.length / weights.length : 1 // neighbouring channels have one weight
    for (let at = 0; at < rows.length;) {
      for (let head = 0, channel = 0; head < kvHeads; head++) {
        let lost = 0
        for (const end = channel + headDim; channel < end; channel++, at++) {
          const weight = weights ? weights[Math.floor(at / sharing)]! : 1
          const x = rows[at]!
          lost += weight * (x - decoded[at]!) ** 2
          this.#sums[channel]! += weight * x
          this.#squares[channel]! += weight * x * x
          this.#weights[channel]! += weight
        }
        this.#lost[head]! += lost
      }
    }
  }
}

function quotient(lost: number, variance: number): number {
  return variance > 0 ? lost / variance : 0
}

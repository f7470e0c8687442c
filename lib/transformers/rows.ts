/** Elements of a cache tensor: float32, or the bits of float16. */
export type Elements = Float32Array | Uint16Array

/** A run of tokens in full precision, [heads][tokens][channels], that grows at its end and may shrink at its front. */
export class Rows {
  readonly heads: number
  readonly channels: number
  #data: Elements
  #start = 0
  #length = 0
  #capacity = 0

  constructor(like: Elements, heads: number, channels: number) {
    this.#data = empty(like, 0)
    this.heads = heads
    this.channels = channels
  }

  get length(): number {
    return this.#length
  }

  get bytes(): number {
    return this.#data.byteLength
  }

  /** Appends tokens [from, to) of `source`, [heads][sourceTokens][channels]. */
  push(source: Elements, sourceTokens: number, from: number, to: number): void {
    const added = to - from
    if (this.#start + this.#length + added > this.#capacity) this.#move(this.#length + added)
    for (let head = 0; head < this.heads; head += 1) {
      const first = (head * sourceTokens + from) * this.channels
      this.#data.set(source.subarray(first, first + added * this.channels), (head * this.#capacity + this.#start + this.#length) * this.channels)
    }
    this.#length += added
  }

  /** Forgets the first `count` tokens. */
  drop(count: number): void {
    this.#start += count
    this.#length -= count
  }

  /** Copies all tokens to `target`, [heads][targetTokens][channels], from its token `at` on. */
  copyTo(target: Elements, targetTokens: number, at: number): void {
    for (let head = 0; head < this.heads; head += 1) {
      const first = (head * this.#capacity + this.#start) * this.channels
      target.set(this.#data.subarray(first, first + this.#length * this.channels), (head * targetTokens + at) * this.channels)
    }
  }

  /** To the front of a buffer that has room for `needed` tokens and half as many again. */
  #move(needed: number): void {
    const capacity = Math.max(8, needed + (needed >> 1))
    const data = empty(this.#data, this.heads * capacity * this.channels)
    this.copyTo(data, capacity, 0)
    this.#data = data
    this.#capacity = capacity
    this.#start = 0
  }
}

export function empty(like: Elements, length: number): Elements {
  return like instanceof Float32Array ? new Float32Array(length) : new Uint16Array(length)
}

/** Ids of a text, shared by every list that grew out of it. `ids` below `used` never change. */
interface Storage {
  ids: Int32Array
  used: number
}

/**
 * An immutable list of token ids. A list made by `append` shares the storage of the one it extends, so a text that grows by
 * one token per step costs four bytes per token however many of its states are held.
 */
export class TokenList {
  readonly length: number
  readonly #storage: Storage

  private constructor(storage: Storage, length: number) {
    this.#storage = storage
    this.length = length
  }

  static of(ids: ArrayLike<number> = []): TokenList {
    return new TokenList({ ids: Int32Array.from(ids), used: ids.length }, ids.length)
  }

  /** This text followed by `ids`. */
  append(ids: ArrayLike<number>): TokenList {
    let storage = this.#storage
    const length = this.length + ids.length
    // Another list already went on from here with other tokens: they keep the storage, this one moves.
    const taken = storage.used !== this.length
    if (taken || length > storage.ids.length) {
      const grown = new Int32Array(Math.max(64, length, 2 * this.length))
      grown.set(this.view(0))
      if (taken) storage = { ids: grown, used: this.length }
      else storage.ids = grown
    }
    storage.ids.set(ids, this.length)
    storage.used = length
    return new TokenList(storage, length)
  }

  /** The first `length` tokens. */
  prefix(length: number): TokenList {
    return length >= this.length ? this : new TokenList(this.#storage, length)
  }

  /** How many first tokens both texts have in common. */
  commonPrefix(other: TokenList): number {
    const length = Math.min(this.length, other.length)
    if (this.#storage === other.#storage) return length
    const mine = this.#storage.ids
    const theirs = other.#storage.ids
    let common = 0
    while (common < length && mine[common] === theirs[common]) common += 1
    return common
  }

  /** Tokens from `start` on; a view, valid as long as it is only read. */
  view(start: number): Int32Array {
    return this.#storage.ids.subarray(start, this.length)
  }
}

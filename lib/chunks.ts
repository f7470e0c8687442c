/** Consecutive pieces of `length` tokens; the last one is shorter, and is left out when it has fewer than `least`. */
export function* chunks(tokens: ArrayLike<number>, length: number, least = 1): Generator<number[]> {
  for (let start = 0; start + least <= tokens.length; start += length) {
    yield Array.prototype.slice.call(tokens, start, start + length) as number[]
  }
}

/** How many pieces `chunks` yields. */
export function countChunks(tokens: number, length: number, least = 1): number {
  const whole = Math.floor(tokens / length)
  return whole + (tokens - whole * length >= least ? 1 : 0)
}

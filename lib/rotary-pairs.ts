/** Orders of a head's channels, channel order[c] of the model at place c, and what rotary embedding asks of them: pairs stay pairs. */

/** Channels of a head that are rotated together, as a RotarySpec has them. */
export interface RotaryPairs {
  /** half: channel i pairs with i + dim / 2. interleaved: 2i pairs with 2i + 1. */
  readonly kind: 'half' | 'interleaved'
  /** Channels that are rotated. */
  readonly dim: number
}

/** The places of pair `pair`, x before y. */
export function pairPlaces({ kind, dim }: RotaryPairs, pair: number): readonly [number, number] {
  return kind === 'half' ? [pair, pair + dim / 2] : [2 * pair, 2 * pair + 1]
}

export function isOrder(order: ArrayLike<number>, count: number): boolean {
  const channels = new Set(Array.from(order))
  return order.length === count && channels.size === count && [...channels].every((channel) => Number.isInteger(channel) && channel >= 0 && channel < count)
}

/** Which pair of the model stands where a pair is to be; undefined for an order that parts a pair, or turns one round. */
export function pairOrder(order: ArrayLike<number>, rotary: RotaryPairs): Int32Array | undefined {
  const pairs = Int32Array.from({ length: rotary.dim / 2 }, (_, place) => {
    const x = order[pairPlaces(rotary, place)[0]]!
    return rotary.kind === 'half' ? x : x / 2
  })
  const isWhole = pairs.every((pair, place) => {
    const [places, channels] = [pairPlaces(rotary, place), pairPlaces(rotary, pair)]
    return pair < pairs.length && order[places[0]] === channels[0] && order[places[1]] === channels[1]
  })
  return isWhole ? pairs : undefined
}

/** The order that undoes another one. */
export function inverseOrder(order: Int32Array): Int32Array {
  const inverse = new Int32Array(order.length)
  order.forEach((channel, place) => { inverse[channel] = place })
  return inverse
}

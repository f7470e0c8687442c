/** The best use of a budget: one choice for each of many pieces. */
import { rangeError } from '../errors'

export interface Choice {
  /** A positive integer. */
  readonly cost: number
  readonly loss: number
}

/**
 * The choice of every piece for which the losses add up to the least while the costs stay within `budget`: exact, by dynamic programming.
 * Of equal losses the cheaper one is taken. Memory: pieces * budget / (greatest common divisor of the costs) bytes.
 *
 * @throws {RangeError} `ERR_COUPLET_INVALID_ARGUMENT` when even the cheapest choices cost more
 */
export function allocate(pieces: readonly (readonly Choice[])[], budget: number): number[] {
  const unit = pieces.flat().reduce((divisor, { cost }) => greatestCommonDivisor(divisor, cost), 0)
  const most = Math.floor(budget / unit)
  // lowest[c]: least loss of the pieces so far at a cost of exactly c units.
  let lowest = new Float64Array(most + 1).fill(Infinity)
  lowest[0] = 0
  const taken = pieces.map((choices) => {
    const next = new Float64Array(most + 1).fill(Infinity)
    const choice = new Uint8Array(most + 1)
    choices.forEach(({ cost, loss }, index) => {
      const units = cost / unit
      for (let total = units; total <= most; total++) {
        const sum = lowest[total - units]! + loss
        if (sum < next[total]!) {
          next[total] = sum
          choice[total] = index
        }
      }
    })
    lowest = next
    return choice
  })
  let total = lowest.reduce((best, loss, index) => (loss < lowest[best]! ? index : best), 0)
  if (lowest[total] === Infinity) throw rangeError(`Expected a budget that the cheapest codecs fit in but received ${budget}`)
  const result: number[] = []
  for (let piece = pieces.length - 1; piece >= 0; piece--) {
    const index = taken[piece]![total]!
    result.unshift(index)
    total -= pieces[piece]![index]!.cost / unit
  }
  return result
}

function greatestCommonDivisor(a: number, b: number): number {
  return b === 0 ? a : greatestCommonDivisor(b, a % b)
}

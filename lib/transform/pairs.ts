/** Which rotary pairs share codes: those whose channels vary together, alike in all kv heads of a layer, as their angles are. */
import { setImmediate } from 'node:timers/promises'
import type { Codec } from '../codec'
import type { RotaryPairs } from '../rotary-pairs'
import { pairPlaces } from '../rotary-pairs'
import { codedVariance } from './grouping'
import { eigenvalues, lowerRoot } from './matrix'

/** Of one kv head, float64 [headDim][headDim]: how its channels vary together, and what their errors weigh. */
export interface HeadMoments {
  covariance: Float64Array
  importance: Float64Array
  codec: Codec
}

/** A swap has to save so much of what all codes leave, or sweeps would never end. */
const leastGain = 1e-6
const mostSweeps = 20

/**
 * An order of channels, channel order[c] of the model at place c, in which consecutive groups leave little of the variance when each is
 * coded in its bits: swaps of two pairs, or of two channels that are not rotated, while one helps.
 * @param rotary null: no channel is rotated
 */
export async function pairedOrder(heads: readonly HeadMoments[], headDim: number, rotary: RotaryPairs | null): Promise<Int32Array> {
  const order = Int32Array.from({ length: headDim }, (_, channel) => channel)
  const pairs = Array.from({ length: (rotary?.dim ?? 0) / 2 }, (_, pair) => pairPlaces(rotary!, pair))
  const others = Array.from({ length: headDim - 2 * pairs.length }, (_, channel) => [2 * pairs.length + channel])
  const costs = heads.map((head) => Float64Array.from({ length: headDim / head.codec.groupChannels }, (_, group) => groupCost(head, order, headDim, group)))
  const total = costs.flatMap((of) => [...of]).reduce((sum, cost) => sum + cost, 0)

  /** Swaps what stands at some places with what stands at others, if that helps. */
  const improve = (one: readonly number[], other: readonly number[]): boolean => {
    const swap = () => { one.forEach((place, i) => { [order[place], order[other[i]!]] = [order[other[i]!]!, order[place]!] }) }
    swap()
    let saved = 0
    const touched = heads.map(({ codec: { groupChannels } }) => changedGroups(one, other, groupChannels))
    const changed = touched.map((groups, head) => groups.map((group) => {
      const cost = groupCost(heads[head]!, order, headDim, group)
      saved += costs[head]![group]! - cost
      return cost
    }))
    if (!(saved > leastGain * total)) {
      swap()
      return false
    }
    changed.forEach((list, head) => { list.forEach((cost, i) => { costs[head]![touched[head]![i]!] = cost }) })
    return true
  }

  for (let sweep = 0, moved = true; moved && sweep < mostSweeps; sweep++) {
    moved = false
    for (const places of [pairs, others]) {
      for (let one = 0; one < places.length; one++) {
        for (let other = one + 1; other < places.length; other++) moved = improve(places[one]!, places[other]!) || moved
        await setImmediate() // some 10 ms for 8 heads of 128 channels
      }
    }
  }
  return order
}

/** Groups that a swap of these places changes. */
function changedGroups(one: readonly number[], other: readonly number[], groupChannels: number): number[] {
  const groupsOf = (places: readonly number[]) => places.map((place) => Math.floor(place / groupChannels))
  const newTo = (groups: readonly number[], others: readonly number[]) => groups.filter((group, i) => groups.indexOf(group) === i && !others.includes(group))
  const [mine, theirs] = [groupsOf(one), groupsOf(other)]
  return [...newTo(mine, theirs), ...newTo(theirs, mine)]
}

/** What a code leaves of a group's channels, weighed by their importance: that of the eigenvalues of Lᵀ C L, with W = L Lᵀ. */
function groupCost({ covariance, importance, codec: { groupChannels, codeBits } }: HeadMoments, order: Int32Array, headDim: number, group: number): number {
  const size = groupChannels
  const first = group * size
  const blockOf = (matrix: Float64Array): Float64Array => {
    const block = new Float64Array(size * size)
    for (let i = 0; i < size; i++) for (let j = 0; j < size; j++) block[i * size + j] = matrix[order[first + i]! * headDim + order[first + j]!]!
    return block
  }
  const [root, own] = [lowerRoot(blockOf(importance), size), blockOf(covariance)]
  const [half, whole] = [new Float64Array(size * size), new Float64Array(size * size)]
  for (let i = 0; i < size; i++) {
    for (let j = 0; j < size; j++) for (let k = j; k < size; k++) half[i * size + j]! += own[i * size + k]! * root[k * size + j]!
  }
  for (let i = 0; i < size; i++) {
    for (let j = 0; j <= i; j++) {
      for (let k = i; k < size; k++) whole[i * size + j]! += root[k * size + i]! * half[k * size + j]!
      whole[j * size + i] = whole[i * size + j]!
    }
  }
  const values = eigenvalues(whole, size)
  const least = 1e-12 * Math.max(Number.MIN_VALUE * 2 ** 60, ...values)
  return codedVariance(Array.from(values, (value) => Math.max(value, least)), codeBits)
}

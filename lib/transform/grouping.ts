/** Which channels share a code, where channels do not depend on one another: dealt out by how much each varies. */

/**
 * Least mean squared error of coding independent Gaussian channels of these variances in `bits` bits together: reverse
 * water-filling. Channels below the water level are not coded at all.
 */
export function codedVariance(variances: readonly number[], bits: number): number {
  const descending = [...variances].sort((a, b) => b - a)
  let [logs, rest] = [0, descending.reduce((sum, value) => sum + value, 0)]
  for (const [index, variance] of descending.entries()) {
    logs += Math.log2(variance)
    rest -= variance
    const level = 2 ** ((logs - 2 * bits) / (index + 1))
    if (level >= (descending[index + 1] ?? 0)) return (index + 1) * level + rest
  }
  return 0
}

/** An order of channels whose consecutive groups have little coded variance together: swaps of two channels, while one helps. */
export function balancedOrder(variances: Float64Array, { groupChannels, codeBits }: { groupChannels: number; codeBits: number }): number[] {
  const least = 1e-12 * Math.max(Number.MIN_VALUE * 2 ** 60, ...variances)
  const floored = Array.from(variances, (variance) => Math.max(variance, least))
  const count = floored.length / groupChannels
  const descending = floored.map((_, channel) => channel).sort((a, b) => floored[b]! - floored[a]!)
  // There and back again over the groups, so that each has some of the largest and some of the smallest.
  const groups = Array.from({ length: count }, (_, group) =>
    descending.filter((_, rank) => (Math.floor(rank / count) % 2 === 0 ? rank % count : count - 1 - (rank % count)) === group))
  const costOf = (group: readonly number[]): number => codedVariance(group.map((channel) => floored[channel]!), codeBits)
  const costs = groups.map(costOf)
  const total = costs.reduce((sum, cost) => sum + cost, 0)
  const improve = (a: number, b: number): boolean => {
    for (let i = 0; i < groupChannels; i++) {
      for (let j = 0; j < groupChannels; j++) {
        const [one, other] = [groups[a]!.slice(), groups[b]!.slice()]
        const [mine, theirs] = [one[i]!, other[j]!]
        one[i] = theirs
        other[j] = mine
        const [costA, costB] = [costOf(one), costOf(other)]
        if (costA + costB >= costs[a]! + costs[b]! - 1e-6 * total) continue
        groups[a] = one
        groups[b] = other
        costs[a] = costA
        costs[b] = costB
        return true
      }
    }
    return false
  }
  for (let sweep = 0, moved = true; moved && sweep < 20; sweep++) {
    moved = false
    for (let a = 0; a < count; a++) for (let b = a + 1; b < count; b++) while (improve(a, b)) moved = true
  }
  return groups.flat()
}

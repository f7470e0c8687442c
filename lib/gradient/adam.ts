/** Adam (Kingma and Ba, arXiv:1412.6980) for one table of centroids; the size of its steps is relative to the spread of each group. */

const meanDecay = 0.9
const squareDecay = 0.99
const epsilon = 1e-12

export interface AdamState {
  /** float32, of the table's length: running means of the gradient and of its square. */
  readonly mean: Float32Array
  readonly square: Float32Array
}

export interface AdamStep {
  /** From 1. */
  readonly step: number
  readonly rate: number
  /** Of the groups, which stand one after another in the table. */
  readonly spreads: Float64Array
}

/** For each group of [groups][centroids][groupChannels]: root of the mean variance of its channels over the centroids. */
export function groupSpreads(table: Float32Array, centroids: number, groupChannels: number): Float64Array {
  const size = centroids * groupChannels
  return Float64Array.from({ length: table.length / size }, (_, group) => {
    let variance = 0
    for (let channel = 0; channel < groupChannels; channel++) {
      let sum = 0
      let squares = 0
      for (let i = group * size + channel; i < (group + 1) * size; i += groupChannels) sum += table[i]!
      for (let i = group * size + channel; i < (group + 1) * size; i += groupChannels) squares += (table[i]! - sum / centroids) ** 2
      variance += squares / centroids / groupChannels
    }
    return Math.sqrt(variance)
  })
}

/** Moves a table one step against its gradient. */
export function adamStep(table: Float32Array, gradient: Float32Array, { mean, square }: AdamState, { step, rate, spreads }: AdamStep): void {
  const meanScale = 1 / (1 - meanDecay ** step)
  const squareScale = 1 / (1 - squareDecay ** step)
  const size = table.length / spreads.length
  for (let i = 0; i < table.length; i++) {
    const slope = gradient[i]!
    mean[i] = meanDecay * mean[i]! + (1 - meanDecay) * slope
    square[i] = squareDecay * square[i]! + (1 - squareDecay) * slope * slope
    // A centroid that no token was coded to so far has two zeros, and stays.
    table[i]! -= (rate * spreads[Math.floor(i / size)]! * mean[i]! * meanScale) / (Math.sqrt(square[i]! * squareScale) + epsilon)
  }
}

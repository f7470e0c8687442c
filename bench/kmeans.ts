import { kmeansSync } from '../lib/kmeans'
import { measure, normals } from './measure'
import type { Table } from './report'

export interface KmeansShape { problems: number; points: number; centroids: number; channels: number; iterations: number; threads: number }

export async function benchKmeans(shape: KmeansShape): Promise<Table> {
  const points = normals(shape.problems * shape.points * shape.channels, 1)
  const options = { ...shape, tolerance: 0, seed: 1 }
  const result = kmeansSync(points, { ...options, assignments: true })
  checkKmeans(points, shape, result.centroids, result.assignments ?? new Int32Array(), result.inertia)
  const timing = await measure(() => kmeansSync(points, options), { repeats: 3 })
  const flops = 2 * shape.problems * shape.points * shape.centroids * shape.channels * shape.iterations
  return {
    operation: 'kmeans',
    shape: { ...shape },
    unit: 'CPU milliseconds a problem; GFLOP/s = 2 * points * centroids * channels * iterations / CPU time (seeding not counted)',
    rows: [{
      what: 'couplet',
      value: timing.cpu * 1e3 / shape.problems,
      rate: `${(flops / timing.cpu / 1e9).toFixed(1)} GFLOP/s`,
      wallMs: timing.wall * 1e3,
      repeats: timing.repeats,
    }],
  }
}

// In double precision: every sampled point is with a centroid as near as any, and inertia is the sum of the distances.
export function checkKmeans(points: Float32Array, shape: KmeansShape, tables: Float32Array, assignments: Int32Array, inertia: Float64Array): void {
  const { points: count, centroids, channels } = shape
  let sum = 0
  for (let n = 0; n < count; n++) {
    const distance = (k: number) => {
      let total = 0
      for (let c = 0; c < channels; c++) total += ((points[n * channels + c] as number) - (tables[k * channels + c] as number)) ** 2
      return total
    }
    const own = distance(assignments[n] as number)
    sum += own
    if (n % 97 === 0) for (let k = 0; k < centroids; k++) if (distance(k) < own * (1 - 1e-4)) throw new Error(`point ${n} is nearer to centroid ${k}`)
  }
  if (Math.abs(sum / (inertia[0] as number) - 1) > 1e-4) throw new Error(`inertia is ${inertia[0]}, the distances sum to ${sum}`)
}

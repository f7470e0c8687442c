/** k-means in double precision and without a thought for speed: what the addon's results are held against. */

export interface Problem {
  /** [points][channels] */
  points: Float32Array
  channels: number
  /** [points] */
  weights: ArrayLike<number>
}

export function squaredDistance(points: ArrayLike<number>, point: number, centroids: ArrayLike<number>, centroid: number, channels: number): number {
  let sum = 0
  for (let channel = 0; channel < channels; channel++)
    sum += ((points[point * channels + channel] ?? NaN) - (centroids[centroid * channels + channel] ?? NaN)) ** 2
  return sum
}

/** Weighted squared distance of every point to its nearest centroid, and which that is. */
export function evaluate({ points, channels, weights }: Problem, centroids: ArrayLike<number>): { inertia: number; nearest: number[] } {
  const nearest: number[] = []
  let inertia = 0
  for (let point = 0; point < points.length / channels; point++) {
    let best = 0
    let distance = Infinity
    for (let centroid = 0; centroid < centroids.length / channels; centroid++) {
      const candidate = squaredDistance(points, point, centroids, centroid, channels)
      if (candidate < distance) {
        best = centroid
        distance = candidate
      }
    }
    nearest.push(best)
    inertia += (weights[point] ?? NaN) * distance
  }
  return { inertia, nearest }
}

/** k-means++ (probability ~ weight * distance squared) and Lloyd until nothing moves; random() in [0, 1). */
export function kmeans(problem: Problem, centroidCount: number, random: () => number): number {
  const { points, channels, weights } = problem
  const count = points.length / channels
  const pick = (mass: number[]): number => {
    let left = random() * mass.reduce((sum, value) => sum + value, 0)
    const found = mass.findIndex((value) => (left -= value) < 0)
    return found < 0 ? count - 1 : found
  }
  let centroids: number[] = []
  for (let chosen = 0; chosen < centroidCount; chosen++) {
    const distances = Array.from({ length: count }, (_, point) => {
      let least = chosen === 0 ? 1 : Infinity
      for (let other = 0; other < chosen; other++) least = Math.min(least, squaredDistance(points, point, centroids, other, channels))
      return least * (weights[point] ?? NaN)
    })
    const point = pick(distances)
    centroids.push(...points.subarray(point * channels, (point + 1) * channels))
  }
  let { inertia, nearest } = evaluate(problem, centroids)
  for (let iteration = 0; iteration < 100; iteration++) {
    centroids = means(problem, nearest, centroids)
    const next = evaluate(problem, centroids)
    if (next.inertia >= inertia) break
    ;({ inertia, nearest } = next)
  }
  return inertia
}

/** Weighted means of the points of each centroid; a centroid without weight stays where it is. */
export function means({ points, channels, weights }: Problem, nearest: number[], centroids: ArrayLike<number>): number[] {
  const sums = new Float64Array(centroids.length)
  const mass = new Float64Array(centroids.length / channels)
  nearest.forEach((centroid, point) => {
    mass[centroid] = (mass[centroid] ?? 0) + (weights[point] ?? NaN)
    for (let channel = 0; channel < channels; channel++)
      sums[centroid * channels + channel] = (sums[centroid * channels + channel] ?? 0) + (weights[point] ?? NaN) * (points[point * channels + channel] ?? NaN)
  })
  return Array.from(sums, (sum, index) => {
    const weight = mass[Math.floor(index / channels)] ?? 0
    return weight > 0 ? sum / weight : (centroids[index] ?? NaN)
  })
}

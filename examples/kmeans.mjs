// Many small clusterings in one call: what couplet learns codebooks with, good for any product quantizer.
// Run: node examples/kmeans.mjs
import { kmeans } from 'couplet'

// 32 problems of 4096 points with 8 channels: clouds around 16 centers that each problem draws for itself.
const shape = { problems: 32, points: 4096, channels: 8, centroids: 16 }
const random = generator(1)
const centers = Float32Array.from({ length: shape.problems * shape.centroids * shape.channels }, () => 10 * random())
const points = new Float32Array(shape.problems * shape.points * shape.channels)
for (let problem = 0; problem < shape.problems; problem += 1) {
  for (let point = 0; point < shape.points; point += 1) {
    const center = (problem * shape.centroids + (point % shape.centroids)) * shape.channels
    const at = (problem * shape.points + point) * shape.channels
    for (let channel = 0; channel < shape.channels; channel += 1) points[at + channel] = centers[center + channel] + 6 * (random() - 0.5)
  }
}

const start = performance.now()
const { centroids, inertia, iterations } = await kmeans(points, {
  ...shape,
  seed: 42,
  onProgress: ({ done, total }) => process.stdout.write(`\r${Math.round((100 * done) / total)} %`),
})
console.log(`\r${centroids.length / shape.channels} centroids of ${shape.problems} problems in ${(performance.now() - start).toFixed(0)} ms`)
// Noise of width 6 has a variance of 3 in each of 8 channels: about 24 when every center was found.
console.log(`squared distance of a point to its centroid: ${(inertia[0] / shape.points).toFixed(1)} after ${iterations[0]} iterations`)

function generator(seed) {
  let state = seed
  return () => (state = (state * 48271) % 2147483647) / 2147483647
}

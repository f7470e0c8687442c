// The cache inside an engine of your own: no onnxruntime, just queries, keys and values as arrays.
// Run: node examples/engine.mjs
import { Cache, Codebook, codec, kmeans } from 'couplet'

const shape = { layers: 2, queryHeads: 8, kvHeads: 2, headDim: 64 }
const rotary = { kind: 'half', dim: 64, theta: 10000 }
const coding = codec('cq-4c8b') // 2 bits per channel
const random = generator(7)

// 1. Codebooks: k-means over keys (before rotary embedding) and values that the model made. Here: 4096 made-up tokens a layer.
const groups = shape.headDim / coding.groupChannels
const learn = async (rows, points) => (await kmeans(rows, {
  problems: shape.kvHeads * groups, points, channels: coding.groupChannels, centroids: coding.centroids, iterations: 10, seed: 1,
  layout: { problemStride: coding.groupChannels, pointStride: shape.kvHeads * shape.headDim },
})).centroids
const keyTables = []
const valueTables = []
for (let layer = 0; layer < shape.layers; layer += 1) {
  keyTables.push(await learn(activations(4096, shape.kvHeads), 4096))
  valueTables.push(await learn(activations(4096, shape.kvHeads), 4096))
}
const codebook = Codebook.fromTables({
  keyTables, valueTables, keyCodec: coding, valueCodec: coding, kvHeads: shape.kvHeads, headDim: shape.headDim,
  metadata: { formatVersion: 1, rotary, model: null, learned: null },
})

// 2. Two caches with the same history: one coded, one in full precision.
const coded = new Cache({ ...shape, codebook, sinks: 4, window: 32, rotary })
const exact = new Cache({ ...shape, window: Infinity, rotary })
const sequences = [coded.sequence(), exact.sequence()]

// 3. A step per chunk of tokens: every layer attends, then the step is committed. 1000 tokens of prompt, then 20 one by one.
let worst = 0
for (const tokens of [1000, ...Array(20).fill(1)]) {
  const steps = sequences.map((sequence, index) => [coded, exact][index].begin([{ sequence, tokens }]))
  for (let layer = 0; layer < shape.layers; layer += 1) {
    const row = { queries: activations(tokens, shape.queryHeads), keys: activations(tokens, shape.kvHeads), values: activations(tokens, shape.kvHeads) }
    const [[output], [expected]] = await Promise.all(steps.map((step) => step.attend(layer, [row])))
    if (tokens === 1) worst = Math.max(worst, relativeError(output, expected))
  }
  for (const step of steps) step.commit()
}

for (const [name, cache] of [['exact', exact], ['coded', coded]]) {
  const { tokens, pageBytes, rawBytes } = cache.statistics()
  console.log(`${name}: ${tokens} tokens in ${((pageBytes + rawBytes) / 1024).toFixed(0)} KB`)
}
for (const cache of [exact, coded]) cache.dispose()
console.log(`largest relative error of an attention output at ${coding.bitsPerChannel} bits: ${worst.toFixed(3)}`)

/** Rows [tokens][heads][headDim] whose neighbouring channels go together, as those of real models do. */
function activations(tokens, heads) {
  const rows = new Float32Array(tokens * heads * shape.headDim)
  for (let at = 0; at < rows.length; at += coding.groupChannels) {
    const together = random() + random() - 1
    for (let channel = 0; channel < coding.groupChannels; channel += 1) rows[at + channel] = (together + 0.2 * (random() - 0.5)) * (channel % 2 ? 1 : -1)
  }
  return rows
}

function relativeError(values, expected) {
  let difference = 0
  let norm = 0
  for (let at = 0; at < values.length; at += 1) {
    difference += (values[at] - expected[at]) ** 2
    norm += expected[at] ** 2
  }
  return Math.sqrt(difference / norm)
}

function generator(seed) {
  let state = seed
  return () => (state = (state * 48271) % 2147483647) / 2147483647
}

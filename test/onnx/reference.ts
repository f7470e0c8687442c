/** The decoder of graphs.ts once more, in double precision and in the plainest way, with keys and values through codebooks. */
import type { Model } from '../../lib/onnx/proto'
import { decodeTensor } from '../../lib/onnx/proto'

export interface Coding {
  groupChannels: number
  /** Per layer: float32 [kvHeads][groups][centroids][groupChannels]. */
  keyTables: Float32Array[]
  valueTables: Float32Array[]
  sinks: number
  window: number
}

export interface ReferenceShape { layers: number; queryHeads: number; kvHeads: number; headDim: number; hidden: number; vocabulary: number; theta: number }

/**
 * Logits [tokens][vocabulary] of a fresh sequence: half-split rotary, separate q, k, v. With `coding`, token t reads tokens
 * 0..sinks-1 and t-window+1..t as they are, and the nearest centroids of the others; keys are coded before rotation.
 */
export function reference(model: Model, tokens: readonly number[], shape: ReferenceShape, coding?: Coding): Float64Array {
  const { layers, queryHeads, kvHeads, headDim, hidden, vocabulary, theta } = shape
  const weights = (name: string) => Float64Array.from(new Float32Array(decodeTensor(model.initializers.get(name)!).rawData.slice().buffer))
  const embedding = weights('embedding')
  let stream = tokens.map((token) => embedding.subarray(token * hidden, (token + 1) * hidden))
  for (let layer = 0; layer < layers; layer++) {
    const project = (name: string, rows: Float64Array[]) => {
      const matrix = weights(`layers.${layer}.${name}.weight`)
      return rows.map((row) => multiply(row, matrix))
    }
    const [queries, keys, values] = ['query', 'key', 'value'].map((name) => project(name, stream)) as [Float64Array[], Float64Array[], Float64Array[]]
    const codedKeys = coding ? keys.map((row) => nearest(row, coding.keyTables[layer]!, coding.groupChannels)) : keys
    const codedValues = coding ? values.map((row) => nearest(row, coding.valueTables[layer]!, coding.groupChannels)) : values
    const attended = tokens.map((_, t) => {
      const output = new Float64Array(queryHeads * headDim)
      for (let head = 0; head < queryHeads; head++) {
        const at = Math.floor(head / (queryHeads / kvHeads)) * headDim
        const query = rotate(queries[t]!.subarray(head * headDim, (head + 1) * headDim), t, theta)
        const isRaw = (j: number) => !coding || j < coding.sinks || j > t - coding.window
        const scores = Array.from({ length: t + 1 }, (__, j) => {
          const key = rotate((isRaw(j) ? keys : codedKeys)[j]!.subarray(at, at + headDim), j, theta)
          return query.reduce((sum, x, i) => sum + x * key[i]!, 0) / Math.sqrt(headDim)
        })
        const most = Math.max(...scores)
        const exponentials = scores.map((score) => Math.exp(score - most))
        const sum = exponentials.reduce((a, b) => a + b)
        exponentials.forEach((e, j) => {
          const value = (isRaw(j) ? values : codedValues)[j]!
          for (let i = 0; i < headDim; i++) output[head * headDim + i]! += (e / sum) * value[at + i]!
        })
      }
      return output
    })
    const projected = project('output', attended)
    stream = stream.map((row, t) => row.map((x, i) => x + projected[t]![i]!))
  }
  const matrix = weights('logits.weight')
  const logits = new Float64Array(tokens.length * vocabulary)
  stream.forEach((row, t) => logits.set(multiply(row, matrix), t * vocabulary))
  return logits
}

function multiply(row: Float64Array, matrix: Float64Array): Float64Array {
  const columns = matrix.length / row.length
  const product = new Float64Array(columns)
  row.forEach((x, i) => { for (let j = 0; j < columns; j++) product[j]! += x * matrix[i * columns + j]! })
  return product
}

/** One head's channels at a position, in half-split pairs. */
export function rotate(channels: Float64Array, position: number, theta: number): Float64Array {
  const half = channels.length / 2
  return channels.map((x, i) => {
    const angle = position * theta ** (-(i % half) / half)
    return i < half ? x * Math.cos(angle) - channels[i + half]! * Math.sin(angle) : x * Math.cos(angle) + channels[i - half]! * Math.sin(angle)
  })
}

/** The row [kvHeads][headDim] with every group replaced by its nearest centroid. */
function nearest(row: Float64Array, table: Float32Array, groupChannels: number): Float64Array {
  const groups = row.length / groupChannels // of all heads
  const centroids = table.length / row.length
  const decoded = new Float64Array(row.length)
  for (let group = 0; group < groups; group++) {
    let [best, least] = [0, Infinity]
    for (let c = 0; c < centroids; c++) {
      let distance = 0
      for (let i = 0; i < groupChannels; i++) distance += (row[group * groupChannels + i]! - table[(group * centroids + c) * groupChannels + i]!) ** 2
      if (distance < least) [best, least] = [c, distance]
    }
    for (let i = 0; i < groupChannels; i++) decoded[group * groupChannels + i] = table[(group * centroids + best) * groupChannels + i]!
  }
  return decoded
}

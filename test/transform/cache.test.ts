// Transforms in a cache, on every device: exact where codes lose nothing, the nearest centroid by the metric, the same on the CPU and
// on a GPU's kernels, and errors that name the channel that came.
import assert from 'node:assert/strict'

import type { DeviceName, Transforms } from '../../lib'
import { Cache, Codebook, encodeSync } from '../../lib'
import { codec } from '../../lib/codec'
import { hadamard } from '../../lib/transform/matrix'
import { describeOn } from '../device/devices'
import { normals } from '../onnx/graphs'
import { ordered, randomTransforms } from './samples'

const [kvHeads, queryHeads, headDim, tokens, layers] = [2, 4, 32, 24, 2]
const eight = codec('8c5b') // 32 centroids: more than there are tokens
const rotary = { kind: 'half', theta: 10000, positions: 256 } as const
const random = normals(3)
const rows = (heads: number) => Array.from({ length: layers }, () => Float32Array.from({ length: tokens * heads * headDim }, random))
const given = { queries: rows(queryHeads), keys: rows(kvHeads), values: rows(kvHeads) }
const uniform = Array.from({ length: layers }, () => [{ firstHead: 0, heads: kvHeads, keyCodec: eight, valueCodec: eight }])
const all = randomTransforms(uniform, headDim)

const { matrix, inverse } = hadamard(headDim)
const ofAllHeads = (one: Float64Array) => Array.from({ length: layers }, () => Float32Array.from([...one, ...one]))
const hadamards = { 'value.mix': ofAllHeads(matrix), 'value.unmix': ofAllHeads(inverse) }

/** Blocks of 8 x 8 without what is beside their diagonals. */
const diagonalsOf = (metric: Float32Array) => metric.map((entry, at) => ((at % 64) % 9 === 0 ? entry : 0))

/** y = x M of each head. */
function mixed(values: Float32Array, mix: Float32Array): Float32Array {
  return values.map((_, at) => {
    const [row, channel] = [Math.floor(at / headDim), at % headDim]
    let sum = 0
    for (let from = 0; from < headDim; from++) sum += values[row * headDim + from]! * mix[((row % kvHeads) * headDim + from) * headDim + channel]!
    return sum
  })
}

/** Tables whose first centroids are the tokens themselves, as they are coded. */
function ownTables(side: readonly Float32Array[]): Float32Array[] {
  return side.map((data) => {
    const table = new Float32Array(kvHeads * headDim * eight.centroids)
    for (let head = 0; head < kvHeads; head++) {
      for (let group = 0; group < headDim / 8; group++) {
        for (let token = 0; token < eight.centroids; token++) {
          const from = ((token % tokens) * kvHeads + head) * headDim + group * 8
          table.set(data.subarray(from, from + 8), ((head * (headDim / 8) + group) * eight.centroids + token) * 8)
        }
      }
    }
    return table
  })
}

function bookOf(transforms: Transforms): Codebook {
  const values = given.values.map((data, layer) => (transforms['value.mix'] ? mixed(data, transforms['value.mix'][layer]!) : data))
  const keys = given.keys.map((data, layer) => (transforms['key.group'] ? ordered(data, transforms['key.group'][layer]!) : data))
  const tables = { keyTables: ownTables(keys), valueTables: ownTables(values) }
  return Codebook.fromTables({ ...tables, keyCodec: eight, valueCodec: eight, kvHeads, headDim, transforms })
}

/** Outputs of all layers, tokens in two steps. */
function attended(cache: Cache, change: (keys: Float32Array, values: Float32Array) => void = () => undefined): Float32Array[] {
  const outputs = given.queries.map((data) => new Float32Array(data.length))
  const sequence = cache.sequence()
  for (const [first, end] of [[0, 17], [17, tokens]] as const) {
    using step = cache.begin([{ sequence, tokens: end - first }], { prefill: 'coded' })
    for (let layer = 0; layer < layers; layer++) {
      const part = (data: Float32Array, heads: number) => data.slice(first * heads * headDim, end * heads * headDim)
      const row = { queries: part(given.queries[layer]!, queryHeads), keys: part(given.keys[layer]!, kvHeads), values: part(given.values[layer]!, kvHeads) }
      change(row.keys, row.values)
      const [out] = step.attendSync(layer, [row])
      outputs[layer]!.set(out!, first * queryHeads * headDim)
    }
    step.commit()
  }
  return outputs
}

const cacheOf = (codebook: Codebook | undefined, device: DeviceName, kept: { sinks: number; window?: number }) =>
  new Cache({ ...(codebook ? { codebook } : { layers, kvHeads, headDim }), queryHeads, rotary, device, threads: 1, ...kept })

const distance = (one: Float32Array[], other: Float32Array[]): number =>
  Math.max(...one.map((data, layer) => Math.max(...data.map((value, at) => Math.abs(value - other[layer]![at]!)))))

describeOn('all', 'transforms in a cache', (device) => {
  const steps: [string, Transforms][] = [
    ['a metric of keys', { 'key.metric': all['key.metric'] }],
    ['metrics', { 'key.metric': all['key.metric'], 'value.metric': all['value.metric'] }],
    ['mixed values', { 'value.mix': all['value.mix'], 'value.unmix': all['value.unmix'] }],
    ['grouped keys', { 'key.group': all['key.group'] }],
    ['values through Hadamard matrices', hadamards],
    ['Hadamard, and keys smoothed', { ...hadamards, 'key.metric': all['key.metric'].map(diagonalsOf) }],
    ['all of them', all],
  ]
  const expected = attended(cacheOf(undefined, 'cpu', { sinks: 0 }))
  for (const [name, transforms] of steps) {
    it(`lose nothing where centroids are the tokens: ${name}`, () => {
      using codebook = bookOf(transforms)
      for (const kept of [{ sinks: 0, window: 0 }, { sinks: 4, window: 8 }]) {
        using cache = cacheOf(codebook, device, kept)
        // Mixing and unmixing in float32, and on a GPU products of tf32.
        assert.ok(distance(attended(cache), expected) < (device === 'cpu' ? 2e-5 : 5e-3), name)
      }
    })
  }

  it('are those of the CPU where codes do lose', () => {
    const tables = all['key.metric'].map(() => Float32Array.from({ length: kvHeads * headDim * eight.centroids }, random))
    using codebook = Codebook.fromTables({ keyTables: tables, valueTables: tables, keyCodec: eight, valueCodec: eight, kvHeads, headDim, transforms: all })
    using plain = Codebook.fromTables({ keyTables: tables, valueTables: tables, keyCodec: eight, valueCodec: eight, kvHeads, headDim })
    using cache = cacheOf(codebook, device, { sinks: 2, window: 4 })
    using onCpu = cacheOf(codebook, 'cpu', { sinks: 2, window: 4 })
    using without = cacheOf(plain, 'cpu', { sinks: 2, window: 4 })
    const [outputs, reference] = [attended(cache), attended(onCpu)]
    assert.ok(distance(outputs, reference) < (device === 'cpu' ? 1e-6 : 5e-3))
    assert.ok(distance(reference, attended(without)) > 0.1, 'transforms change what is decoded')
  })

  it('name the channel of a NaN as it came', () => {
    using codebook = bookOf(all)
    using cache = cacheOf(codebook, device, { sinks: 0, window: 4 })
    for (const [side, at] of [['keys', 0], ['values', 1]] as const) {
      assert.throws(() => attended(cache, (...both) => { both[at][(3 * kvHeads + 1) * headDim + 21] = NaN }),
        (error: { code: string; token: number; kvHead: number; channel: number; message: string }) =>
          error.code === 'ERR_COUPLET_NOT_FINITE' && error.token === 3 && error.kvHead === 1 && error.channel === 21 && error.message.includes(side))
    }
  })

  it('decide what encode calls near', () => {
    const [points, metric] = [given.keys[0]!, all['key.metric'][0]!]
    const tables = Float32Array.from({ length: kvHeads * headDim * eight.centroids }, random)
    const shape = { codec: '8c5b', tokens, kvHeads, headDim, tables, device: device }
    const codes = encodeSync(points, { ...shape, metric })
    const nearest = (token: number, head: number, group: number): number => {
      const block = head * (headDim / 8) + group
      const distances = Array.from({ length: eight.centroids }, (_, centroid) => {
        let sum = 0
        for (let row = 0; row < 8; row++) {
          let length = 0
          for (let c = 0; c < 8; c++) {
            const difference = points[(token * kvHeads + head) * headDim + group * 8 + c]! - tables[(block * eight.centroids + centroid) * 8 + c]!
            length += metric[(block * 8 + row) * 8 + c]! * difference
          }
          sum += length ** 2
        }
        return sum
      })
      return distances.indexOf(Math.min(...distances))
    }
    for (let token = 0; token < tokens; token++) {
      for (let head = 0; head < kvHeads; head++) {
        for (let group = 0; group < headDim / 8; group++) {
          let code = 0
          const row = head * (codes.length / kvHeads) + group * 64 * 5 / 8
          for (let bit = 0; bit < 5; bit++) code |= ((codes[row + Math.floor((token * 5 + bit) / 8)]! >> ((token * 5 + bit) % 8)) & 1) << bit
          assert.equal(code, nearest(token, head, group), `token ${token}, head ${head}, group ${group}`)
        }
      }
    }
  })
})

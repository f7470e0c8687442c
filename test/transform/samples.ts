/** Random transforms that are well-conditioned, and their inverses. */
import type { Transforms } from '../../lib'
import type { HeadCodecs } from '../../lib/codec'
import type { MatrixName } from '../../lib/codebook-transforms'
import { transformElements } from '../../lib/codebook-transforms'
import type { RotaryPairs } from '../../lib/rotary-pairs'
import { pairPlaces } from '../../lib/rotary-pairs'
import { invert } from '../../lib/transform/matrix'
import { normals } from '../onnx/graphs'

/** The identity, turned and stretched a little: blocks of `size`. */
function matrices(elements: number, size: number, random: () => number): Float32Array {
  return Float32Array.from({ length: elements }, (_, at) => {
    const [row, column] = [Math.floor(at / size) % size, at % size]
    return (row === column ? 1 + 0.3 * Math.abs(random()) : 0) + (0.3 * random()) / Math.sqrt(size)
  })
}

export function inverseOf(mix: Float32Array, size: number): Float32Array {
  const out = new Float32Array(mix.length)
  for (let at = 0; at < mix.length; at += size * size) out.set(invert(Float64Array.from(mix.subarray(at, at + size * size)), size), at)
  return out
}

/** A random order of a head's channels in which rotary pairs stay pairs, and the others are others. */
export function randomOrder(headDim: number, rotary: RotaryPairs | null, random: () => number): Int32Array {
  const shuffled = (length: number) => Array.from({ length }, (_, i) => ({ i, key: random() })).sort((a, b) => a.key - b.key).map(({ i }) => i)
  const rotated = rotary?.dim ?? 0
  const order = new Int32Array(headDim)
  shuffled(rotated / 2).forEach((pair, place) => {
    const [from, to] = [pairPlaces(rotary!, pair), pairPlaces(rotary!, place)]
    for (const side of [0, 1] as const) order[to[side]] = from[side]
  })
  shuffled(headDim - rotated).forEach((channel, place) => { order[rotated + place] = rotated + channel })
  return order
}

/** Rows of heads in an order of channels. */
export function ordered(rows: Float32Array, order: Int32Array): Float32Array {
  return rows.map((_, at) => rows[at - (at % order.length) + order[at % order.length]!]!)
}

/** All steps for a codebook of these codecs, whose model rotates halves of all channels. */
export function randomTransforms(codecs: readonly (readonly HeadCodecs[])[], headDim: number, seed = 5): Required<Transforms> {
  const random = normals(seed)
  const metric = (name: MatrixName & `${string}.metric`) => codecs.map((parts) => {
    const blocks = parts.map((part) => {
      const { groupChannels } = name === 'key.metric' ? part.keyCodec : part.valueCodec
      return matrices(transformElements(name, [part], headDim), groupChannels, random)
    })
    return Float32Array.from(blocks.flatMap((block) => [...block]))
  })
  const mixes = codecs.map((parts) => matrices(transformElements('value.mix', parts, headDim), headDim, random))
  const unmixes = mixes.map((mix) => inverseOf(mix, headDim))
  return {
    'key.metric': metric('key.metric'), 'value.metric': metric('value.metric'), 'value.mix': mixes, 'value.unmix': unmixes,
    'key.group': codecs.map(() => randomOrder(headDim, { kind: 'half', dim: headDim }, random)),
  }
}

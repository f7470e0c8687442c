/** Random transforms that are well-conditioned, and their inverses. */
import type { Transforms } from '../../lib'
import type { HeadCodecs } from '../../lib/codec'
import { transformElements } from '../../lib/codebook-transforms'
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

/** All steps for a codebook of these codecs. */
export function randomTransforms(codecs: readonly (readonly HeadCodecs[])[], headDim: number, seed = 5): Required<Transforms> {
  const random = normals(seed)
  const metric = (name: 'key.metric' | 'value.metric') => codecs.map((parts) => {
    const blocks = parts.map((part) => {
      const { groupChannels } = name === 'key.metric' ? part.keyCodec : part.valueCodec
      return matrices(transformElements(name, [part], headDim), groupChannels, random)
    })
    return Float32Array.from(blocks.flatMap((block) => [...block]))
  })
  const mixes = codecs.map((parts) => matrices(transformElements('value.mix', parts, headDim), headDim, random))
  const unmixes = mixes.map((mix) => inverseOf(mix, headDim))
  return { 'key.metric': metric('key.metric'), 'value.metric': metric('value.metric'), 'value.mix': mixes, 'value.unmix': unmixes }
}

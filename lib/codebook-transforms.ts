/**
 * What may stand between rows and their codes beside the tables themselves (docs/codebook.md): named steps, one array for each layer.
 * A step holds for all layers of a codebook or for none.
 */
import { isArray } from './arguments'
import type { HeadCodecs } from './codec'
import { CoupletError, throwExpected, typeError } from './errors'
import { isOrder } from './rotary-pairs'

/**
 * `key.group`: keys are coded, and stored, with channel order[c] of the model at place c, in all heads of a layer alike; Int32Array of
 * headDim. Channels that are rotated together stay so. It stands in the metadata of a file; all others are tensors.
 * `key.metric`, `value.metric`: what encode calls near, float32 [heads][groups][groupChannels][groupChannels] of each part of a layer:
 * the code of x is that of the centroid c with the least |M (x - c)|.
 * `value.mix`, `value.unmix`: values are coded as v M, and attention's outputs o leave as o M', M' the inverse of M; float32
 * [kvHeads][headDim][headDim], both or none.
 */
export type TransformName = 'key.group' | 'key.metric' | 'value.metric' | 'value.mix' | 'value.unmix'
/** Those that are tensors. */
export type MatrixName = Exclude<TransformName, 'key.group'>
export const transformNames: readonly TransformName[] = ['key.group', 'key.metric', 'value.metric', 'value.mix', 'value.unmix']
export const isMatrixName = (name: TransformName): name is MatrixName => name !== 'key.group'

/** Of every layer one array, its parts one after another. */
export type Transforms = Partial<Record<Exclude<TransformName, 'key.group'>, readonly Float32Array[]>> & { readonly 'key.group'?: readonly Int32Array[] }

/** How far a row may be from itself after mixing and unmixing, relative to its size. float32 keeps 1e-6 of well-conditioned matrices. */
const inverseTolerance = 1e-3

/** Floats that a step has for some heads of a layer: a matrix for each group, or one for each head. */
export function transformShape(name: MatrixName, part: HeadCodecs, headDim: number): number[] {
  if (name === 'value.mix' || name === 'value.unmix') return [part.heads, headDim, headDim]
  const { groupChannels } = name === 'key.metric' ? part.keyCodec : part.valueCodec
  return [part.heads, headDim / groupChannels, groupChannels, groupChannels]
}

export function transformElements(name: MatrixName, parts: readonly HeadCodecs[], headDim: number): number {
  return parts.reduce((sum, part) => sum + transformShape(name, part, headDim).reduce((a, b) => a * b), 0)
}

/** Names that a codebook may state, in the order of {@link transformNames}. */
export function readTransformNames(given: readonly unknown[]): readonly TransformName[] {
  const names = given.map((name) => transformNames.find((known) => known === name)
    ?? throwExpected(transformNames.map((known) => JSON.stringify(known)).join(', '), 'transforms', name, typeof name === 'string'))
  if (new Set(names).size !== names.length) throwExpected('every name once', 'transforms', names.join(), true)
  if (names.includes('value.mix') !== names.includes('value.unmix'))
    throwExpected('"value.mix" and "value.unmix" or none of them', 'transforms', names.join(), true)
  return Object.freeze(transformNames.filter((name) => names.includes(name)))
}

/**
 * What a program hands over, copied.
 * @throws {CoupletError} `ERR_COUPLET_NOT_FINITE` with the layer, for a NaN or an infinity
 * @throws {TypeError | RangeError} `ERR_COUPLET_INVALID_ARGUMENT`, also where unmixing does not undo mixing
 */
export function checkedTransforms(given: Transforms, codecs: readonly (readonly HeadCodecs[])[], headDim: number): Transforms {
  const names = readTransformNames(Object.keys(given).filter((name) => given[name as TransformName] !== undefined))
  const transforms: Transforms = names.includes('key.group') ? { 'key.group': checkedOrders(given['key.group'], codecs.length, headDim) } : {}
  for (const name of names.filter(isMatrixName)) {
    transforms[name] = arraysOf(given[name], name, codecs.length).map((array: unknown, layer) => {
      const elements = transformElements(name, codecs[layer]!, headDim)
      if (!isArray(array, Float32Array)) throw typeError(`Expected Float32Arrays for \`transforms["${name}"]\` but received another value at layer ${layer}`)
      if (array.length !== elements) throwExpected(`a Float32Array of ${elements} elements`, `transforms["${name}"][${layer}]`, array, true)
      if (!array.every(Number.isFinite))
        throw new CoupletError('ERR_COUPLET_NOT_FINITE', `Expected finite numbers for \`transforms["${name}"][${layer}]\` but received a NaN or an infinity`, { layer })
      return array.slice()
    })
  }
  const wrong = wrongInverse(transforms, headDim)
  if (wrong !== undefined) throwExpected('the inverses of value.mix', 'transforms["value.unmix"]', `others at layer ${wrong}`, true)
  return transforms
}

function arraysOf(arrays: unknown, name: TransformName, layers: number): unknown[] {
  if (!Array.isArray(arrays)) throwExpected('an array', `transforms["${name}"]`, arrays)
  if (arrays.length !== layers) throwExpected(`arrays of ${layers} layers`, `transforms["${name}"].length`, arrays.length, true)
  return arrays
}

function checkedOrders(given: unknown, layers: number, headDim: number): Int32Array[] {
  return arraysOf(given, 'key.group', layers).map((order, layer) => {
    if (!isArray(order, Int32Array)) throw typeError(`Expected Int32Arrays for \`transforms["key.group"]\` but received another value at layer ${layer}`)
    if (!isOrder(order, headDim)) throwExpected(`every channel below ${headDim} once`, `transforms["key.group"][${layer}]`, order, true)
    return order.slice()
  })
}

/** The first layer whose unmixing does not undo its mixing: some rows of ones and minus ones, through both. */
export function wrongInverse({ 'value.mix': mixes, 'value.unmix': unmixes }: Transforms, headDim: number): number | undefined {
  const layer = mixes?.findIndex((mix, index) => {
    for (let head = 0; head < mix.length; head += headDim * headDim) {
      for (const stride of [1, 2, 3, 5]) {
        const row = Float64Array.from({ length: headDim }, (_, channel) => (Math.floor(channel / stride) % 2 === 0 ? 1 : -1) * (channel % 7 === 0 ? 1 : 0.5))
        const back = throughMatrix(throughMatrix(row, mix, head), unmixes![index]!, head)
        if (!row.every((value, channel) => Math.abs(back[channel]! - value) <= inverseTolerance)) return true
      }
    }
    return false
  })
  return layer === undefined || layer < 0 ? undefined : layer
}

function throughMatrix(row: Float64Array, matrices: Float32Array, first: number): Float64Array {
  const out = new Float64Array(row.length)
  row.forEach((value, from) => {
    for (let to = 0; to < row.length; to++) out[to]! += value * matrices[first + from * row.length + to]!
  })
  return out
}

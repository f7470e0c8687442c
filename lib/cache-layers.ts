/** How the layers of a cache attend: what the caller says of each, and as the addon takes it. */
import { isArray, requireArray, requireInteger, requireObject, throwElements } from './arguments'
import type { Codebook, RotarySpec } from './codebook'
import { CoupletError, rangeError, throwExpected } from './errors'
import type { NativeLayerOptions, NativeOrderedRotary, NativeRotary } from './native/cache'
import { pairOrder } from './rotary-pairs'

/** Positions that angles are prepared for when only `theta` is given. */
const defaultPositions = 2 ** 20

/**
 * Rotary position embedding of queries and keys. (x, y) of pair i at position t becomes (x cos - y sin, y cos + x sin), the angle being
 * t * theta ** (-2 i / dim), or whatever the tables say (linear, dynamic, llama3, yarn, longrope scaling). null: none.
 */
export type RotaryOption =
  | {
    /** half: channel i pairs with i + dim / 2 (Llama, Qwen). interleaved: 2i pairs with 2i + 1 (GPT-J). */
    kind: 'half' | 'interleaved'
    /** Channels that are rotated, the first ones of a head; even; default headDim. */
    dim?: number | undefined
    theta: number
    /** First position that is refused; default 2 ** 20. */
    positions?: number | undefined
  }
  | {
    kind: 'half' | 'interleaved'
    dim?: number | undefined
    /** float32 [positions][dim / 2], copied. */
    cos: Float32Array
    /** float32 [positions][dim / 2], copied. */
    sin: Float32Array
  }
  | null

/** How one layer attends. */
export interface LayerOptions {
  /** Factor of the logits; default 1 / sqrt(headDim). */
  scale?: number | undefined
  /** logit = softcap * tanh(logit / softcap); default 0, none. */
  softcap?: number | undefined
  /** Newest tokens that a query sees, its own among them; default 0, all. */
  localWindow?: number | undefined
  /** float32 [queryHeads], copied: one more logit in the softmax of each head, with no value behind it. */
  headSinks?: Float32Array | undefined
  /** Default the cache's. */
  rotary?: RotaryOption | undefined
}

interface AttentionShape {
  queryHeads: number
  headDim: number
  rotary: RotaryOption | undefined
  codebook: Codebook | undefined
}

export function nativeLayers(
  given: LayerOptions | readonly LayerOptions[] = {},
  layers: number,
  { queryHeads, headDim, rotary, codebook }: AttentionShape,
): { layers: NativeLayerOptions[]; rotaries: (NativeRotary | NativeOrderedRotary)[] } {
  const rotaries: (NativeRotary | NativeOrderedRotary)[] = []
  // Layers with the same object share its angles, and those with keys in the same order what was made of them.
  const [own, ordered] = [new Map<RotaryOption, number>(), new Map<string, number>()]
  const indexOf = (option: RotaryOption | undefined): number | undefined => {
    if (option === undefined || option === null) return undefined
    if (!own.has(option)) own.set(option, rotaries.push(nativeRotary(option, headDim)) - 1)
    return own.get(option)
  }
  const orderedIndexOf = (option: RotaryOption | undefined, order: Int32Array): number | undefined => {
    const of = indexOf(option)
    const pairs = of === undefined ? undefined : orderedPairs(order, rotaries[of] as NativeRotary)
    if (of === undefined || pairs === undefined) return of
    const name = `${of} ${String(pairs)}`
    if (!ordered.has(name)) ordered.set(name, rotaries.push({ of, order: pairs }) - 1)
    return ordered.get(name)
  }
  const options = Array.isArray(given) ? (given as readonly LayerOptions[]) : Array.from({ length: layers }, () => given as LayerOptions)
  if (options.length !== layers) throw rangeError(`Expected ${layers} entries for \`layerOptions\` but received ${options.length}`)
  const entries = options.map((layer, index) => {
    requireObject(layer, 'layerOptions')
    const { scale, softcap, localWindow, headSinks } = layer
    if (scale !== undefined) requirePositive(scale, 'scale')
    if (softcap !== undefined && softcap !== 0) requirePositive(softcap, 'softcap')
    if (localWindow !== undefined) requireInteger(localWindow, 'localWindow', 0)
    if (headSinks !== undefined) requireFloats(headSinks, 'headSinks', queryHeads, `${queryHeads} queryHeads`)
    const angles = layer.rotary === undefined ? rotary : layer.rotary
    const order = codebook && index < codebook.layers ? codebook.transform('key.group', index) : undefined
    return { scale, softcap, localWindow, headSinks, rotary: indexOf(angles), orderedRotary: order && orderedIndexOf(angles, order) }
  })
  return { layers: entries, rotaries }
}

/** In which order angles meet keys that stand in another one; undefined: their own. */
function orderedPairs(order: Int32Array, { kind, dim }: NativeRotary): Int32Array | undefined {
  const pairs = pairOrder(order, { kind, dim })
  if (pairs) return pairs.every((pair, place) => pair === place) ? undefined : pairs
  throw new CoupletError('ERR_COUPLET_CODEBOOK_MISMATCH', `The codebook orders keys so that channels of one rotary pair are parted where ${dim} are rotated, kind "${kind}"`)
}

function requireFloats(value: unknown, name: string, elements: number, shape: string): asserts value is Float32Array {
  if (!isArray(value, Float32Array) || value.length !== elements) throwElements('Float32Array', elements, shape, name, value)
}

function requirePositive(value: unknown, name: string): void {
  if (typeof value !== 'number' || !(value > 0) || value === Infinity) throwExpected('a number above 0', name, value)
}

function nativeRotary(option: NonNullable<RotaryOption>, headDim: number): NativeRotary {
  requireObject(option, 'rotary')
  const { kind, dim = headDim } = option
  if (!['half', 'interleaved'].includes(kind)) throwExpected('"half" or "interleaved"', 'kind', kind)
  requireInteger(dim, 'dim', 2, headDim)
  if (dim % 2 !== 0) throwExpected('an even integer', 'dim', dim)
  if (!('cos' in option)) {
    const { theta, positions = defaultPositions } = option
    requirePositive(theta, 'theta')
    requireInteger(positions, 'positions', 1)
    return { kind, dim, theta, positions }
  }
  const { cos, sin } = option
  requireArray(cos, 'cos', Float32Array, dim / 2)
  const positions = cos.length / (dim / 2)
  if (!Number.isInteger(positions)) throwExpected(`a Float32Array of rows of ${dim / 2} elements`, 'cos', cos)
  requireFloats(sin, 'sin', cos.length, 'as many as `cos`')
  return { kind, dim, positions, cos, sin }
}

/** What a codebook may have been learned for. */
export function rotarySpec(option: NonNullable<RotaryOption>, headDim: number): RotarySpec {
  const { kind, dim = headDim } = option
  return 'cos' in option ? { kind, dim } : { kind, dim, theta: option.theta }
}

/** The JSON that travels in a codebook file, and its checks: the same for files and for what a program hands over. */
import { requireBoolean } from './arguments'
import type { Codec, CodecLike, HeadCodecs, HeadCodecsLike, LayerCodecs } from './codec'
import { codec, commonCodec } from './codec'
import type { TransformName } from './codebook-transforms'
import { readTransformNames } from './codebook-transforms'
import { CoupletError, rangeError, throwExpected } from './errors'
import type { Json } from './json'
import { isOrder, pairOrder } from './rotary-pairs'

/**
 * Versions of the file that this couplet reads. It writes the lowest that says everything: 1, one codec a side in all layers and heads;
 * 2, mixed codecs; 3, transforms as well; 4, among them an order of keys.
 */
const formatVersions = [1, 2, 3, 4] as const
type FormatVersion = (typeof formatVersions)[number]

/** How the model rotates queries and keys. Keys are coded before the rotation. */
export interface RotarySpec {
  /** half: channel i pairs with i + dim / 2 (Llama, Qwen). interleaved: 2i pairs with 2i + 1 (GPT-J). */
  kind: 'half' | 'interleaved'
  /** Channels that are rotated; even. */
  dim: number
  theta?: number
  /** Angles other than those of plain theta (linear, dynamic, llama3, yarn, longrope). */
  scaled?: boolean
}

/** How the centroids came about. */
export interface LearnedFrom {
  weights: 'uniform' | 'attention' | 'fisher'
  iterations: number
  /** Decimal digits of a 64-bit number. */
  seed: string
  tokens: number
  /** SHA-256 of the text's token ids, uint32 little-endian, in hexadecimal digits. */
  text?: string
  /** ISO 8601. */
  date?: string
  /** Evenly spaced values that each channel of a group of values has at most, where kernels read such tables faster. */
  levels?: number | undefined
  /** How codecs were chosen: for a budget in bits by channel, what their codes take of it, and the divergence expected, in natural logarithms a token. */
  chosen?: { budget: number; bits: number; loss: number; measure: 'divergence' | 'fisher'; sinks: number; window: number; candidates: readonly string[] }
  /** By `tune` afterwards: steps, tokens in full precision, and the hash of its text. */
  tuned?: { steps: number; window: number; sinks: number; text: string }
}

export interface CodebookMetadata {
  readonly formatVersion: FormatVersion
  /** null: none, or not known. */
  readonly rotary: RotarySpec | null
  /** Fingerprint of the model, as DecoderModel gives it. null: not known. */
  readonly model: string | null
  /** null: not known. */
  readonly learned: LearnedFrom | null
}

export interface CodebookShape {
  readonly codecs: LayerCodecs
  /** Steps beside the tables; default none. */
  readonly transforms: readonly TransformName[]
  readonly layers: number
  readonly kvHeads: number
  readonly headDim: number
}

/** Of every layer, channel order[c] of the model at place c of its keys: where `transforms` has `key.group`. */
export type KeyOrders = readonly Int32Array[]

/** The JSON text of a file. */
export function writeMetadata(shape: CodebookShape, metadata: CodebookMetadata, orders?: KeyOrders): string {
  const { codecs, transforms, layers, kvHeads, headDim } = shape
  const { rotary, model, learned } = metadata
  const steps = { ...(transforms.length > 0 && { transforms }), ...(orders && { keyOrders: orders.map((order) => [...order]) }) }
  return JSON.stringify({ formatVersion: formatVersionOf(shape), ...codecMembers(codecs), ...steps, layers, kvHeads, headDim, rotary, model, learned })
}

/** The lowest version that says everything about such a codebook. */
export function formatVersionOf({ codecs, transforms }: Pick<CodebookShape, 'codecs' | 'transforms'>): FormatVersion {
  if (transforms.includes('key.group')) return 4
  if (transforms.length > 0) return 3
  return isUniform(codecs) ? 1 : 2
}

const isUniform = (codecs: LayerCodecs): boolean =>
  codecs.every((parts) => parts.length === 1) && commonCodec(codecs, 'keyCodec') !== undefined && commonCodec(codecs, 'valueCodec') !== undefined

function codecMembers(codecs: LayerCodecs): Record<string, unknown> {
  if (isUniform(codecs)) return { keyCodec: codecs[0]![0]!.keyCodec.name, valueCodec: codecs[0]![0]!.valueCodec.name }
  return { codecs: codecs.map((parts) => parts.map(({ heads, keyCodec, valueCodec }) => ({ heads, key: keyCodec.name, value: valueCodec.name }))) }
}

/**
 * What the JSON of a file says.
 * @throws {CoupletError} `ERR_COUPLET_CODEBOOK_MISMATCH` for another format version
 * @throws {TypeError | RangeError} naming the member that is wrong
 */
export function readMetadata(json: Json): { shape: CodebookShape; metadata: CodebookMetadata; orders: KeyOrders | undefined } {
  const members = readObject(json, 'metadata')
  const version = readCount(members.get('formatVersion'), 'formatVersion', 0)
  if (!formatVersions.some((known) => known === version))
    throw new CoupletError(
      'ERR_COUPLET_CODEBOOK_MISMATCH',
      `Expected a codebook of format version ${formatVersions.slice(0, -1).join(', ')} or ${formatVersions.at(-1)} but received one of format version ${version}`,
    )
  const dimensions = { layers: members.get('layers'), kvHeads: members.get('kvHeads'), headDim: members.get('headDim') }
  const codecs = members.get('codecs')
  const transforms = version < 3 ? [] : readTransformNames(readArray(members.get('transforms') ?? [], 'transforms'))
  if (version < 4 && transforms.includes('key.group')) throwExpected('a formatVersion of 4 with "key.group"', 'formatVersion', version, true)
  const codecName = (side: 'keyCodec' | 'valueCodec') => readText(members.get(side), side)
  const shape = version === 1 || codecs === undefined
    ? readShape({ ...dimensions, transforms, keyCodec: codecName('keyCodec'), valueCodec: codecName('valueCodec') })
    : readShape({ ...dimensions, transforms, codecs: readCodecs(codecs) })
  const rotary = optional(members.get('rotary'), (value) => readRotary(value, shape.headDim))
  const model = optional(members.get('model'), (value) => readText(value, 'model'))
  const learned = optional(members.get('learned'), readLearned)
  const orders = transforms.includes('key.group') ? readOrders(members.get('keyOrders') ?? null, shape, rotary) : undefined
  return { shape, orders, metadata: Object.freeze({ formatVersion: formatVersionOf(shape), rotary, model, learned }) }
}

/** Codecs of all layers and heads, or the parts of every layer. */
export type GivenCodecs = Record<'keyCodec' | 'valueCodec', CodecLike> | { codecs: readonly (readonly HeadCodecsLike[])[] }

/** @throws {TypeError | RangeError} when the codecs do not divide headDim, parts do not cover the heads, or a count is out of range */
export function readShape(given: GivenCodecs & Record<'layers' | 'kvHeads' | 'headDim', unknown> & { transforms?: readonly TransformName[] }): CodebookShape {
  const layers = readCount(given.layers, 'layers', 1, 65536)
  const kvHeads = readCount(given.kvHeads, 'kvHeads', 1, 65536)
  const headDim = readCount(given.headDim, 'headDim', 8, 256)
  const parts = (layer: readonly HeadCodecsLike[], name: string): readonly HeadCodecs[] => readParts(layer, { name, kvHeads, headDim })
  let codecs: LayerCodecs
  if (!('codecs' in given)) codecs = Array<readonly HeadCodecs[]>(layers).fill(parts([given], ''))
  else {
    if (given.codecs.length !== layers) throwExpected(`those of ${layers} layers`, 'codecs', given.codecs.length, true)
    codecs = given.codecs.map((layer, index) => parts(layer, `codecs[${index}]`))
  }
  return Object.freeze({ codecs: Object.freeze(codecs), transforms: given.transforms ?? [], layers, kvHeads, headDim })
}

function readParts(parts: readonly HeadCodecsLike[], { name, kvHeads, headDim }: { name: string; kvHeads: number; headDim: number }): readonly HeadCodecs[] {
  let firstHead = 0
  const read = parts.map(({ heads: given = kvHeads, keyCodec, valueCodec }, index): HeadCodecs => {
    const place = name === '' ? '' : `${name}[${index}].`
    const heads = readCount(given, `${place}heads`, 1, kvHeads)
    const part = { firstHead, heads, keyCodec: readCodec(keyCodec, `${place}keyCodec`, headDim), valueCodec: readCodec(valueCodec, `${place}valueCodec`, headDim) }
    firstHead += heads
    return Object.freeze(part)
  })
  if (firstHead !== kvHeads) throwExpected(`parts of ${kvHeads} heads together`, name, firstHead, true)
  return Object.freeze(read)
}

function readCodecs(json: Json): HeadCodecsLike[][] {
  return readArray(json, 'codecs').map((layer, index) => readArray(layer, `codecs[${index}]`).map((part) => {
    const members = readObject(part, `codecs[${index}]`)
    const name = (side: string) => readText(members.get(side), `codecs[${index}].${side}`)
    return { heads: readCount(members.get('heads'), `codecs[${index}].heads`, 1, 65536), keyCodec: name('key'), valueCodec: name('value') }
  }))
}

function readCodec(like: CodecLike, name: string, headDim: number): Codec {
  const result = codec(like)
  if (headDim % result.groupChannels !== 0) throw rangeError(`Expected groups that divide headDim ${headDim} for \`${name}\` but received "${result.name}"`)
  return result
}

function readOrders(json: Json, { layers, headDim }: CodebookShape, rotary: RotarySpec | null): KeyOrders {
  const given = readArray(json, 'keyOrders')
  if (given.length !== layers) throwExpected(`those of ${layers} layers`, 'keyOrders', given.length, true)
  return given.map((layer, index) => {
    const channels = readArray(layer, `keyOrders[${index}]`).map((channel) => (typeof channel === 'number' ? channel : NaN))
    if (!isOrder(channels, headDim)) throw rangeError(`Expected every channel below ${headDim} once for \`keyOrders[${index}]\` but received other numbers`)
    if (rotary && pairOrder(channels, rotary) === undefined)
      throw rangeError(`Expected rotary pairs (${rotary.kind}, ${rotary.dim} channels) that stay pairs for \`keyOrders[${index}]\` but received others`)
    return Int32Array.from(channels)
  })
}

function readRotary(json: Json, headDim: number): RotarySpec {
  const members = readObject(json, 'rotary')
  const theta = members.get('theta')
  const scaled = members.get('scaled')
  const dim = readCount(members.get('dim'), 'rotary.dim', 2, headDim)
  if (dim % 2 !== 0) throwExpected('an even number', 'rotary.dim', dim, true)
  if (theta !== undefined && !(typeof theta === 'number' && theta > 0)) throwExpected('a number above 0', 'rotary.theta', theta, typeof theta === 'number')
  if (scaled !== undefined) requireBoolean(scaled, 'rotary.scaled')
  const kind = readOneOf(members.get('kind'), 'rotary.kind', ['half', 'interleaved'])
  return Object.freeze({ kind, dim, ...(theta !== undefined && { theta }), ...(scaled !== undefined && { scaled }) })
}

function readLearned(json: Json): LearnedFrom {
  const members = readObject(json, 'learned')
  const seed = readText(members.get('seed'), 'learned.seed')
  if (!/^\d{1,20}$/.test(seed)) throwExpected('decimal digits', 'learned.seed', seed, true)
  const text = members.get('text')
  const date = members.get('date')
  const levels = members.get('levels')
  const tuned = members.get('tuned')
  const chosen = members.get('chosen')
  return Object.freeze({
    weights: readOneOf(members.get('weights'), 'learned.weights', ['uniform', 'attention', 'fisher']),
    iterations: readCount(members.get('iterations'), 'learned.iterations', 0),
    seed,
    tokens: readCount(members.get('tokens'), 'learned.tokens', 0),
    ...(text !== undefined && { text: readText(text, 'learned.text') }),
    ...(date !== undefined && { date: readText(date, 'learned.date') }),
    ...(levels !== undefined && { levels: readCount(levels, 'learned.levels', 2) }),
    ...(chosen !== undefined && { chosen: readChosen(chosen) }),
    ...(tuned !== undefined && { tuned: readTuned(tuned) }),
  })
}

function readChosen(json: Json): NonNullable<LearnedFrom['chosen']> {
  const members = readObject(json, 'learned.chosen')
  const number = (name: string): number => {
    const value = members.get(name)
    return typeof value === 'number' && Number.isFinite(value) ? value : throwExpected('a number', `learned.chosen.${name}`, value)
  }
  const count = (name: string) => readCount(members.get(name), `learned.chosen.${name}`, 0)
  return Object.freeze({
    budget: number('budget'), bits: number('bits'), loss: number('loss'),
    measure: readOneOf(members.get('measure'), 'learned.chosen.measure', ['divergence', 'fisher']),
    sinks: count('sinks'), window: count('window'),
    candidates: Object.freeze(readArray(members.get('candidates') ?? null, 'learned.chosen.candidates')
      .map((name) => readText(name, 'learned.chosen.candidates'))),
  })
}

function readTuned(json: Json): NonNullable<LearnedFrom['tuned']> {
  const members = readObject(json, 'learned.tuned')
  const count = (name: string) => readCount(members.get(name), `learned.tuned.${name}`, 0)
  return Object.freeze({ steps: count('steps'), window: count('window'), sinks: count('sinks'), text: readText(members.get('text'), 'learned.tuned.text') })
}

function optional<Value>(json: Json | undefined, read: (json: Json) => Value): Value | null {
  return json === null || json === undefined ? null : read(json)
}

function readObject(json: Json, name: string): Map<string, Json> {
  return json instanceof Map ? json : throwExpected('an object', name, json)
}

function readArray(json: Json, name: string): readonly Json[] {
  return Array.isArray(json) ? json : throwExpected('an array', name, json)
}

function readText(json: Json | undefined, name: string): string {
  return typeof json === 'string' ? json : throwExpected('a string', name, json)
}

function readCount(value: unknown, name: string, least: number, most = Number.MAX_SAFE_INTEGER): number {
  if (!Number.isSafeInteger(value) || (value as number) < least || (value as number) > most)
    throwExpected(`an integer from ${least} to ${most}`, name, value, typeof value === 'number')
  return value as number
}

function readOneOf<Name extends string>(json: Json | undefined, name: string, names: readonly Name[]): Name {
  return names.find((known) => known === json) ?? throwExpected(names.map((known) => JSON.stringify(known)).join(' or '), name, json, typeof json === 'string')
}

import { requireInteger, requireList } from './arguments'
import { describe, rangeError, throwExpected } from './errors'

/** How channels become codes: `groupChannels` neighbouring channels of a head share one code of `codeBits` bits. */
export interface Codec {
  /** `cq-<groupChannels>c<codeBits>b` */
  readonly name: string
  /** Channels coupled in one group, 1 to 256; has to divide the model's headDim. */
  readonly groupChannels: number
  /** Bits of one code, 1 to 12. */
  readonly codeBits: number
  /** Centroids of one group: 2 ** codeBits. */
  readonly centroids: number
  /** codeBits / groupChannels */
  readonly bitsPerChannel: number
}

/** A codec, or what {@link codec} makes one of. */
export type CodecLike = string | Pick<Codec, 'groupChannels' | 'codeBits'>

/** Neighbouring kv heads of a layer that share a pair of codecs. */
export interface HeadCodecs {
  readonly firstHead: number
  readonly heads: number
  readonly keyCodec: Codec
  readonly valueCodec: Codec
}

/** {@link HeadCodecs} as they are given: parts of a layer, in the order of its heads. */
export interface HeadCodecsLike {
  /** Default all of the layer's kv heads. */
  heads?: number | undefined
  keyCodec: CodecLike
  valueCodec: CodecLike
}

/** `[layers]`, and of each its parts, which cover all kv heads. */
export type LayerCodecs = readonly (readonly HeadCodecs[])[]

const maxGroupChannels = 256
const maxCodeBits = 12

/**
 * The codec of a name (`cq-8c8b`, or `8c8b` for short) or of its two numbers.
 * @throws {TypeError | RangeError} `ERR_COUPLET_INVALID_ARGUMENT`
 */
export function codec(like: CodecLike): Codec {
  const { groupChannels, codeBits } = typeof like === 'string' ? parse(like) : members(like)
  requireInteger(groupChannels, 'groupChannels', 1, maxGroupChannels)
  requireInteger(codeBits, 'codeBits', 1, maxCodeBits)
  return Object.freeze({
    name: `cq-${groupChannels}c${codeBits}b`,
    groupChannels,
    codeBits,
    centroids: 2 ** codeBits,
    bitsPerChannel: codeBits / groupChannels,
  })
}

function parse(name: string): { groupChannels: number; codeBits: number } {
  const [, groupChannels, codeBits] = /^(?:cq-)?(\d{1,3})c(\d{1,2})b$/.exec(name) ?? []
  if (groupChannels === undefined) throw rangeError(`Expected a name such as "cq-8c8b" for \`codec\` but received ${describe(name)}`)
  return { groupChannels: Number(groupChannels), codeBits: Number(codeBits) }
}

function members(like: Exclude<CodecLike, string>): { groupChannels: number; codeBits: number } {
  if (typeof like !== 'object' || (like as unknown) === null) throwExpected('a name such as "cq-8c8b" or { groupChannels, codeBits }', 'codec', like)
  return like
}

/** Codecs that are given, every one of which has to fit a head, or those of `usual` that do. */
export function codecsFor(headDim: number, given: readonly CodecLike[] | undefined, usual: readonly string[], name: string): Codec[] {
  const fits = ({ groupChannels }: Codec): boolean => headDim % groupChannels === 0
  if (given === undefined) return usual.map((like) => codec(like)).filter(fits)
  requireList(given, name)
  const codecs = given.map((like) => codec(like))
  const wrong = codecs.find((candidate) => !fits(candidate))
  if (wrong) throw rangeError(`Expected codecs whose group channels divide headDim ${headDim} for \`${name}\` but received "${wrong.name}"`)
  return codecs
}

/** The codec of a side in all layers and heads, or undefined where they differ. */
export function commonCodec(codecs: LayerCodecs, side: 'keyCodec' | 'valueCodec'): Codec | undefined {
  const first = codecs[0]?.[0]?.[side]
  return codecs.every((parts) => parts.every((part) => part[side].name === first?.name)) ? first : undefined
}

/** Bits of a code by channel, over all layers, heads and both sides. */
export function meanBits(codecs: LayerCodecs): number {
  const parts = codecs.flat()
  const sum = parts.reduce((bits, { heads, keyCodec, valueCodec }) => bits + heads * (keyCodec.bitsPerChannel + valueCodec.bitsPerChannel), 0)
  return sum / parts.reduce((sides, { heads }) => sides + 2 * heads, 0)
}

/** One side of neighbouring kv heads of a layer. */
export interface SidePart {
  readonly firstHead: number
  readonly heads: number
  readonly codec: Codec
}

export function sideParts(parts: readonly HeadCodecs[], side: 'key' | 'value'): SidePart[] {
  return parts.map(({ firstHead, heads, keyCodec, valueCodec }) => ({ firstHead, heads, codec: side === 'key' ? keyCodec : valueCodec }))
}

import { requireInteger } from './arguments'
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

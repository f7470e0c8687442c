import type { Float16ArrayLike, TypedArrayClass } from './arguments'
import { extent, isArray, requireArray, requireInteger, requireObject, resultArray } from './arguments'
import type { CodecLike } from './codec'
import { codec } from './codec'
import { describe, throwExpected, typeError } from './errors'
import { addon } from './native/addon'
import { abortable, refusePromiseOptions } from './native/call'
import type { NativeCodesArguments } from './native/operations'

/** The shape of packed codes, as docs/layout.md draws them: [pages][kvHeads][page bytes]. */
export interface CodesShape {
  codec: CodecLike
  tokens: number
  kvHeads: number
  /** Channels of a head, 8 to 256, a multiple of the codec's groupChannels. */
  headDim: number
  /** Tokens of a page, a multiple of 8; default 64. */
  pageTokens?: number | undefined
}

export interface CodesSyncOptions extends CodesShape {
  /** Centroids: float32 [kvHeads][groups][centroids][groupChannels]. Prepared anew in every call: code many tokens at once. */
  tables: Float32Array
  /** The token of `codes` that the first row stands for; default 0. Codes of other tokens stay as they are. */
  firstToken?: number | undefined
  /** Elements of `rows` from a token to the next; default kvHeads * headDim. */
  tokenStride?: number | undefined
  /** Elements of `rows` from a kv head to the next; default headDim. */
  headStride?: number | undefined
  /** Threads to use; default 0, all cores. */
  threads?: number | undefined
  /** Default 'cpu'. */
  device?: 'cpu' | 'cuda' | undefined
}

export interface EncodeSyncOptions extends CodesSyncOptions {
  /** Receives the codes of firstToken to firstToken + tokens - 1; default a new array, zero elsewhere. */
  out?: Uint8Array | undefined
}

export interface EncodeOptions extends EncodeSyncOptions {
  /** Rejects with its reason, at most 100 ms after it fires. */
  signal?: AbortSignal | undefined
}

export interface DecodeSyncOptions extends CodesSyncOptions {
  /** What to decode to; default that of `out`, or 'float32'. float16 comes as the bits in a Uint16Array. */
  dtype?: 'float32' | 'float16' | undefined
  /** Receives the rows; default a new array. */
  out?: Float32Array | Uint16Array | undefined
}

export interface DecodeOptions extends DecodeSyncOptions {
  /** Rejects with its reason, at most 100 ms after it fires. */
  signal?: AbortSignal | undefined
}

/** Rows of float32, or of float16: as bits in a Uint16Array, or in a Float16Array where the runtime has it. */
export type Rows = Float32Array | Uint16Array | Float16ArrayLike

/** Bytes that the codes of `tokens` tokens take, whole pages, padding included. */
export function codesBytes(shape: CodesShape): number {
  requireObject(shape, 'shape')
  const { tokens, kvHeads, headDim, pageTokens } = shape
  const { groupChannels, codeBits } = codec(shape.codec)
  return addon().codesBytes({ groupChannels, codeBits, headDim, kvHeads, tokens, pageTokens })
}

/**
 * The code of the nearest centroid (least squared distance, ties to the lowest index) of every group of every row.
 * Arrays are read in place while the promise is pending: neither change them nor transfer their buffers before it settles. Arrays
 * over a SharedArrayBuffer are welcome.
 *
 * @param rows [tokens][kvHeads][headDim], or as tokenStride and headStride say
 * @returns codes, [pages][kvHeads][page bytes]
 * @throws {RangeError} `ERR_COUPLET_NOT_FINITE` with token, kvHead and channel, for a NaN or an infinity
 * @throws {TypeError | RangeError} `ERR_COUPLET_INVALID_ARGUMENT`
 */
export async function encode(rows: Rows, options: EncodeOptions): Promise<Uint8Array> {
  const call = prepareEncode(rows, options)
  await abortable(options.signal, (cancel) => addon().encode({ ...call, cancel }))
  return call.codes
}

/** {@link encode} on the calling thread (and its helpers): blocks until it is done. */
export function encodeSync(rows: Rows, options: EncodeSyncOptions): Uint8Array {
  const call = prepareEncode(rows, options)
  refusePromiseOptions(options)
  addon().encodeSync(call)
  return call.codes
}

/**
 * The centroids that codes stand for.
 *
 * @param codes as {@link encode} returns them
 * @returns rows [tokens][kvHeads][headDim], or as tokenStride and headStride say
 * @throws {TypeError | RangeError} `ERR_COUPLET_INVALID_ARGUMENT`
 */
export function decode(codes: Uint8Array, options: DecodeOptions & { dtype: 'float16' }): Promise<Uint16Array>
export function decode(codes: Uint8Array, options: DecodeOptions & { out: Uint16Array }): Promise<Uint16Array>
export function decode(codes: Uint8Array, options: DecodeOptions & { dtype?: 'float32'; out?: Float32Array }): Promise<Float32Array>
export function decode(codes: Uint8Array, options: DecodeOptions): Promise<Float32Array | Uint16Array>
export async function decode(codes: Uint8Array, options: DecodeOptions): Promise<Float32Array | Uint16Array> {
  const call = prepareDecode(codes, options)
  await abortable(options.signal, (cancel) => addon().decode({ ...call, cancel }))
  return call.rows
}

/** {@link decode} on the calling thread (and its helpers): blocks until it is done. */
export function decodeSync(codes: Uint8Array, options: DecodeSyncOptions & { dtype: 'float16' }): Uint16Array
export function decodeSync(codes: Uint8Array, options: DecodeSyncOptions & { out: Uint16Array }): Uint16Array
export function decodeSync(codes: Uint8Array, options: DecodeSyncOptions & { dtype?: 'float32'; out?: Float32Array }): Float32Array
export function decodeSync(codes: Uint8Array, options: DecodeSyncOptions): Float32Array | Uint16Array
export function decodeSync(codes: Uint8Array, options: DecodeSyncOptions): Float32Array | Uint16Array {
  const call = prepareDecode(codes, options)
  refusePromiseOptions(options)
  addon().decodeSync(call)
  return call.rows
}

/** All but rows and codes. */
type CodesCall = Omit<NativeCodesArguments, 'rows' | 'codes'>

function prepare(options: CodesSyncOptions): CodesCall & { rowElements: number; codesBytes: number } {
  requireObject(options, 'options')
  const { tokens, kvHeads, headDim, pageTokens, firstToken = 0, tables, threads, device } = options
  const { groupChannels, codeBits, centroids } = codec(options.codec)
  requireInteger(tokens, 'tokens', 0)
  requireInteger(kvHeads, 'kvHeads', 1)
  requireInteger(headDim, 'headDim', 8, 256)
  requireInteger(firstToken, 'firstToken', 0, 2 ** 40)
  const { tokenStride = kvHeads * headDim, headStride = headDim } = options
  requireInteger(tokenStride, 'tokenStride', 0, Number.MAX_SAFE_INTEGER)
  requireInteger(headStride, 'headStride', 0, Number.MAX_SAFE_INTEGER)
  requireArray(tables, 'tables', Float32Array, kvHeads * headDim * centroids)
  const rowElements = extent({ count: tokens, stride: tokenStride }, { count: kvHeads, stride: headStride }, { count: headDim, stride: 1 })
  const codeTokens = tokens === 0 ? 0 : firstToken + tokens
  return {
    ...{ groupChannels, codeBits, tokens, kvHeads, headDim, pageTokens, firstToken, tokenStride, headStride, threads, device, tables },
    rowElements,
    codesBytes: addon().codesBytes({ groupChannels, codeBits, headDim, kvHeads, tokens: codeTokens, pageTokens }),
  }
}

function prepareEncode(rows: Rows, options: EncodeSyncOptions): NativeCodesArguments {
  const { rowElements, codesBytes: bytes, ...call } = prepare(options)
  const elements = rowsOf(rows)
  if (elements.length < rowElements) throwExpected(`an array of ${rowElements} or more elements`, 'rows', rows, true)
  return { ...call, rows: elements, codes: resultArray(options.out, Uint8Array, bytes) }
}

function prepareDecode(codes: Uint8Array, options: DecodeSyncOptions): NativeCodesArguments {
  const { rowElements, codesBytes: bytes, ...call } = prepare(options)
  requireArray(codes, 'codes', Uint8Array, bytes)
  const { out, dtype = isArray(out, Uint16Array) ? 'float16' : 'float32' } = options
  if (!['float32', 'float16'].includes(dtype)) throwExpected('"float32" or "float16"', 'dtype', dtype, typeof dtype === 'string')
  const kind: TypedArrayClass<Float32Array | Uint16Array> = dtype === 'float16' ? Uint16Array : Float32Array
  return { ...call, codes, rows: resultArray<Float32Array | Uint16Array>(out, kind, rowElements) }
}

function rowsOf(rows: Rows): Float32Array | Uint16Array {
  if (isArray(rows, Float32Array) || isArray(rows, Uint16Array)) return rows
  if (isArray(rows, { name: 'Float16Array' })) return new Uint16Array(rows.buffer, rows.byteOffset, rows.length)
  throw typeError(`Expected a Float32Array, a Float16Array or a Uint16Array of its bits for \`rows\` but received ${describe(rows)}`)
}

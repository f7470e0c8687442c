import type { Float16ArrayLike, TypedArrayClass } from './arguments'
import { extent, isArray, requireArray, requireInteger, requireObject, resultArray } from './arguments'
import type { CodecLike } from './codec'
import { codec } from './codec'
import type { DeviceMemory, DeviceOptions, ElementType, StreamOption } from './device'
import { deviceOf, isDeviceMemory, placeOf } from './device'
import { describe, throwExpected, typeError } from './errors'
import { addon } from './native/addon'
import { abortable, refusePromiseOptions } from './native/call'
import type { NativeCodesArguments } from './native/operations'
import { PreparedTables, tablesOf } from './tables'

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

export interface CodesSyncOptions extends CodesShape, DeviceOptions, StreamOption {
  /** Centroids: float32 [kvHeads][groups][centroids][groupChannels]; or prepared once for many calls of few tokens. */
  tables: Float32Array | PreparedTables
  /**
   * For encode: what it calls near, float32 [kvHeads][groups][groupChannels][groupChannels]; the code of x is that of the centroid c with the
   * least |M (x - c)|. Default the plain distance, or what prepared tables were given.
   */
  metric?: Float32Array | undefined
  /** The token of `codes` that the first row stands for; default 0. Codes of other tokens stay as they are. */
  firstToken?: number | undefined
  /** Elements of `rows` from a token to the next; default kvHeads * headDim. */
  tokenStride?: number | undefined
  /** Elements of `rows` from a kv head to the next; default headDim. */
  headStride?: number | undefined
  /** Threads of the CPU to use; default 0, all cores. */
  threads?: number | undefined
}

export interface EncodeSyncOptions extends CodesSyncOptions {
  /** What rows are; default what their memory says, 'float16' for a Uint16Array, else 'float32'. bfloat16 is for GPUs. */
  dtype?: ElementType | undefined
  /** Receives the codes of firstToken to firstToken + tokens - 1; default a new array, zero elsewhere. */
  out?: Uint8Array | DeviceMemory | undefined
}

export interface EncodeOptions extends EncodeSyncOptions {
  /** Rejects with its reason, at most 100 ms after it fires. */
  signal?: AbortSignal | undefined
}

export interface DecodeSyncOptions extends CodesSyncOptions {
  /** What to decode to; default that of `out`, or 'float32'. float16 comes as the bits in a Uint16Array, and so does a GPU's bfloat16. */
  dtype?: ElementType | undefined
  /** Receives the rows; default a new array. */
  out?: Float32Array | Uint16Array | DeviceMemory | undefined
}

export interface DecodeOptions extends DecodeSyncOptions {
  /** Rejects with its reason, at most 100 ms after it fires. */
  signal?: AbortSignal | undefined
}

/** Rows of float32, or of float16: as bits in a Uint16Array, or in a Float16Array where the runtime has it. */
export type Rows = Float32Array | Uint16Array | Float16ArrayLike

/** Codes in memory of the host or of the device. */
export type Codes = Uint8Array | DeviceMemory

/** Bytes that the codes of `tokens` tokens take, whole pages, padding included. */
export function codesBytes(shape: CodesShape): number {
  requireObject(shape, 'shape')
  const { tokens, kvHeads, headDim, pageTokens } = shape
  const { groupChannels, codeBits } = codec(shape.codec)
  return addon().codesBytes({ groupChannels, codeBits, headDim, kvHeads, tokens, pageTokens })
}

/**
 * The code of the nearest centroid (least squared distance, ties to the lowest index) of every group of every row. Every device gives
 * the same codes.
 *
 * Arrays are read in place while the promise is pending: neither change them nor transfer their buffers before it settles. Arrays
 * over a SharedArrayBuffer are welcome. On a GPU they are uploaded, 16 MiB of rows at a time; rows and `out` may be the device's own memory
 * instead. With a `stream` they have to be, and tables prepared: the call then only enqueues, its promise settles when it has, and a NaN
 * gets some code instead of an error.
 *
 * @param rows [tokens][kvHeads][headDim], or as tokenStride and headStride say
 * @returns codes, [pages][kvHeads][page bytes]: `out` where it is given
 * @throws {RangeError} `ERR_COUPLET_NOT_FINITE` with token, kvHead and channel, for a NaN or an infinity
 * @throws {TypeError | RangeError} `ERR_COUPLET_INVALID_ARGUMENT`
 * @throws {CoupletError} `ERR_COUPLET_OUT_OF_MEMORY`, `ERR_COUPLET_BACKEND_UNAVAILABLE`, `ERR_COUPLET_DEVICE` when the device failed
 */
export function encode<Out extends DeviceMemory>(rows: Rows | DeviceMemory, options: EncodeOptions & { out: Out }): Promise<Out>
export function encode(rows: Rows | DeviceMemory, options: EncodeOptions & { out?: Uint8Array | undefined }): Promise<Uint8Array>
export function encode(rows: Rows | DeviceMemory, options: EncodeOptions): Promise<Uint8Array | DeviceMemory>
export async function encode(rows: Rows | DeviceMemory, options: EncodeOptions): Promise<Uint8Array | DeviceMemory> {
  const call = prepareEncode(rows, options)
  await abortable(options.signal, (cancel) => addon().encode({ ...call, cancel }))
  return options.out ?? call.codes as Uint8Array
}

/** {@link encode} on the calling thread (and its helpers): blocks until it is done. */
export function encodeSync<Out extends DeviceMemory>(rows: Rows | DeviceMemory, options: EncodeSyncOptions & { out: Out }): Out
export function encodeSync(rows: Rows | DeviceMemory, options: EncodeSyncOptions & { out?: Uint8Array | undefined }): Uint8Array
export function encodeSync(rows: Rows | DeviceMemory, options: EncodeSyncOptions): Uint8Array | DeviceMemory
export function encodeSync(rows: Rows | DeviceMemory, options: EncodeSyncOptions): Uint8Array | DeviceMemory {
  const call = prepareEncode(rows, options)
  refusePromiseOptions(options)
  addon().encodeSync(call)
  return options.out ?? call.codes as Uint8Array
}

/**
 * The centroids that codes stand for. On a GPU as in {@link encode}.
 *
 * @param codes as {@link encode} returns them
 * @returns rows [tokens][kvHeads][headDim], or as tokenStride and headStride say: `out` where it is given
 * @throws {TypeError | RangeError} `ERR_COUPLET_INVALID_ARGUMENT`
 * @throws {CoupletError} `ERR_COUPLET_OUT_OF_MEMORY`, `ERR_COUPLET_BACKEND_UNAVAILABLE`, `ERR_COUPLET_DEVICE` when the device failed
 */
export function decode<Out extends DeviceMemory>(codes: Codes, options: DecodeOptions & { out: Out }): Promise<Out>
export function decode(codes: Codes, options: DecodeOptions & { dtype: 'float16' | 'bfloat16' }): Promise<Uint16Array>
export function decode(codes: Codes, options: DecodeOptions & { out: Uint16Array }): Promise<Uint16Array>
export function decode(codes: Codes, options: DecodeOptions & { dtype?: 'float32'; out?: Float32Array }): Promise<Float32Array>
export function decode(codes: Codes, options: DecodeOptions): Promise<Float32Array | Uint16Array | DeviceMemory>
export async function decode(codes: Codes, options: DecodeOptions): Promise<Float32Array | Uint16Array | DeviceMemory> {
  const call = prepareDecode(codes, options)
  await abortable(options.signal, (cancel) => addon().decode({ ...call, cancel }))
  return options.out ?? call.rows as Float32Array | Uint16Array
}

/** {@link decode} on the calling thread (and its helpers): blocks until it is done. */
export function decodeSync<Out extends DeviceMemory>(codes: Codes, options: DecodeSyncOptions & { out: Out }): Out
export function decodeSync(codes: Codes, options: DecodeSyncOptions & { dtype: 'float16' | 'bfloat16' }): Uint16Array
export function decodeSync(codes: Codes, options: DecodeSyncOptions & { out: Uint16Array }): Uint16Array
export function decodeSync(codes: Codes, options: DecodeSyncOptions & { dtype?: 'float32'; out?: Float32Array }): Float32Array
export function decodeSync(codes: Codes, options: DecodeSyncOptions): Float32Array | Uint16Array | DeviceMemory
export function decodeSync(codes: Codes, options: DecodeSyncOptions): Float32Array | Uint16Array | DeviceMemory {
  const call = prepareDecode(codes, options)
  refusePromiseOptions(options)
  addon().decodeSync(call)
  return options.out ?? call.rows as Float32Array | Uint16Array
}

/** All but rows, codes and what they are made of. */
type CodesCall = Omit<NativeCodesArguments, 'rows' | 'codes' | 'dtype' | 'device' | 'deviceIndex'>

function prepare(options: CodesSyncOptions): CodesCall & { rowElements: number; codesBytes: number } {
  requireObject(options, 'options')
  const { tokens, kvHeads, headDim, pageTokens, firstToken = 0, threads, stream, metric } = options
  const { groupChannels, codeBits, centroids } = codec(options.codec)
  requireInteger(tokens, 'tokens', 0)
  requireInteger(kvHeads, 'kvHeads', 1)
  requireInteger(headDim, 'headDim', 8, 256)
  requireInteger(firstToken, 'firstToken', 0, 2 ** 40)
  const { tokenStride = kvHeads * headDim, headStride = headDim } = options
  requireInteger(tokenStride, 'tokenStride', 0, Number.MAX_SAFE_INTEGER)
  requireInteger(headStride, 'headStride', 0, Number.MAX_SAFE_INTEGER)
  const tables = tablesOf(options.tables, kvHeads * headDim * centroids)
  if (metric !== undefined) requireArray(metric, 'metric', Float32Array, kvHeads * headDim * groupChannels)
  if (metric !== undefined && options.tables instanceof PreparedTables) throwExpected('tables as floats beside `metric`', 'tables', options.tables)
  const rowElements = extent({ count: tokens, stride: tokenStride }, { count: kvHeads, stride: headStride }, { count: headDim, stride: 1 })
  const codeTokens = tokens === 0 ? 0 : firstToken + tokens
  return {
    ...{ groupChannels, codeBits, tokens, kvHeads, headDim, pageTokens, firstToken, tokenStride, headStride, threads, stream, tables, metric },
    rowElements,
    codesBytes: addon().codesBytes({ groupChannels, codeBits, headDim, kvHeads, tokens: codeTokens, pageTokens }),
  }
}

function prepareEncode(rows: Rows | DeviceMemory, options: EncodeSyncOptions): NativeCodesArguments {
  const { rowElements, codesBytes: bytes, ...call } = prepare(options)
  const { out } = options
  const elements = isDeviceMemory(rows) ? rows : rowsOf(rows)
  if (!isDeviceMemory(elements) && elements.length < rowElements) throwExpected(`an array of ${rowElements} or more elements`, 'rows', rows, true)
  return {
    ...call,
    ...deviceOf(options, [rows, out, options.tables]),
    dtype: dtypeOf(elements, options.dtype),
    rows: placeOf(elements),
    codes: isDeviceMemory(out) ? placeOf(out) : resultArray(out, Uint8Array, bytes),
  }
}

function prepareDecode(codes: Codes, options: DecodeSyncOptions): NativeCodesArguments {
  const { rowElements, codesBytes: bytes, ...call } = prepare(options)
  if (!isDeviceMemory(codes)) requireArray(codes, 'codes', Uint8Array, bytes)
  const { out } = options
  const dtype = dtypeOf(out, options.dtype)
  const kind: TypedArrayClass<Float32Array | Uint16Array> = dtype === 'float32' ? Float32Array : Uint16Array
  return {
    ...call,
    ...deviceOf(options, [codes, out, options.tables]),
    dtype,
    codes: placeOf(codes),
    rows: isDeviceMemory(out) ? placeOf(out) : resultArray<Float32Array | Uint16Array>(out, kind, rowElements),
  }
}

/** @internal What rows are, or are to be. */
export function dtypeOf(rows: unknown, asked: ElementType | undefined, name = 'dtype'): ElementType {
  const own = isDeviceMemory(rows) && 'dtype' in rows ? rows.dtype : undefined
  const isHalf = isArray(rows, Uint16Array) || isArray(rows, { name: 'Float16Array' })
  const dtype = asked ?? own ?? (isHalf ? 'float16' : 'float32')
  if (!['float32', 'float16', 'bfloat16'].includes(dtype))
    throwExpected('"float32", "float16" or "bfloat16"', name, dtype, typeof dtype === 'string')
  return dtype
}

/** @internal The bits of float16 as a Uint16Array. */
export function rowsOf(rows: Rows): Float32Array | Uint16Array {
  if (isArray(rows, Float32Array) || isArray(rows, Uint16Array)) return rows
  if (isArray(rows, { name: 'Float16Array' })) return new Uint16Array(rows.buffer, rows.byteOffset, rows.length)
  throw typeError(`Expected a Float32Array, a Float16Array or a Uint16Array of its bits for \`rows\` but received ${describe(rows)}`)
}

/**
 * The safetensors format: u64 little-endian length of the header, the header (JSON, padded with spaces so that the data begin on
 * 8 bytes), the data. Files may be hostile: every size is compared with the size of the file before anything of that size is
 * allocated or read, and the tensors have to tile the data without a gap or an overlap, as the reference implementation asks.
 */
import type { Json } from './json'
import { parseJson } from './json'

/** What is wrong with a file, as the end of a sentence; the reader of each kind of file says what it expected. */
export class FormatError extends Error {
  constructor(why: string, cause?: unknown) {
    super(why, { cause })
  }
}

export type TensorType = 'F16' | 'F32'

export interface TensorInfo {
  dtype: string
  shape: number[]
  /** Bytes [begin, end) of the data. */
  begin: number
  end: number
}

export interface Header {
  tensors: Map<string, TensorInfo>
  metadata: Map<string, string>
  /** Where in the file the data begin. */
  dataOffset: number
}

/** Bytes of the length field that a file begins with. */
export const lengthBytes = 8

/** Of the header; a codebook of 1000 layers needs 0.3 MB. */
const maxHeaderBytes = 4 * 2 ** 20

const elementBytes = new Map(Object.entries({ BOOL: 1, U8: 1, I8: 1, U16: 2, I16: 2, F16: 2, BF16: 2, U32: 4, I32: 4, F32: 4, U64: 8, I64: 8, F64: 8 }))

/**
 * Bytes of the header of a file, from its first 8 bytes.
 * @throws {FormatError} when the file is too short for it, or it is larger than 4 MiB
 */
export function headerBytes(start: Uint8Array, fileBytes: number): number {
  if (fileBytes < lengthBytes || start.length < lengthBytes) throw new FormatError(`it has ${fileBytes} bytes, too few for the length of a header`)
  const length = new DataView(start.buffer, start.byteOffset, lengthBytes).getBigUint64(0, true)
  if (length > BigInt(fileBytes - lengthBytes)) throw new FormatError(`its header claims ${length} bytes and the file has ${fileBytes}`)
  if (length > BigInt(maxHeaderBytes)) throw new FormatError(`its header has ${length} bytes, more than ${maxHeaderBytes}`)
  return Number(length)
}

/**
 * What a header says, checked against the size of the file.
 * @throws {FormatError}
 */
export function parseHeader(bytes: Uint8Array, fileBytes: number): Header {
  const members = parseMembers(bytes)
  const metadata = new Map<string, string>()
  const tensors = new Map<string, TensorInfo>()
  for (const [name, value] of members) {
    if (!(value instanceof Map)) throw new FormatError(`${JSON.stringify(name)} in its header is not an object`)
    if (name !== '__metadata__') tensors.set(name, tensorInfo(name, value))
    else for (const [key, text] of value) metadata.set(key, metadataText(key, text))
  }
  const dataOffset = lengthBytes + bytes.length
  requireTiling(tensors, fileBytes - dataOffset)
  return { tensors, metadata, dataOffset }
}

/** A file's bytes up to its data. The tensors follow in the order given, each shape * element size bytes. */
export function writeHeader(tensors: { name: string; dtype: TensorType; shape: number[] }[], metadata: Record<string, string>): Uint8Array {
  let end = 0
  const entries = tensors.map(({ name, dtype, shape }) => {
    const begin = end
    end += shape.reduce((product, count) => product * count, dtype === 'F16' ? 2 : 4)
    return [name, { dtype, shape, data_offsets: [begin, end] }]
  })
  const json = new TextEncoder().encode(JSON.stringify({ __metadata__: metadata, ...Object.fromEntries(entries) }))
  const padded = Math.ceil(json.length / 8) * 8
  const file = new Uint8Array(lengthBytes + padded).fill(0x20)
  new DataView(file.buffer).setBigUint64(0, BigInt(padded), true)
  file.set(json, lengthBytes)
  return file
}

function parseMembers(bytes: Uint8Array): Map<string, Json> {
  let header: Json
  try {
    header = parseJson(new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }).decode(bytes))
  } catch (cause) {
    throw new FormatError(`its header is not JSON (${(cause as Error).message})`, cause)
  }
  if (!(header instanceof Map)) throw new FormatError('its header is not a JSON object')
  return header
}

function metadataText(key: string, text: Json): string {
  if (typeof text !== 'string') throw new FormatError(`${JSON.stringify(key)} in its __metadata__ is not a string`)
  return text
}

function tensorInfo(name: string, members: Map<string, Json>): TensorInfo {
  const quoted = JSON.stringify(name)
  const dtype = members.get('dtype')
  const shape = members.get('shape')
  const offsets = members.get('data_offsets')
  if (members.size !== 3 || typeof dtype !== 'string' || !isCounts(shape) || !isCounts(offsets) || offsets.length !== 2)
    throw new FormatError(`tensor ${quoted} has more or less than a dtype, a shape and two data_offsets`)
  const [begin, end] = offsets as [number, number]
  const bytes = elementBytes.get(dtype)
  if (bytes === undefined) throw new FormatError(`tensor ${quoted} has the unknown dtype ${JSON.stringify(dtype)}`)
  // A product beyond 2^53 is inexact, but still larger than any end - begin.
  const size = shape.reduce((product, count) => product * count, bytes)
  if (end - begin !== size) throw new FormatError(`tensor ${quoted} needs ${size} bytes for its shape and has ${end - begin}`)
  return { dtype, shape, begin, end }
}

function isCounts(value: Json | undefined): value is number[] {
  return Array.isArray(value) && value.every((count) => Number.isSafeInteger(count) && (count as number) >= 0)
}

/** Sorted by offset, every tensor begins where the one before ends, and the last ends where the file does. */
function requireTiling(tensors: Map<string, TensorInfo>, dataBytes: number): void {
  let end = 0
  for (const [name, tensor] of [...tensors].sort(([, a], [, b]) => a.begin - b.begin || a.end - b.end)) {
    if (tensor.begin !== end) throw new FormatError(`tensor ${JSON.stringify(name)} begins at byte ${tensor.begin} of the data, not at ${end}`)
    end = tensor.end
  }
  if (end !== dataBytes) throw new FormatError(`its tensors take ${end} bytes and the file has ${dataBytes} bytes of data`)
}

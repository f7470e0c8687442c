/** Reads the constants of a graph that couplet needs itself: rotary tables and attention sinks. */
import { open } from 'node:fs/promises'
import { isAbsolute, join, normalize } from 'node:path'

import { CoupletError } from '../errors'
import { float32FromFloat16 } from '../float16'
import type { TensorProto } from './proto'
import { DataType, unpackInt32 } from './proto'

const elementBytes = new Map<number, number>([[DataType.float, 4], [DataType.float16, 2], [DataType.bfloat16, 2], [DataType.uint8, 1]])

/**
 * The elements of a constant tensor as float32.
 * @param folder where files of external data lie; undefined when the model came without one.
 * @throws CoupletError ERR_COUPLET_UNSUPPORTED_MODEL for another element type or data that is not there.
 */
export async function readFloats(tensor: TensorProto, folder: string | undefined): Promise<Float32Array> {
  const { buffer } = await readElements(tensor, folder, 'floats', [DataType.float, DataType.float16, DataType.bfloat16])
  if (tensor.dataType === DataType.float) return new Float32Array(buffer)
  const halves = new Uint16Array(buffer)
  return tensor.dataType === DataType.float16 ? float32FromFloat16(halves) : new Float32Array(Uint32Array.from(halves, (half) => half << 16).buffer)
}

/** The elements of a constant uint8 tensor; otherwise like readFloats. */
export async function readUint8(tensor: TensorProto, folder: string | undefined): Promise<Uint8Array> {
  return readElements(tensor, folder, 'bytes', [DataType.uint8])
}

/** The bytes of a tensor in memory of their own; ONNX and every platform of Node are little-endian. */
async function readElements(tensor: TensorProto, folder: string | undefined, kind: string, types: readonly number[]): Promise<Uint8Array<ArrayBuffer>> {
  const elements = tensor.dims.reduce((product, dim) => product * Number(dim), 1)
  const fail = (reason: string): never => {
    throw new CoupletError('ERR_COUPLET_UNSUPPORTED_MODEL', `Expected tensor "${tensor.name}" of the model to hold ${elements} ${kind} but ${reason}`)
  }
  if (!types.includes(tensor.dataType)) return fail(`its element type is ${tensor.dataType}`)
  const length = elements * elementBytes.get(tensor.dataType)!

  let bytes = tensor.rawData
  if (tensor.dataLocation === 1) bytes = await readExternal(tensor, folder, length, fail)
  else if (tensor.floatData.length > 0) bytes = tensor.floatData
  else if (tensor.int32Data.length > 0) {
    const numbers = unpackInt32(tensor.int32Data)
    bytes = tensor.dataType === DataType.uint8 ? Uint8Array.from(numbers) : new Uint8Array(Uint16Array.from(numbers).buffer)
  }
  if (bytes.length !== length) return fail(`it holds ${bytes.length} bytes`)
  return new Uint8Array(bytes) // a copy starts at an aligned address
}

/**
 * The file that holds a tensor's external data, as a path from the folder of the model.
 * @throws CoupletError ERR_COUPLET_UNSUPPORTED_MODEL for a path that leaves the folder.
 */
export function externalLocation({ name, externalData }: TensorProto): string {
  const location = normalize(externalData.find(({ key }) => key === 'location')?.value ?? '')
  if (location !== '.' && !isAbsolute(location) && !location.startsWith('..')) return location
  throw new CoupletError('ERR_COUPLET_UNSUPPORTED_MODEL', `The external data "${location}" of tensor "${name}" is not in the folder of the model`)
}

async function readExternal(tensor: TensorProto, folder: string | undefined, length: number, fail: (reason: string) => never): Promise<Uint8Array> {
  const place = new Map(tensor.externalData.map(({ key, value }) => [key, value]))
  const location = externalLocation(tensor)
  if (folder === undefined) return fail(`its external data "${location}" is not there`)
  const bytes = new Uint8Array(length)
  try {
    await using file = await open(join(folder, location))
    const { bytesRead } = await file.read(bytes, 0, length, Number(place.get('offset') ?? 0))
    if (bytesRead !== length) return fail(`"${location}" ends after ${bytesRead} of ${length} bytes`)
  } catch (error) {
    if (error instanceof CoupletError) throw error
    return fail(`"${location}" cannot be read: ${(error as Error).message}`)
  }
  return bytes
}

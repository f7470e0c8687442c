/**
 * A codebook as a safetensors file: tensors `layers.<i>.key` and `layers.<i>.value` of shape
 * [kvHeads, groups, centroids, groupChannels], or one for each part of a layer, and the rest as JSON under `couplet` in its string map.
 */
import { closeSync, constants, fstatSync, fsyncSync, openSync, readSync, renameSync, rmSync, writeSync } from 'node:fs'
import { open } from 'node:fs/promises'
import { dirname } from 'node:path'

import type { Codec, HeadCodecs } from './codec'
import type { CodebookMetadata, CodebookShape } from './codebook-metadata'
import { readMetadata, writeMetadata } from './codebook-metadata'
import type { MatrixName, Transforms } from './codebook-transforms'
import { isMatrixName, transformElements, transformShape, wrongInverse } from './codebook-transforms'
import { codeOf, CoupletError, rangeError } from './errors'
import { partialPath, writeAtomically } from './files'
import { float16FromFloat32, float32FromFloat16 } from './float16'
import { parseJson } from './json'
import type { Header, TensorType } from './safetensors'
import { FormatError, headerBytes, lengthBytes, parseHeader, writeHeader } from './safetensors'

export interface CodebookContents {
  shape: CodebookShape
  metadata: CodebookMetadata
  /** One per layer: its parts one after another, float32 [heads][groups][centroids][groupChannels]. */
  keyTables: Float32Array[]
  valueTables: Float32Array[]
  /** Those that `shape` names. */
  transforms: Transforms
}

type Side = 'key' | 'value'
const codecOf = ({ keyCodec, valueCodec }: HeadCodecs, side: Side): Codec => (side === 'key' ? keyCodec : valueCodec)

/** Elements of the tables of some parts of a layer, one side. */
export function tableElements(parts: readonly HeadCodecs[], headDim: number, side: Side): number {
  return parts.reduce((elements, part) => elements + part.heads * headDim * codecOf(part, side).centroids, 0)
}

interface PartTensor {
  name: string
  shape: number[]
  begin: number
  end: number
}

/** The parts of a layer's table, of one side, each with its place in it and its tensor. */
function* tensors({ codecs, headDim }: CodebookShape, layer: number, side: Side): Generator<PartTensor> {
  const parts = codecs[layer]!
  let begin = 0
  for (const part of parts) {
    const { groupChannels, centroids } = codecOf(part, side)
    const end = begin + part.heads * headDim * centroids
    const place = parts.length === 1 ? '' : `heads.${part.firstHead}.`
    yield { name: `layers.${layer}.${place}${side}`, shape: [part.heads, headDim / groupChannels, centroids, groupChannels], begin, end }
    begin = end
  }
}

/** Likewise of a transform. */
function* transformTensors({ codecs, headDim }: CodebookShape, layer: number, name: MatrixName): Generator<PartTensor> {
  const parts = codecs[layer]!
  let begin = 0
  for (const part of parts) {
    const end = begin + transformElements(name, [part], headDim)
    const place = parts.length === 1 ? '' : `heads.${part.firstHead}.`
    yield { name: `layers.${layer}.${place}${name}`, shape: transformShape(name, part, headDim), begin, end }
    begin = end
  }
}

// ---- reading ----

/** Opening a pipe must not wait for somebody to write into it; what is not a file is refused right after. */
const readFlags = constants.O_RDONLY | constants.O_NONBLOCK

/** Asks its driver to fill `into` from byte `offset` of the file on; the driver decides whether that blocks. */
type Reads = Generator<{ offset: number; into: Uint8Array }, CodebookContents, void>

function* contents(fileBytes: number): Reads {
  const length = new Uint8Array(Math.min(lengthBytes, fileBytes))
  yield { offset: 0, into: length }
  const headerText = new Uint8Array(headerBytes(length, fileBytes))
  yield { offset: lengthBytes, into: headerText }
  const header = parseHeader(headerText, fileBytes)
  const { shape, metadata, orders } = described(header)
  const steps = new Map(shape.transforms.filter(isMatrixName).map((name): [MatrixName, Float32Array[]] => [name, []]))
  const wanted = (2 + steps.size) * shape.codecs.reduce((count, parts) => count + parts.length, 0)
  if (header.tensors.size !== wanted) throw new FormatError(`it has ${header.tensors.size} tensors, not ${wanted}, for ${shape.layers} layers`)
  const keyTables: Float32Array[] = []
  const valueTables: Float32Array[] = []
  for (let layer = 0; layer < shape.layers; layer++) {
    keyTables.push(yield* table(header, [...tensors(shape, layer, 'key')], ['F16', 'F32']))
    valueTables.push(yield* table(header, [...tensors(shape, layer, 'value')], ['F16', 'F32']))
    for (const [name, arrays] of steps) arrays.push(yield* table(header, [...transformTensors(shape, layer, name)], ['F32']))
  }
  const transforms: Transforms = { ...(orders && { 'key.group': orders }), ...Object.fromEntries(steps) }
  const wrong = wrongInverse(transforms, shape.headDim)
  if (wrong !== undefined) throw new FormatError(`value.unmix of layer ${wrong} does not undo value.mix`)
  return { shape, metadata, keyTables, valueTables, transforms }
}

/** @param name of what was read, at the beginning of a sentence */
function invalid(name: string, error: unknown): unknown {
  if (!(error instanceof FormatError)) return error
  const { message, cause } = error
  return new CoupletError('ERR_COUPLET_CODEBOOK_INVALID', `${name} is not a codebook that couplet can read: ${message}`, { cause })
}

function described({ metadata }: Header): ReturnType<typeof readMetadata> {
  const text = metadata.get('couplet')
  if (text === undefined) throw new FormatError('its __metadata__ has no "couplet"')
  try {
    return readMetadata(parseJson(text))
  } catch (cause) {
    if (codeOf(cause) === 'ERR_COUPLET_CODEBOOK_MISMATCH') throw cause
    throw new FormatError((cause as Error).message, cause)
  }
}

type TableReads = Generator<{ offset: number; into: Uint8Array }, Float32Array, void>

function* table(header: Header, wanted: readonly PartTensor[], dtypes: readonly TensorType[]): TableReads {
  const parts = wanted.map(({ name, shape: expected, begin, end }) => {
    const tensor = header.tensors.get(name)
    if (tensor === undefined) throw new FormatError(`it has no tensor "${name}"`)
    if (tensor.shape.join() !== expected.join()) throw new FormatError(`tensor "${name}" has shape [${tensor.shape.join(', ')}], not [${expected.join(', ')}]`)
    if (!dtypes.some((dtype) => dtype === tensor.dtype)) throw new FormatError(`tensor "${name}" has dtype ${tensor.dtype}, not ${dtypes.join(' or ')}`)
    return { name, tensor, begin, end }
  })
  // Only now, when the file is known to have all of it.
  const values = new Float32Array(parts.at(-1)!.end)
  for (const { name, tensor, begin, end } of parts) {
    const place = values.subarray(begin, end)
    const raw = tensor.dtype === 'F16' ? new Uint16Array(place.length) : place
    yield { offset: header.dataOffset + tensor.begin, into: new Uint8Array(raw.buffer, raw.byteOffset, raw.byteLength) }
    if (raw instanceof Uint16Array) place.set(float32FromFloat16(raw))
    if (!place.every(Number.isFinite)) throw new FormatError(`tensor "${name}" has a NaN or an infinity`)
  }
  return values
}

export function readBuffer(data: Uint8Array): CodebookContents {
  try {
    const reads = contents(data.length)
    let step = reads.next()
    while (!step.done) {
      const { offset, into } = step.value
      into.set(data.subarray(offset, offset + into.length))
      step = reads.next()
    }
    return step.value
  } catch (error) {
    throw invalid('This', error)
  }
}

export function readFileSync(path: string): CodebookContents {
  const file = openSync(path, readFlags)
  try {
    const stat = fstatSync(file)
    if (!stat.isFile()) throw new FormatError('it is not a file')
    const reads = contents(stat.size)
    let step = reads.next()
    while (!step.done) {
      const { offset, into } = step.value
      for (let filled = 0; filled < into.length; ) filled += some(readSync(file, into, filled, into.length - filled, offset + filled))
      step = reads.next()
    }
    return step.value
  } catch (error) {
    throw invalid(path, error)
  } finally {
    closeSync(file)
  }
}

export async function readFile(path: string, signal?: AbortSignal): Promise<CodebookContents> {
  const file = await open(path, readFlags)
  try {
    const stat = await file.stat()
    if (!stat.isFile()) throw new FormatError('it is not a file')
    const reads = contents(stat.size)
    let step = reads.next()
    while (!step.done) {
      signal?.throwIfAborted()
      const { offset, into } = step.value
      for (let filled = 0; filled < into.length; ) filled += some((await file.read(into, filled, into.length - filled, offset + filled)).bytesRead)
      step = reads.next()
    }
    return step.value
  } catch (error) {
    throw invalid(path, error)
  } finally {
    await file.close()
  }
}

function some(bytesRead: number): number {
  if (bytesRead === 0) throw new FormatError('the file became shorter while it was read')
  return bytesRead
}

// ---- writing ----

/** The bytes of the file, in order; a chunk is at most a table. */
function* chunks({ shape, metadata, keyTables, valueTables, transforms }: CodebookContents, dtype: TensorType): Generator<Uint8Array, void, void> {
  const steps = shape.transforms.filter(isMatrixName)
  const headers = keyTables.flatMap((_, layer) => [
    ...[...tensors(shape, layer, 'key'), ...tensors(shape, layer, 'value')].map(({ name, shape }) => ({ name, dtype, shape })),
    ...steps.flatMap((step) => [...transformTensors(shape, layer, step)].map(({ name, shape }) => ({ name, dtype: 'F32' as const, shape }))),
  ])
  yield writeHeader(headers, { format: 'couplet.codebook', couplet: writeMetadata(shape, metadata, transforms['key.group']) })
  for (const [layer, keys] of keyTables.entries()) {
    yield tableBytes(keys, dtype, layer)
    yield tableBytes(valueTables[layer] ?? keys, dtype, layer)
    for (const step of steps) yield tableBytes(transforms[step]![layer]!, 'F32', layer)
  }
}

function tableBytes(values: Float32Array, dtype: TensorType, layer: number): Uint8Array {
  if (dtype === 'F32') return new Uint8Array(values.buffer, values.byteOffset, values.byteLength)
  const bits = float16FromFloat32(values)
  if (bits.some((half) => (half & 0x7c00) === 0x7c00))
    throw rangeError(`Expected "F32" for \`dtype\` (a centroid of layer ${layer} is beyond what F16 can hold) but received "F16"`)
  return new Uint8Array(bits.buffer)
}

export function writeBuffer(codebook: CodebookContents, dtype: TensorType): Uint8Array {
  const parts = [...chunks(codebook, dtype)]
  // Not Buffer.concat: a Buffer may lie in Node's shared pool, and its slice() does not copy.
  const file = new Uint8Array(parts.reduce((bytes, part) => bytes + part.length, 0))
  let offset = 0
  for (const part of parts) {
    file.set(part, offset)
    offset += part.length
  }
  return file
}

/** Under another name first, so that whoever opens `path` sees the old file or the new one, and a crash leaves the old. */
export function writeFileSync(path: string, codebook: CodebookContents, dtype: TensorType): void {
  const partial = partialPath(path)
  const file = openSync(partial, 'wx')
  try {
    try {
      for (const chunk of chunks(codebook, dtype)) for (let done = 0; done < chunk.length; ) done += writeSync(file, chunk, done)
      fsyncSync(file)
    } finally {
      closeSync(file)
    }
    renameSync(partial, path)
  } catch (error) {
    rmSync(partial, { force: true })
    throw error
  }
  const folder = openSync(dirname(path), 'r')
  try {
    fsyncSync(folder) // the new name is on the disk as well
  } finally {
    closeSync(folder)
  }
}

/** {@link writeFileSync} without blocking. */
export async function writeFile(path: string, codebook: CodebookContents, dtype: TensorType): Promise<void> {
  await writeAtomically(path, chunks(codebook, dtype))
}

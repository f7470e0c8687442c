/** Gradients that somebody else computed: a safetensors file, docs/gradients.md. */
import type { FileHandle } from 'node:fs/promises'
import { open } from 'node:fs/promises'

import { rangeError } from '../errors'
import { float32FromFloat16 } from '../float16'
import type { ModelShape } from '../onnx/decoder'
import type { Header, TensorInfo } from '../safetensors'
import { FormatError, headerBytes, lengthBytes, parseHeader } from '../safetensors'
import type { Side } from './attention'
import { sides } from './attention'

/** The text that gradients have to be of. */
export interface GradientText {
  tokens: number
  /** Tokens of a chunk. */
  length: number
  /** SHA-256 of the token ids, uint32 little-endian, in hexadecimal digits. */
  hash: string
}

const elementBytes: Record<string, number> = { F32: 4, F16: 2, BF16: 2 }

/** An open file of gradients, from which pieces are read: its memory is that of a piece, whatever its size. */
export class GradientFile {
  readonly #path: string
  readonly #file: FileHandle
  readonly #header: Header
  readonly #shape: ModelShape

  private constructor(path: string, file: FileHandle, header: Header, shape: ModelShape) {
    this.#path = path
    this.#file = file
    this.#header = header
    this.#shape = shape
  }

  /** @throws {RangeError} `ERR_COUPLET_INVALID_ARGUMENT` for a file that is none, or that belongs to another model or text; says what differs. */
  static async open(path: string, shape: ModelShape, text: GradientText): Promise<GradientFile> {
    const file = await open(path)
    try {
      const { size } = await file.stat()
      const gradients = new GradientFile(path, file, await readHeader(file, size), shape)
      gradients.#check(text)
      return gradients
    } catch (error) {
      await file.close()
      throw error instanceof FormatError ? unsuitable(path, error.message, error) : error
    }
  }

  /** Gradients of `count` tokens from `first` on: for each layer, float32 [count][kvHeads][headDim]. */
  async read(first: number, count: number): Promise<Record<Side, Float32Array[]>> {
    const result: Record<Side, Float32Array[]> = { key: [], value: [] }
    for (const side of sides) {
      for (let layer = 0; layer < this.#shape.layers; layer++) result[side].push(await this.#readTensor(this.#tensor(layer, side), first, count))
    }
    return result
  }

  async close(): Promise<void> {
    await this.#file.close()
  }

  #check(text: GradientText): void {
    const { metadata, tensors } = this.#header
    const { layers, kvHeads, headDim } = this.#shape
    const refuse = (why: string): never => { throw unsuitable(this.#path, why) }
    if (metadata.get('format') !== 'couplet.gradients') refuse('its __metadata__ has no "format" that is "couplet.gradients"')
    if (tensors.size !== 2 * layers) refuse(`it has ${tensors.size} tensors, and the model ${layers} layers`)
    const expected = [text.tokens, kvHeads, headDim]
    for (const side of sides) {
      for (let layer = 0; layer < layers; layer++) {
        const { shape, dtype } = this.#tensor(layer, side)
        if (!(dtype in elementBytes)) refuse(`its tensors are ${dtype}, not F32, F16 or BF16`)
        if (shape.join() === expected.join()) continue
        refuse(`"layers.${layer}.${side}" has shape [${shape.join(', ')}], and the text and the model ask for [${expected.join(', ')}]`)
      }
    }
    const hash = metadata.get('text')
    if (hash !== undefined && hash !== text.hash) refuse(`it is of the text ${hash}, and this text is ${text.hash}`)
    const length = metadata.get('length')
    if (length !== undefined && length !== String(text.length)) refuse(`it is of chunks of ${length} tokens, and \`length\` is ${text.length}`)
  }

  #tensor(layer: number, side: Side): TensorInfo {
    const name = `layers.${layer}.${side}`
    const tensor = this.#header.tensors.get(name)
    if (tensor === undefined) throw unsuitable(this.#path, `it has no tensor "${name}"`)
    return tensor
  }

  async #readTensor({ dtype, begin }: TensorInfo, first: number, count: number): Promise<Float32Array> {
    const elements = count * this.#shape.kvHeads * this.#shape.headDim
    const width = elementBytes[dtype]!
    const bytes = new Uint8Array(elements * width)
    await readFully(this.#file, bytes, this.#header.dataOffset + begin + (first * elements * width) / count)
    if (dtype === 'F32') return new Float32Array(bytes.buffer)
    const halves = new Uint16Array(bytes.buffer)
    return dtype === 'F16' ? float32FromFloat16(halves) : new Float32Array(Uint32Array.from(halves, (half) => half << 16).buffer)
  }
}

async function readHeader(file: FileHandle, size: number): Promise<Header> {
  const start = new Uint8Array(Math.min(lengthBytes, size))
  await readFully(file, start, 0)
  const text = new Uint8Array(headerBytes(start, size))
  await readFully(file, text, lengthBytes)
  return parseHeader(text, size)
}

async function readFully(file: FileHandle, into: Uint8Array, offset: number): Promise<void> {
  for (let filled = 0; filled < into.length; ) {
    const { bytesRead } = await file.read(into, filled, into.length - filled, offset + filled)
    if (bytesRead === 0) throw new FormatError('it became shorter while it was read')
    filled += bytesRead
  }
}

function unsuitable(path: string, why: string, cause?: unknown): RangeError {
  return Object.assign(rangeError(`Expected a file of gradients of this model and text for \`gradients\` but received "${path}": ${why}`), cause === undefined ? {} : { cause })
}

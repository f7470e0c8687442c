import type { Float16ArrayLike } from './arguments'
import { requireArrayOfAnyKind, requireInteger, requireObject } from './arguments'
import { CoupletError, throwExpected } from './errors'
import { addon } from './native/addon'
import type { NativeBuffer, NativeDevice, NativeMemory } from './native/device'

/** 'auto' is 'cuda' where that can be had, and 'cpu' where it cannot; what is asked for by name and not there is an error. */
export type DeviceName = 'cpu' | 'cuda' | 'auto'

export interface DeviceOptions {
  /** Where to work; default 'cpu', or where the memory that the call is given lies. */
  device?: DeviceName | undefined
  /** Which of them; default 0. */
  deviceIndex?: number | undefined
}

/** What elements are. float16 and bfloat16 are uint16 bits in typed arrays. */
export type ElementType = 'float32' | 'float16' | 'bfloat16'

/** Memory that somebody else keeps, until the call is over or, where it has a stream, until that has got there. */
export interface MemoryAddress {
  /** On the device that the call names. An address that is none ends the device for this process, as in C. */
  address: bigint
  bytes: number
  /** What is there, for calls that take several; default 'float32'. */
  dtype?: ElementType | undefined
}

/** Memory of a device. */
export type DeviceMemory = DeviceBuffer | MemoryAddress

export interface StreamOption {
  /** A cudaStream_t, as its address: the call comes behind what the stream holds. Default: the device's default stream. */
  stream?: bigint | undefined
}

export interface CopyOptions extends StreamOption {
  /** Bytes of the buffer to skip; default 0. */
  offset?: number | undefined
}

export interface ReadOptions extends CopyOptions {
  /** Elements to read into a new array; default all that follow `offset`. */
  length?: number | undefined
}

/** Any typed array; a Buffer too. */
export type AnyTypedArray =
  | Int8Array | Uint8Array | Uint8ClampedArray | Int16Array | Uint16Array | Int32Array | Uint32Array
  | Float32Array | Float64Array | BigInt64Array | BigUint64Array | Float16ArrayLike

/** Its class. */
export interface ArrayClass<Kind> {
  new (length: number): Kind
  readonly BYTES_PER_ELEMENT: number
}

let handleOf: (buffer: DeviceBuffer) => NativeBuffer

/**
 * Memory of a device, which calls on that device read and write in place.
 *
 * It is freed by `dispose()` or `using`, and at the latest when the object is garbage; calls under way keep it until they are over,
 * and freeing waits for what the device does with it. Of the device 'cpu' it is memory outside JavaScript's heap.
 *
 * @example
 * using rows = await DeviceBuffer.from(values, { device: 'cuda' })
 * using codes = await DeviceBuffer.allocate({ bytes: codesBytes(shape), device: 'cuda' })
 * await encode(rows, { ...shape, tables, out: codes })
 * const packed = await codes.read(Uint8Array)
 */
export class DeviceBuffer {
  readonly bytes: number
  /** 'cpu' or 'cuda'. */
  readonly device: Exclude<DeviceName, 'auto'>
  readonly deviceIndex: number
  readonly #handle: NativeBuffer

  static {
    handleOf = (buffer) => buffer.#handle
  }

  private constructor(handle: NativeBuffer) {
    const { bytes, device, deviceIndex } = addon().describeBuffer(handle)
    this.#handle = handle
    this.bytes = bytes
    this.device = device as Exclude<DeviceName, 'auto'>
    this.deviceIndex = deviceIndex
  }

  /**
   * New memory; what it holds is left over from earlier use.
   * @throws {CoupletError} `ERR_COUPLET_OUT_OF_MEMORY` when the device has no more, `ERR_COUPLET_BACKEND_UNAVAILABLE`
   */
  static async allocate(options: DeviceOptions & { bytes: number }): Promise<DeviceBuffer> {
    return new DeviceBuffer(await addon().allocateBuffer(allocation(options)))
  }

  /** {@link allocate}, blocking. */
  static allocateSync(options: DeviceOptions & { bytes: number }): DeviceBuffer {
    return new DeviceBuffer(addon().allocateBufferSync(allocation(options)))
  }

  /** New memory with the bytes of a typed array. */
  static async from(array: AnyTypedArray, options: DeviceOptions = {}): Promise<DeviceBuffer> {
    const { byteLength } = bytesOf(array, 'array')
    const buffer = await DeviceBuffer.allocate({ ...options, bytes: byteLength })
    try {
      await buffer.write(array)
    } catch (error) {
      buffer.dispose()
      throw error
    }
    return buffer
  }

  /** {@link from}, blocking. */
  static fromSync(array: AnyTypedArray, options: DeviceOptions = {}): DeviceBuffer {
    const { byteLength } = bytesOf(array, 'array')
    const buffer = DeviceBuffer.allocateSync({ ...options, bytes: byteLength })
    try {
      buffer.writeSync(array)
    } catch (error) {
      buffer.dispose()
      throw error
    }
    return buffer
  }

  /**
   * Where it lies, for code that speaks to the device itself: the device's own address, of no use to the host.
   * @throws {CoupletError} `ERR_COUPLET_DISPOSED`
   */
  get address(): bigint {
    return addon().describeBuffer(this.#handle).address
  }

  /**
   * Copies the bytes of a typed array to `offset`. The array may be used again when the promise settles.
   * @throws {RangeError} `ERR_COUPLET_INVALID_ARGUMENT` when they do not lie within the buffer
   */
  async write(array: AnyTypedArray, options: CopyOptions = {}): Promise<void> {
    await addon().writeBuffer(this.#copy(bytesOf(array, 'array'), options))
  }

  /** {@link write}, blocking. */
  writeSync(array: AnyTypedArray, options: CopyOptions = {}): void {
    addon().writeBufferSync(this.#copy(bytesOf(array, 'array'), options))
  }

  /**
   * Copies bytes from `offset` on into a typed array, all of it, or into a new one of the class that is given.
   * @returns the array
   * @throws {RangeError} `ERR_COUPLET_INVALID_ARGUMENT` when they do not lie within the buffer
   */
  async read<Kind extends AnyTypedArray>(out: Kind | ArrayClass<Kind>, options: ReadOptions = {}): Promise<Kind> {
    const array = this.#target(out, options)
    await addon().readBuffer(this.#copy(bytesOf(array, 'out'), options))
    return array
  }

  /** {@link read}, blocking. */
  readSync<Kind extends AnyTypedArray>(out: Kind | ArrayClass<Kind>, options: ReadOptions = {}): Kind {
    const array = this.#target(out, options)
    addon().readBufferSync(this.#copy(bytesOf(array, 'out'), options))
    return array
  }

  /** Frees the memory. Twice is harmless. */
  dispose(): void {
    addon().disposeBuffer(this.#handle)
  }

  [Symbol.dispose](): void {
    this.dispose()
  }

  #copy(array: Uint8Array, options: CopyOptions): Parameters<ReturnType<typeof addon>['writeBuffer']>[0] {
    requireObject(options, 'options')
    const { offset = 0, stream } = options
    requireInteger(offset, 'offset', 0, Number.MAX_SAFE_INTEGER)
    return { buffer: this.#handle, array, offset, stream }
  }

  #target<Kind extends AnyTypedArray>(out: Kind | ArrayClass<Kind>, options: ReadOptions): Kind {
    if (typeof out !== 'function') return out
    requireObject(options, 'options')
    if (!(out.BYTES_PER_ELEMENT > 0)) throwExpected('a typed array or the class of one', 'out', out)
    const { offset = 0 } = options
    requireInteger(offset, 'offset', 0, Number.MAX_SAFE_INTEGER)
    const { length = Math.max(0, Math.floor((this.bytes - offset) / out.BYTES_PER_ELEMENT)) } = options
    requireInteger(length, 'length', 0, Number.MAX_SAFE_INTEGER)
    try {
      return new out(length)
    } catch (cause) {
      throw new CoupletError('ERR_COUPLET_OUT_OF_MEMORY', `There is no memory for a result of ${length} elements`, { cause })
    }
  }
}

function allocation(options: DeviceOptions & { bytes: number }): NativeDevice & { bytes: number } {
  requireObject(options, 'options')
  const { bytes, device, deviceIndex } = options
  requireInteger(bytes, 'bytes', 1, Number.MAX_SAFE_INTEGER)
  return { bytes, device, deviceIndex }
}

function bytesOf(array: AnyTypedArray, name: string): Uint8Array {
  requireArrayOfAnyKind(array, name)
  return new Uint8Array(array.buffer, array.byteOffset, array.byteLength)
}

/** @internal */
export function isDeviceMemory(value: unknown): value is DeviceMemory {
  return value instanceof DeviceBuffer || (typeof value === 'object' && value !== null && 'address' in value && !ArrayBuffer.isView(value))
}

/** @internal A typed array as it is, memory of a device as the addon takes it. */
export function placeOf<Kind>(value: Kind): Exclude<Kind, DeviceMemory> | NativeMemory {
  if (!isDeviceMemory(value)) return value as Exclude<Kind, DeviceMemory>
  if (value instanceof DeviceBuffer) return handleOf(value)
  requireInteger(value.bytes, 'bytes', 0, Number.MAX_SAFE_INTEGER)
  return { address: value.address, bytes: value.bytes }
}

/** @internal The device that is asked for, or where the first of `holders` lies; an address does not say. */
export function deviceOf({ device, deviceIndex }: DeviceOptions, holders: readonly unknown[]): NativeDevice {
  if (device !== undefined || deviceIndex !== undefined) return { device, deviceIndex }
  const holder = holders.find((value): value is { device: string; deviceIndex: number } =>
    typeof value === 'object' && value !== null && 'deviceIndex' in value && 'device' in value)
  if (holder) return { device: holder.device, deviceIndex: holder.deviceIndex }
  if (holders.some(isDeviceMemory)) throwExpected('the device of the address', 'device', device)
  return {}
}

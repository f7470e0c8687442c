import type { Handle } from './handle'

export type NativeBuffer = Handle<'buffer'>

/** Memory of a device: a buffer's, or at an address that somebody else keeps. */
export type NativeMemory = NativeBuffer | { address: bigint; bytes: number }

/** couplet::binding::DeviceRequest. */
export interface NativeDevice {
  device?: string | undefined
  deviceIndex?: number | undefined
}

/** What holds memory of a device. */
export interface NativePlace {
  bytes: number
  device: string
  deviceIndex: number
}

export interface NativeCopyArguments {
  buffer: NativeBuffer
  /** The bytes of any typed array. */
  array: Uint8Array
  offset: number
  stream?: bigint | undefined
}

/** What native/binding/device.cc exports. */
export interface DeviceAddon {
  /** Napi::Value promise_form<AllocateWorker>(const Napi::CallbackInfo& info) */
  allocateBuffer(options: NativeDevice & { bytes: number }): Promise<NativeBuffer>
  /** Napi::Value sync_form<AllocateWorker>(const Napi::CallbackInfo& info) */
  allocateBufferSync(options: NativeDevice & { bytes: number }): NativeBuffer
  /** Napi::Value describe_buffer(const Napi::CallbackInfo& info) */
  describeBuffer(buffer: NativeBuffer): NativePlace & { address: bigint }
  /** Napi::Value promise_form<WriteWorker>(const Napi::CallbackInfo& info) */
  writeBuffer(options: NativeCopyArguments): Promise<void>
  /** Napi::Value sync_form<WriteWorker>(const Napi::CallbackInfo& info) */
  writeBufferSync(options: NativeCopyArguments): void
  /** Napi::Value promise_form<ReadWorker>(const Napi::CallbackInfo& info) */
  readBuffer(options: NativeCopyArguments): Promise<void>
  /** Napi::Value sync_form<ReadWorker>(const Napi::CallbackInfo& info) */
  readBufferSync(options: NativeCopyArguments): void
  /** Napi::Value dispose_buffer(const Napi::CallbackInfo& info) */
  disposeBuffer(buffer: NativeBuffer): void
}

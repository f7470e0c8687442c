/** What a device is. */
export interface DeviceInfo {
  index: number
  name: string
  /** 'sm_90'; the instruction set of a CPU. */
  architecture: string
  memoryBytes: number
  /** Now. */
  freeBytes: number
  /** Cores of a CPU. */
  multiprocessors: number
}

/** A device that does not answer, and why. */
export interface SilentDevice {
  index: number
  reason: string
}

/** A backend that this process has, or why it has it not. */
export type BackendState =
  | {
    available: true
    /** What was chosen on this machine: 'avx512', 'sm_90'. */
    variant: string
    /** The newest CUDA that the driver knows, such as '12.8'; absent where no driver is needed. */
    driver?: string
    /** The CUDA that the backend was built with. */
    runtime?: string
    devices: (DeviceInfo | SilentDevice)[]
  }
  | { available: false; reason: string }

export interface NativeBuildInfo {
  version: string
  abi: number
  layout: number
  isa: string
  cores: number
}

/** What native/binding/capabilities.cc exports. */
export interface CapabilitiesAddon {
  /** COUPLET_VERSION: the package version that the addon was built for. */
  readonly version: string
  /** Napi::Value build_info(const Napi::CallbackInfo& info) */
  buildInfo(): NativeBuildInfo
  /** Napi::Value backend_state(const Napi::CallbackInfo& info) */
  backendState(name: string): BackendState
}

import { addon } from './native/addon'
import type { BackendState, DeviceInfo, SilentDevice } from './native/capabilities'

export type { BackendState, DeviceInfo, SilentDevice }

/** What this process can do, and why not more. */
export interface Capabilities {
  /** Of the package. */
  version: string
  /** Version of the interface between the addon and its backends (native/abi). */
  abi: number
  /** Version of the packed format (docs/layout.md). */
  layout: number
  /** Instruction set of the CPU backend: 'avx512', 'avx2' or 'portable'. COUPLET_ISA in the environment can lower it. */
  isa: string
  /** Cores that this process may run on. */
  cores: number
  backends: { cpu: BackendState; cuda: BackendState }
}

/**
 * What is loaded: versions, instruction set, cores, backends with their devices or the reason why one is missing. Where there are
 * GPUs it asks each of them, which takes up to a second each the first time.
 * @throws {CoupletError} `ERR_COUPLET_ADDON` when the addon itself cannot be loaded
 */
export function capabilities(): Capabilities {
  const native = addon()
  return { ...native.buildInfo(), backends: { cpu: native.backendState('cpu'), cuda: native.backendState('cuda') } }
}

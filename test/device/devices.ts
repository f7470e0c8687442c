/** The devices that tests run on: the CPU, the simulator of the CUDA backend, and a GPU where there is one. */
import { decode, decodeSync, DeviceBuffer, encode, encodeSync, kmeans, kmeansSync } from '../../lib'
import type { DeviceName } from '../../lib'

/** A name that releases have no backend for, and types do not have. */
const sim = 'sim' as DeviceName

/** Why tests cannot run on a device; undefined when they can. */
function reasonAgainst(device: DeviceName): string | undefined {
  try {
    DeviceBuffer.allocateSync({ bytes: 1, device }).dispose()
    return undefined
  } catch (error) {
    return (error as Error).message
  }
}

const reasons = new Map(['cpu', sim, 'cuda'].map((name) => [name as DeviceName, reasonAgainst(name as DeviceName)]))

/** The backends for GPUs that are here. */
export const gpus = ([sim, 'cuda'] as DeviceName[]).filter((device) => reasons.get(device) === undefined)

/** One describe for each device. Where there is no simulator its tests are skipped, with the reason in the title. */
export function describeOn(devices: 'all' | 'gpus', title: string, body: (device: DeviceName) => void): void {
  if (devices === 'all') describe(`${title}, cpu`, () => { body('cpu') })
  for (const device of gpus) describe(`${title}, ${device}`, () => { body(device) })
  if (!gpus.includes(sim)) describe.skip(`${title}, sim`, () => { it(`not run: ${reasons.get(sim)}`) })
}

/** The operations with `device` as default. */
export function operationsOn(device: DeviceName) {
  const bind = <Call extends (data: never, options: never) => unknown>(call: Call): Call =>
    ((data: never, options: object | undefined) => call(data, (options && { device, ...options }) as never)) as unknown as Call
  return {
    kmeans: bind(kmeans), kmeansSync: bind(kmeansSync), encode: bind(encode), encodeSync: bind(encodeSync), decode: bind(decode), decodeSync: bind(decodeSync),
  }
}

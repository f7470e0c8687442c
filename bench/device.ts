/** encode, decode and kmeans from JavaScript on a device: with arrays of the host, and with memory of the device. */
import { codec as parseCodec } from '../lib/codec'
import { codesBytes, decodeSync, encodeSync } from '../lib/codes'
import { DeviceBuffer, type DeviceOptions } from '../lib/device'
import { kmeansSync } from '../lib/kmeans'
import { PreparedTables } from '../lib/tables'
import type { CodesShape } from './codes'
import { checkKmeans, type KmeansShape } from './kmeans'
import { measureWall, normals } from './measure'
import type { Row, Table } from './report'

const wallUnit = 'wall microseconds a call, median; "of the host" brings arrays to the device and back, "of the device" enqueues calls on its default stream'

function row(what: string, { seconds, repeats }: { seconds: number; repeats: number }, rate: string): Row {
  return { what, value: seconds * 1e6, rate, wallMs: seconds * 1e3, repeats }
}

export function benchCodesOnDevice(shape: CodesShape, operation: 'encode' | 'decode', on: DeviceOptions, calls: number): Table {
  const { tokens, kvHeads, headDim } = shape
  const codec = parseCodec(shape.codec)
  const tables = normals(kvHeads * headDim * codec.centroids, 2)
  const rows = normals(tokens * kvHeads * headDim, 3)
  const options = { codec, tokens, kvHeads, headDim }
  const codes = encodeSync(rows, { ...options, tables })
  const decoded = decodeSync(codes, { ...options, tables })

  using prepared = PreparedTables.prepareSync(tables, { ...options, ...on })
  using deviceRows = DeviceBuffer.fromSync(operation === 'encode' ? rows : new Float32Array(rows.length), on)
  using deviceCodes = DeviceBuffer.fromSync(operation === 'encode' ? new Uint8Array(codes.length) : codes, on)
  const call = { ...options, ...on, tables: prepared }
  const hostOut = operation === 'encode' ? new Uint8Array(codesBytes(options)) : new Float32Array(rows.length)
  const ofHost = () => {
    if (hostOut instanceof Uint8Array) encodeSync(rows, { ...call, out: hostOut })
    else decodeSync(codes, { ...call, out: hostOut })
  }
  const ofDevice = () => {
    if (operation === 'encode') encodeSync(deviceRows, { ...call, out: deviceCodes, stream: 0n })
    else decodeSync(deviceCodes, { ...call, out: deviceRows, stream: 0n })
  }
  const last = new Uint8Array(1)
  const wait = () => { (operation === 'encode' ? deviceCodes : deviceRows).readSync(last) }

  ofHost()
  ofDevice()
  const found = operation === 'encode' ? deviceCodes.readSync(Uint8Array) : deviceRows.readSync(Float32Array)
  const expected = operation === 'encode' ? codes : decoded
  for (const result of [hostOut, found]) {
    if (Buffer.compare(bytesOf(result), bytesOf(expected)) !== 0) throw new Error(`${operation} on ${on.device} is not what the CPU gives`)
  }

  const rate = (seconds: number) => operation === 'encode'
    ? `${(3 * tokens * kvHeads * headDim * codec.centroids / seconds / 1e9).toFixed(0)} GFLOP/s`
    : `${(rows.byteLength / seconds / 1e9).toFixed(0)} GB/s`
  const host = measureWall(ofHost, () => undefined)
  const device = measureWall(ofDevice, wait, { calls })
  return {
    operation,
    shape: { ...shape, ...named(on) },
    unit: `${wallUnit}; ${operation === 'encode' ? 'GFLOP/s = 3 * headDim * centroids a token and kv head' : 'GB/s = float32 bytes written'}`,
    rows: [
      row(`${codec.name}, float32, of the host`, host, rate(host.seconds)),
      row(`${codec.name}, float32, of the device`, device, rate(device.seconds)),
    ],
  }
}

export function benchKmeansOnDevice(shape: KmeansShape, on: DeviceOptions): Table {
  const points = normals(shape.problems * shape.points * shape.channels, 1)
  const options = { ...shape, tolerance: 0, seed: 1, ...on }
  const { centroids, assignments, inertia } = kmeansSync(points, { ...options, assignments: true })
  checkKmeans(points, shape, centroids, assignments ?? new Int32Array(), inertia)
  using buffer = DeviceBuffer.fromSync(points, on)
  const same = kmeansSync(buffer, options).centroids
  if (Buffer.compare(bytesOf(same), bytesOf(centroids)) !== 0) throw new Error('kmeans of memory of the device is not what it is of the host')
  const flops = 2 * shape.problems * shape.points * shape.centroids * shape.channels * shape.iterations
  const rate = ({ seconds }: { seconds: number }) => `${(flops / seconds / 1e9).toFixed(0)} GFLOP/s`
  const host = measureWall(() => { kmeansSync(points, options) }, () => undefined, { batches: 3 })
  const device = measureWall(() => { kmeansSync(buffer, options) }, () => undefined, { batches: 3 })
  return {
    operation: 'kmeans',
    shape: { ...shape, ...named(on) },
    unit: 'wall microseconds a call, median; GFLOP/s = 2 * points * centroids * channels * iterations / wall time (seeding not counted)',
    rows: [row('points of the host', host, rate(host)), row('points of the device', device, rate(device))],
  }
}

function named({ device = 'cpu', deviceIndex = 0 }: DeviceOptions): { device: string; deviceIndex: number } {
  return { device, deviceIndex }
}

function bytesOf(array: Uint8Array | Float32Array): Uint8Array {
  return new Uint8Array(array.buffer, array.byteOffset, array.byteLength)
}

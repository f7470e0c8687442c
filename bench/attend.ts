import { createRequire } from 'node:module'
import path from 'node:path'
import { Cache, type Sequence } from '../lib/cache'
import { Codebook } from '../lib/codebook'
import { codec as parseCodec } from '../lib/codec'
import { DeviceBuffer, type DeviceOptions } from '../lib/device'
import { float16FromFloat32, float32FromFloat16 } from '../lib/float16'
import { openOnnxruntime } from '../lib/onnx/library'
import { type Binding, gqa, type Precision } from './gqa'
import { measure, measureWall, normals, relativeError } from './measure'
import type { Row, Table } from './report'

export interface AttendShape {
  codec: string
  tokens: number
  queryHeads: number
  kvHeads: number
  headDim: number
  threads: number
}

interface Peers {
  floatAttention<T extends Float32Array | Uint16Array>(shape: Int32Array, scale: number, queries: Float32Array, keys: T, values: T, out: Float32Array): void
  toHalf(from: Float32Array): Uint16Array
  bindGraph(library: string, model: Uint8Array, threads: number, inputs: Binding[], outputs: Binding[]): unknown
  runGraph(graph: unknown): void
}

const theta = 500_000

/** Sequences in a cache, and one decode step of them. */
interface Setting {
  /** Of the first sequence. */
  out: Float32Array
  decode(): void
  /** What peers take: rotated, keys and values [kvHeads][tokens][headDim]. */
  rotated: { queries: Float32Array; keys: Float32Array; values: Float32Array }
  /** Of the first sequence, in double precision. */
  expected: Float64Array
  cache: Cache
  sequences: Sequence[]
  /** The new token, the same for all. */
  last: { queries: Float32Array; keys: Float32Array; values: Float32Array }
  [Symbol.dispose](): void
}

/** `batch` sequences of the same numbers, each with pages of its own. */
function prepare(shape: AttendShape, batch: number, on: DeviceOptions): Setting {
  const { tokens, queryHeads, kvHeads, headDim, threads } = shape
  const codec = parseCodec(shape.codec)
  const tables = () => normals(kvHeads * headDim * codec.centroids, 4)
  const codebook = Codebook.fromTables({
    keyTables: [tables()], valueTables: [normals(kvHeads * headDim * codec.centroids, 5)], keyCodec: codec, valueCodec: codec, kvHeads, headDim,
    metadata: { formatVersion: 1, rotary: { kind: 'half', dim: headDim, theta }, model: null, learned: null },
  })
  const rotary = { kind: 'half', dim: headDim, theta, positions: tokens + 1 } as const
  const cache = new Cache({ codebook, queryHeads, sinks: 0, window: 0, threads, rotary, ...on })
  const sequences = Array.from({ length: batch }, () => cache.sequence())

  // Random centroids of random codes are what the cache then holds exactly: rows to be stored are drawn from the tables.
  const width = kvHeads * headDim
  const keys = drawRows(codebook.keyTable(0), tokens, kvHeads, headDim, codec.groupChannels, codec.centroids, 6)
  const values = drawRows(codebook.valueTable(0), tokens, kvHeads, headDim, codec.groupChannels, codec.centroids, 7)
  for (const sequence of sequences) {
    const fill = cache.begin([{ sequence, tokens: tokens - 1 }])
    fill.appendSync(0, [{ keys: keys.subarray(0, (tokens - 1) * width), values: values.subarray(0, (tokens - 1) * width) }])
    fill.commit()
  }

  const queries = normals(queryHeads * headDim, 8)
  const newest = (tokens - 1) * width
  const last = { queries, keys: keys.subarray(newest), values: values.subarray(newest), out: new Float32Array(queryHeads * headDim) }
  const others = sequences.slice(1).map(() => ({ ...last, out: new Float32Array(queryHeads * headDim) }))
  const decode = () => {
    const step = cache.begin(sequences.map((sequence) => ({ sequence, tokens: 1 })))
    step.attendSync(0, [last, ...others])
    step.abort()
  }
  const rotated = rotate(keys, tokens, kvHeads, headDim)
  const headFirst = { keys: byHead(rotated, tokens, kvHeads, headDim), values: byHead(values, tokens, kvHeads, headDim) }
  const rotatedQueries = rotate(queries, 1, queryHeads, headDim, tokens - 1)
  const expected = reference(rotatedQueries, headFirst.keys, headFirst.values, shape)
  const dispose = () => {
    cache.dispose()
    codebook.dispose()
  }
  return { out: last.out, decode, rotated: { queries: rotatedQueries, ...headFirst }, expected, cache, sequences, last, [Symbol.dispose]: dispose }
}

/** One decode step of `batch` sequences on a device, with float32 arrays of the host, and enqueued with float16 memory of the device. */
export async function benchAttendOnDevice(shape: AttendShape, batch: number, on: DeviceOptions, calls: number): Promise<Table> {
  const { tokens, queryHeads, kvHeads, headDim } = shape
  using setting = prepare(shape, batch, on)
  const { cache, sequences, expected } = setting
  const check = (out: Float32Array) => {
    const error = relativeError(out, expected)
    if (!(error < 5e-3)) throw new Error(`attend is off by ${error} from the reference in double precision`)
    return error
  }
  setting.decode()
  const hostError = check(setting.out)
  const host = await measure(() => { setting.decode() })

  const half = (rows: Float32Array) => DeviceBuffer.fromSync(float16FromFloat32(rows), on)
  const { queries, keys, values } = setting.last
  using newQueries = half(queries)
  using newKeys = half(keys)
  using newValues = half(values)
  const outBytes = queryHeads * headDim * Uint16Array.BYTES_PER_ELEMENT
  using outs = DeviceBuffer.allocateSync({ bytes: batch * outBytes, ...on })
  const rows = sequences.map((_, index) => ({
    queries: newQueries, keys: newKeys, values: newValues,
    out: { address: outs.address + BigInt(index * outBytes), bytes: outBytes, dtype: 'float16' as const },
  }))
  const device = measureWall(() => {
    using step = cache.begin(sequences.map((sequence) => ({ sequence, tokens: 1 })))
    step.attendSync(0, rows, { dtype: 'float16', outDtype: 'float16', stream: 0n })
  }, () => { outs.readSync(new Uint8Array(1)) }, { calls })
  const deviceError = check(float32FromFloat16(outs.readSync(Uint16Array, { length: queryHeads * headDim })))

  const bytes = batch * tokens * kvHeads * headDim * 2 * parseCodec(shape.codec).bitsPerChannel / 8
  const row = (what: string, seconds: number, repeats: number, error: number): Row => ({
    what: `couplet ${shape.codec}, ${what}`, value: seconds * 1e6, rate: `${(bytes / seconds / 1e9).toFixed(0)} GB/s`, error, wallMs: seconds * 1e3, repeats,
  })
  return {
    operation: 'attend',
    shape: { ...shape, batch, device: on.device ?? 'cpu', deviceIndex: on.deviceIndex ?? 0 },
    unit: 'wall microseconds of one decode step, its begin and abort too, median; GB/s = bytes of codes read / that; error against double precision',
    rows: [row('float32, of the host', host.wall, host.repeats, hostError), row('float16, of the device', device.seconds, device.repeats, deviceError)],
  }
}

/** One decode step of one sequence; with `peers`, the same step by others in this process. */
export async function benchAttend(shape: AttendShape, peersAt: string | undefined): Promise<Table> {
  const { tokens, queryHeads, kvHeads, headDim, threads } = shape
  const codec = parseCodec(shape.codec)
  using setting = prepare(shape, 1, {})
  const { expected, rotated } = setting

  const rows: Row[] = []
  const add = async (what: string, out: Float32Array, least: number, call: () => void) => {
    call()
    const off = relativeError(out, expected)
    if (!(off < least)) throw new Error(`${what} is off by ${off} from the reference in double precision`)
    const timing = await measure(call)
    rows.push({ what, value: timing.cpu * 1e9 / tokens / kvHeads, error: off, wallMs: timing.wall * 1e3, repeats: timing.repeats })
  }
  await add(`couplet ${codec.name}`, setting.out, 1e-4, () => { setting.decode() })
  if (peersAt !== undefined) {
    const peers = createRequire(path.join(process.cwd(), 'x'))(peersAt) as Peers
    const heads = queryHeads / kvHeads
    if ([1, 2, 4, 8].includes(heads) && headDim % 64 === 0 && threads === 1) {
      const counts = Int32Array.of(queryHeads, kvHeads, headDim, tokens)
      const out = new Float32Array(queryHeads * headDim)
      const scale = 1 / Math.sqrt(headDim)
      await add('float32 attention, ours', out, 1e-4, () => { peers.floatAttention(counts, scale, rotated.queries, rotated.keys, rotated.values, out) })
      const half = { keys: peers.toHalf(rotated.keys), values: peers.toHalf(rotated.values) }
      await add('float16 attention, ours', out, 1e-2, () => { peers.floatAttention(counts, scale, rotated.queries, half.keys, half.values, out) })
    }
    const library = openOnnxruntime()
    for (const precision of ['float32', 'int8', 'int4'] as Precision[]) {
      const { model, inputs, outputs, out } = gqa(precision, shape, rotated.queries, rotated.keys, rotated.values)
      const graph = peers.bindGraph(library.library, model, threads, inputs, outputs)
      await add(`onnxruntime ${library.version} GroupQueryAttention ${precision}`, out, precision === 'float32' ? 1e-4 : 2, () => { peers.runGraph(graph) })
    }
  }
  return {
    operation: 'attend',
    shape: { ...shape },
    unit: 'CPU nanoseconds a token and kv head = CPU time of one decode step / tokens / kvHeads; error against double precision on the same keys and values',
    rows,
  }
}

function drawRows(table: Float32Array, tokens: number, kvHeads: number, headDim: number, width: number, centroids: number, seed: number): Float32Array {
  const groups = headDim / width
  const rows = new Float32Array(tokens * kvHeads * headDim)
  let state = seed
  for (let unit = 0; unit < tokens * kvHeads * groups; unit++) {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    const row = (unit % (kvHeads * groups)) * centroids + Math.floor((state / 4294967296) * centroids)
    rows.set(table.subarray(row * width, (row + 1) * width), unit * width)
  }
  return rows
}

/** Half-split rotary embedding of [token][head][headDim], in double precision. */
function rotate(rows: Float32Array, tokens: number, heads: number, headDim: number, first = 0): Float32Array {
  const out = new Float32Array(rows.length)
  const half = headDim / 2
  for (let t = 0; t < tokens; t++) {
    for (let i = 0; i < half; i++) {
      const angle = (t + first) * theta ** (-i / half)
      const cos = Math.cos(angle)
      const sin = Math.sin(angle)
      for (let h = 0; h < heads; h++) {
        const at = (t * heads + h) * headDim + i
        const x = rows[at] as number
        const y = rows[at + half] as number
        out[at] = x * cos - y * sin
        out[at + half] = y * cos + x * sin
      }
    }
  }
  return out
}

/** [token][head][headDim] to [head][token][headDim]. */
function byHead(rows: Float32Array, tokens: number, heads: number, headDim: number): Float32Array {
  const out = new Float32Array(rows.length)
  for (let t = 0; t < tokens; t++) {
    for (let h = 0; h < heads; h++) out.set(rows.subarray((t * heads + h) * headDim, (t * heads + h + 1) * headDim), (h * tokens + t) * headDim)
  }
  return out
}

function reference(queries: Float32Array, keys: Float32Array, values: Float32Array, { tokens, queryHeads, kvHeads, headDim }: AttendShape): Float64Array {
  const out = new Float64Array(queryHeads * headDim)
  const scores = new Float64Array(tokens)
  for (let head = 0; head < queryHeads; head++) {
    const start = Math.floor(head / (queryHeads / kvHeads)) * tokens * headDim
    let highest = -Infinity
    for (let t = 0; t < tokens; t++) {
      let sum = 0
      for (let c = 0; c < headDim; c++) sum += (queries[head * headDim + c] as number) * (keys[start + t * headDim + c] as number)
      scores[t] = sum / Math.sqrt(headDim)
      highest = Math.max(highest, scores[t] as number)
    }
    let total = 0
    for (let t = 0; t < tokens; t++) {
      const p = Math.exp((scores[t] as number) - highest)
      total += p
      for (let c = 0; c < headDim; c++) out[head * headDim + c] = (out[head * headDim + c] as number) + p * (values[start + t * headDim + c] as number)
    }
    for (let c = 0; c < headDim; c++) out[head * headDim + c] = (out[head * headDim + c] as number) / total
  }
  return out
}

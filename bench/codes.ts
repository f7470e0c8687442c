import { codec as parseCodec } from '../lib/codec'
import { codesBytes, decodeSync, encodeSync } from '../lib/codes'
import { measure, normals, relativeError } from './measure'
import type { Table } from './report'

export interface CodesShape { codec: string; tokens: number; kvHeads: number; headDim: number; threads: number }

export async function benchCodes(shape: CodesShape, operation: 'encode' | 'decode'): Promise<Table> {
  const { tokens, kvHeads, headDim, threads } = shape
  const codec = parseCodec(shape.codec)
  const tables = normals(kvHeads * headDim * codec.centroids, 2)
  const rows = normals(tokens * kvHeads * headDim, 3)
  const options = { tables, codec, tokens, kvHeads, headDim, threads }
  const codes = encodeSync(rows, options)
  const decoded = decodeSync(codes, options)
  checkNearest(rows, decoded, tables, shape, codec.groupChannels, codec.centroids)

  const channels = tokens * kvHeads * headDim
  const out = operation === 'encode' ? new Uint8Array(codesBytes(options)) : new Float32Array(channels)
  const timing = await measure(() => {
    if (out instanceof Uint8Array) encodeSync(rows, { ...options, out })
    else decodeSync(codes, { ...options, out })
  })
  const perToken = timing.cpu * 1e9 / tokens / kvHeads
  return {
    operation,
    shape: { ...shape },
    unit: operation === 'encode'
      ? 'CPU nanoseconds a token and kv head; GFLOP/s = 3 * headDim * centroids / that; error: what coding these random rows loses'
      : 'CPU nanoseconds a token and kv head; GB/s = float32 bytes written / that; error: what coding these random rows loses',
    rows: [{
      what: `couplet ${codec.name}, float32`, value: perToken,
      rate: operation === 'encode' ? `${(3 * headDim * codec.centroids / perToken).toFixed(1)} GFLOP/s` : `${(headDim * 4 / perToken).toFixed(1)} GB/s`,
      error: relativeError(decoded, rows), wallMs: timing.wall * 1e3, repeats: timing.repeats,
    }],
  }
}

// Every sampled group decodes to a centroid as near as any, in double precision.
function checkNearest(rows: Float32Array, decoded: Float32Array, tables: Float32Array, shape: CodesShape, width: number, centroids: number): void {
  const { tokens, kvHeads, headDim } = shape
  const groups = headDim / width
  for (let unit = 0; unit < tokens * kvHeads * groups; unit += 9973) {
    const at = unit * width
    const table = (unit % (kvHeads * groups)) * centroids * width
    const distance = (data: Float32Array, start: number) => {
      let sum = 0
      for (let c = 0; c < width; c++) sum += ((rows[at + c] as number) - (data[start + c] as number)) ** 2
      return sum
    }
    const own = distance(decoded, at)
    for (let k = 0; k < centroids; k++) if (distance(tables, table + k * width) < own * (1 - 1e-5)) throw new Error(`group ${unit} is nearer to centroid ${k}`)
  }
}

/** Product quantization of rows with couplet's own operations: what CQ, VecInfer and NSNQuant share. */
import { type Codec, codec as parseCodec } from '../../../lib/codec'
import { decodeSync, encodeSync } from '../../../lib/codes'
import { kmeans } from '../../../lib/kmeans'
import type { Rows } from './method'

/** One table a group of a head: float32 [heads][groups][centroids][groupChannels]. */
export interface Tables {
  readonly codec: Codec
  readonly data: Float32Array
  /** What is near, as `encode` takes it. */
  readonly metric?: Float32Array | undefined
}

export async function learnTables(rows: Rows, name: string, { threads, iterations = 30 }: { threads: number; iterations?: number }): Promise<Tables> {
  const codec = parseCodec(name)
  const { heads, tokens, channels } = rows
  const data = new Float32Array(heads * channels * codec.centroids)
  for (let head = 0; head < heads; head++) {
    const { centroids } = await kmeans(rows.data.subarray(head * tokens * channels, (head + 1) * tokens * channels), {
      problems: channels / codec.groupChannels, points: tokens, channels: codec.groupChannels, centroids: codec.centroids, iterations, threads,
      layout: { problemStride: codec.groupChannels, pointStride: channels },
    })
    data.set(centroids, head * channels * codec.centroids)
  }
  return { codec, data }
}

/** Replaces rows by their nearest centroids. @returns bits of the codes */
export function toCentroids({ data, heads, tokens, channels }: Rows, tables: Tables, threads: number): number {
  if (tokens === 0) return 0
  const shape = { codec: tables.codec, tokens, kvHeads: heads, headDim: channels }
  const layout = { ...shape, tables: tables.data, tokenStride: channels, headStride: tokens * channels, threads }
  const codes = encodeSync(data, { ...layout, metric: tables.metric })
  decodeSync(codes, { ...layout, out: data })
  return data.length * tables.codec.bitsPerChannel
}

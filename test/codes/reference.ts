/** encode and decode as docs/layout.md says, in double precision and without a thought for speed. */
import type { Codec } from '../../lib'

export interface Shape {
  codec: Codec
  tokens: number
  kvHeads: number
  headDim: number
  pageTokens: number
}

/** Centroids of one group: groupChannels numbers each, from `tables` [kvHeads][groups][centroids][groupChannels]. */
function centroid(tables: Float32Array, { codec, headDim }: Shape, kvHead: number, group: number, code: number): Float32Array {
  const { centroids, groupChannels } = codec
  const row = ((kvHead * headDim) / groupChannels + group) * centroids + code
  return tables.subarray(row * groupChannels, (row + 1) * groupChannels)
}

export interface Choice {
  /** The nearest centroid; the lowest index of those at the same distance. */
  code: number
  /** Squared distances to all centroids. */
  distances: number[]
}

/** `rows` is [tokens][kvHeads][headDim]. */
export function nearest(rows: ArrayLike<number>, tables: Float32Array, shape: Shape, token: number, kvHead: number, group: number): Choice {
  const { codec, kvHeads, headDim } = shape
  const first = (token * kvHeads + kvHead) * headDim + group * codec.groupChannels
  const distances = Array.from({ length: codec.centroids }, (_, code) =>
    centroid(tables, shape, kvHead, group, code).reduce((sum, value, channel) => sum + ((rows[first + channel] ?? NaN) - value) ** 2, 0),
  )
  return { code: distances.indexOf(Math.min(...distances)), distances }
}

/** The code that the packed bytes hold. */
export function codeAt(codes: Uint8Array, shape: Shape, token: number, kvHead: number, group: number): number {
  const { codec, kvHeads, headDim, pageTokens } = shape
  const rowBytes = (pageTokens * codec.codeBits) / 8
  const pageBytes = Math.ceil(((headDim / codec.groupChannels) * rowBytes) / 64) * 64
  const page = Math.floor(token / pageTokens)
  const row = (page * kvHeads + kvHead) * pageBytes + group * rowBytes
  let code = 0
  for (let bit = 0; bit < codec.codeBits; bit++) {
    const position = (token % pageTokens) * codec.codeBits + bit
    code |= (((codes[row + (position >> 3)] ?? 0) >> (position & 7)) & 1) << bit
  }
  return code
}

/** [tokens][kvHeads][headDim] */
export function decoded(codes: Uint8Array, tables: Float32Array, shape: Shape): Float32Array {
  const { codec, tokens, kvHeads, headDim } = shape
  const rows = new Float32Array(tokens * kvHeads * headDim)
  for (let token = 0; token < tokens; token++)
    for (let kvHead = 0; kvHead < kvHeads; kvHead++)
      for (let group = 0; group < headDim / codec.groupChannels; group++)
        rows.set(
          centroid(tables, shape, kvHead, group, codeAt(codes, shape, token, kvHead, group)),
          (token * kvHeads + kvHead) * headDim + group * codec.groupChannels,
        )
  return rows
}

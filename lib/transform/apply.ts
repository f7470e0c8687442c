/** Activations of a side as its codes see them, and centroids back to what a codebook stores. */
import { setImmediate } from 'node:timers/promises'
import { resultArray } from '../arguments'
import type { SideTransforms } from './learn'
import { invert } from './matrix'

/** float32 [tokens][kvHeads][headDim]; weights: gradients of as many elements, or of heads, or none. */
export interface SideRows {
  readonly rows: Float32Array
  readonly weights: Float32Array | undefined
}

export interface RowsShape {
  tokens: number
  kvHeads: number
  headDim: number
}

/** Products that the JavaScript thread is kept with at a time: some 5 ms. */
const productsAtOnce = 2 ** 22

/** Rows mixed, and gradients by the mixed rows. What is given is not written. */
export async function mixSide(side: SideRows, { mix, unmix }: SideTransforms, shape: RowsShape): Promise<SideRows> {
  if (mix === undefined || unmix === undefined) return side
  const size = shape.headDim
  const weights = areGradients(side) ? await throughBlocks(side.weights!, { matrices: unmix, size, transpose: true }, shape) : side.weights
  return { rows: await throughBlocks(side.rows, { matrices: mix, size, transpose: false }, shape), weights }
}

/** Rows of heads, float32 [heads][tokens][channels], in place: each head through its matrix. */
export function mixRows(rows: Float32Array, matrices: Float32Array, { tokens, channels }: { tokens: number; channels: number }): void {
  const blocks: Blocks = { matrices, size: channels, transpose: false }
  const mixed = new Float32Array(rows.length)
  for (let row = 0; row * channels < rows.length; row++) multiply(rows, row * channels, blocks, Math.floor(row / tokens), mixed)
  rows.set(mixed)
}

/** Rows as distances see them under a metric of groups of `groupChannels`, and gradients by them. */
export async function measureSide(side: SideRows, metric: Float32Array | undefined, shape: RowsShape & { groupChannels: number }): Promise<SideRows> {
  if (metric === undefined) return side
  const size = shape.groupChannels
  const weights = areGradients(side) ? await throughBlocks(side.weights!, { matrices: inverses(metric, size), size, transpose: false }, shape) : side.weights
  return { rows: await throughBlocks(side.rows, { matrices: metric, size, transpose: true }, shape), weights }
}

/** Centroids that were learned of measured rows, [groups of all heads][centroids][groupChannels]: as rows have them. */
export function unmeasured(table: Float32Array, metric: Float32Array | undefined, groupChannels: number): Float32Array {
  if (metric === undefined) return table
  const groups = metric.length / groupChannels ** 2
  const centroids = table.length / groups / groupChannels
  const out = new Float32Array(table.length)
  const back: Blocks = { matrices: inverses(metric, groupChannels), size: groupChannels, transpose: true }
  for (let row = 0; row < groups * centroids; row++) multiply(table, row * groupChannels, back, Math.floor(row / centroids), out)
  return out
}

const areGradients = ({ rows, weights }: SideRows): boolean => weights?.length === rows.length

/** Square matrices of consecutive channels; x becomes x M, or x Mᵀ. */
interface Blocks {
  matrices: Float32Array
  size: number
  transpose: boolean
}

function inverses(matrices: Float32Array, size: number): Float32Array {
  const out = new Float32Array(matrices.length)
  for (let at = 0; at < matrices.length; at += size * size) out.set(invert(Float64Array.from(matrices.subarray(at, at + size * size)), size), at)
  return out
}

async function throughBlocks(rows: Float32Array, blocks: Blocks, { tokens, kvHeads, headDim }: RowsShape): Promise<Float32Array> {
  const out = resultArray(undefined, Float32Array, rows.length)
  const count = (kvHeads * headDim) / blocks.size
  const pause = Math.max(1, Math.floor(productsAtOnce / (count * blocks.size ** 2)))
  for (let token = 0; token < tokens; token++) {
    for (let block = 0; block < count; block++) multiply(rows, (token * count + block) * blocks.size, blocks, block, out)
    if (token % pause === 0) await setImmediate()
  }
  return out
}

function multiply(rows: Float32Array, at: number, { matrices, size, transpose }: Blocks, block: number, out: Float32Array): void {
  const [along, across] = transpose ? [1, size] : [size, 1]
  for (let to = 0; to < size; to++) {
    let sum = 0
    for (let from = 0, entry = block * size * size + to * across; from < size; from++, entry += along) sum += rows[at + from]! * matrices[entry]!
    out[at + to] = sum
  }
}

/** Activations of a side as its codes see them, and centroids back to what a codebook stores. */
import { setImmediate } from 'node:timers/promises'
import { resultArray } from '../arguments'
import { inverseOrder } from '../rotary-pairs'
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

/** Rows as codes see them, but for metrics: in their order, and mixed; and gradients by those. What is given is not written. */
export async function enterSide(side: SideRows, { order, mix, unmix }: SideTransforms, shape: RowsShape): Promise<SideRows> {
  const weights = async (through: (gradients: Float32Array) => Promise<Float32Array>) => areGradients(side) ? through(side.weights!) : side.weights
  if (order) return { rows: await inOrder(side.rows, order), weights: await weights((gradients) => inOrder(gradients, order)) }
  if (mix === undefined || unmix === undefined) return side
  const size = shape.headDim
  return {
    rows: await throughBlocks(side.rows, { matrices: mix, size, transpose: false }, shape),
    weights: await weights((gradients) => throughBlocks(gradients, { matrices: unmix, size, transpose: true }, shape)),
  }
}

/** What {@link enterSide} made of rows as the model has them. */
export async function leaveSide(rows: Float32Array, { order, mix, unmix }: SideTransforms, shape: RowsShape): Promise<Float32Array> {
  const back: SideTransforms = { ...(order && { order: inverseOrder(order) }), ...(mix && unmix && { mix: unmix, unmix: mix }) }
  return (await enterSide({ rows, weights: undefined }, back, shape)).rows
}

/** Rows of heads in place: channel order[c] of each at place c. */
export function reorderRows(rows: Float32Array, order: Int32Array): void {
  const row = new Float32Array(order.length)
  for (let first = 0; first < rows.length; first += order.length) {
    row.set(rows.subarray(first, first + order.length))
    for (let place = 0; place < order.length; place++) rows[first + place] = row[order[place]!]!
  }
}

async function inOrder(rows: Float32Array, order: Int32Array): Promise<Float32Array> {
  const out = resultArray(undefined, Float32Array, rows.length)
  out.set(rows)
  const slice = Math.ceil(productsAtOnce / order.length) * order.length
  for (let first = 0; first < out.length; first += slice) {
    reorderRows(out.subarray(first, first + slice), order)
    await setImmediate()
  }
  return out
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

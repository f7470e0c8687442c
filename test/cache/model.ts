// The cache as plain arrays: every token's keys and values, as given and as its codes say, and attention in double precision.
// All numbers are multiples of 1/8 of small size, so that float32 distances to centroids are exact and every tie is a tie.
import { Codebook } from '../../lib/codebook'
import type { Prefill } from '../../lib/cache'

export const shape = { layers: 2, queryHeads: 4, kvHeads: 2, headDim: 32 }
export const rotary = { kind: 'half' as const, dim: 16, theta: 100 }
export const keyCodec = { groupChannels: 4, codeBits: 3 }
export const valueCodec = { groupChannels: 8, codeBits: 5 }
export const pageTokens = 64
const { layers, queryHeads, kvHeads, headDim } = shape
const kvElements = kvHeads * headDim
const queryElements = queryHeads * headDim

/** The same numbers from the same seed (SplitMix32). */
export function random(seed: number): () => number {
  let state = seed
  return () => {
    state = (state + 0x9e3779b9) | 0
    let z = Math.imul(state ^ (state >>> 16), 0x21f0aaad)
    z = Math.imul(z ^ (z >>> 15), 0x735a2d97)
    return ((z ^ (z >>> 15)) >>> 0) / 2 ** 32
  }
}

export function rows(elements: number, next: () => number): Float32Array {
  return Float32Array.from({ length: elements }, () => (Math.floor(next() * 33) - 16) / 8)
}

export const codebook = makeCodebook()

function makeCodebook(): Codebook {
  const next = random(1)
  const tables = (centroids: number): Float32Array[] => Array.from({ length: layers }, () => rows(kvElements * centroids, next))
  const keyTables = tables(2 ** keyCodec.codeBits)
  const valueTables = tables(2 ** valueCodec.codeBits)
  return Codebook.fromTables({ keyTables, valueTables, keyCodec, valueCodec, kvHeads, headDim })
}

/** What the centroids nearest to one token's row [kvHeads][headDim] make of it. */
export function coded(row: Float32Array, table: Float32Array, { groupChannels, codeBits }: typeof keyCodec): Float32Array {
  const out = new Float32Array(row.length)
  for (let start = 0; start < row.length; start += groupChannels) {
    const centroids = table.subarray(start << codeBits, (start + groupChannels) << codeBits)
    let best = 0
    let bestDistance = Infinity
    for (let code = 0; code < centroids.length; code += groupChannels) {
      let distance = 0
      for (let c = 0; c < groupChannels; c++) distance += (row[start + c]! - centroids[code + c]!) ** 2
      if (distance < bestDistance) [best, bestDistance] = [code, distance]
    }
    out.set(centroids.subarray(best, best + groupChannels), start)
  }
  return out
}

interface Side {
  raw: Float32Array
  coded: Float32Array
}
interface Token {
  layers: { keys: Side; values: Side }[]
}

export interface LayerInput {
  queries: Float32Array
  keys: Float32Array
  values: Float32Array
}

/** Random new tokens, an input per layer. */
export function newTokens(tokens: number, next: () => number): LayerInput[] {
  return Array.from({ length: layers }, () => ({
    queries: rows(tokens * queryElements, next),
    keys: rows(tokens * kvElements, next),
    values: rows(tokens * kvElements, next),
  }))
}

export interface CacheShape {
  sinks: number
  window: number
}

export class ModelSequence {
  tokens: Token[] = []
  codedEnd: number

  constructor(readonly cache: CacheShape) {
    this.codedEnd = cache.sinks
  }

  fork(): ModelSequence {
    const copy = new ModelSequence(this.cache)
    copy.tokens = [...this.tokens]
    copy.codedEnd = this.codedEnd
    return copy
  }

  truncate(tokens: number): void {
    this.tokens.length = tokens
    this.codedEnd = Math.max(this.cache.sinks, Math.min(this.codedEnd, tokens))
  }

  /** Outputs per layer, [tokens][queryHeads][headDim]. */
  advance(input: LayerInput[], count: number, prefill: Prefill): Float64Array[] {
    const { window } = this.cache
    const first = this.tokens.length
    const oldCodedEnd = this.codedEnd
    for (let i = 0; i < count; i++) this.tokens.push({ layers: input.map((layer, index) => tokenOf(layer, index, i)) })
    this.codedEnd = Math.max(oldCodedEnd, this.tokens.length - window)
    return input.map(({ queries }, layer) => {
      const out = new Float64Array(count * queryElements)
      for (let i = 0; i < count; i++) {
        const position = first + i
        const mostCoded = Math.min(this.codedEnd, prefill === 'exact' ? first : Infinity)
        const codedEnd = Math.max(oldCodedEnd, Math.min(mostCoded, position - window + 1))
        out.set(this.#attend(layer, queries.subarray(i * queryElements, (i + 1) * queryElements), position, codedEnd), i * queryElements)
      }
      return out
    })
  }

  #attend(layer: number, queries: Float32Array, position: number, codedEnd: number): Float64Array {
    const out = new Float64Array(queryElements)
    const read = (token: number, side: 'keys' | 'values'): Float32Array => {
      const { raw, coded } = this.tokens[token]!.layers[layer]![side]
      return token >= this.cache.sinks && token < codedEnd ? coded : raw
    }
    const keys = Array.from({ length: position + 1 }, (_, token) => rotated(read(token, 'keys'), token))
    for (let head = 0; head < queryHeads; head++) {
      const query = rotated(queries.subarray(head * headDim, (head + 1) * headDim), position)
      const start = Math.floor((head * kvHeads) / queryHeads) * headDim
      const logits = keys.map((key) => dot(query, key, start) / Math.sqrt(headDim))
      const largest = Math.max(...logits)
      const weights = logits.map((logit) => Math.exp(logit - largest))
      const total = weights.reduce((sum, weight) => sum + weight, 0)
      weights.forEach((weight, token) => {
        const value = read(token, 'values')
        for (let c = 0; c < headDim; c++) out[head * headDim + c]! += (weight / total) * value[start + c]!
      })
    }
    return out
  }
}

function tokenOf({ keys, values }: LayerInput, layer: number, index: number): { keys: Side; values: Side } {
  const key = keys.slice(index * kvElements, (index + 1) * kvElements)
  const value = values.slice(index * kvElements, (index + 1) * kvElements)
  return {
    keys: { raw: key, coded: coded(key, codebook.keyTable(layer), keyCodec) },
    values: { raw: value, coded: coded(value, codebook.valueTable(layer), valueCodec) },
  }
}

/** Any number of heads. */
function rotated(row: Float32Array, position: number): Float64Array {
  const out = Float64Array.from(row)
  const half = rotary.dim / 2
  for (let head = 0; head < row.length; head += headDim) {
    for (let i = 0; i < half; i++) {
      const angle = position * rotary.theta ** (-i / half)
      const [x, y] = [row[head + i]!, row[head + i + half]!]
      out[head + i] = x * Math.cos(angle) - y * Math.sin(angle)
      out[head + i + half] = y * Math.cos(angle) + x * Math.sin(angle)
    }
  }
  return out
}

function dot(query: Float64Array, keys: Float64Array, start: number): number {
  let sum = 0
  for (let c = 0; c < headDim; c++) sum += query[c]! * keys[start + c]!
  return sum
}

/** Bytes that a sequence takes which shares nothing: native/cache/blocks.h in one formula. */
export function expectedBytes({ tokens, codedEnd, cache: { sinks } }: ModelSequence): number {
  const pageBytes = ({ groupChannels, codeBits }: typeof keyCodec): number => Math.ceil(((headDim / groupChannels) * pageTokens * codeBits) / 8 / 64) * 64
  const blockBytes = layers * kvHeads * (pageBytes(keyCodec) + pageBytes(valueCodec))
  const pages = codedEnd > sinks ? Math.ceil(codedEnd / pageTokens) - Math.floor(sinks / pageTokens) : 0
  const heldSinks = Math.min(tokens.length, sinks)
  const sinkSlots = Math.min(Math.ceil(heldSinks / 16) * 16, sinks)
  const windowBlocks = tokens.length > codedEnd ? Math.ceil((tokens.length - sinks) / 16) - Math.floor((codedEnd - sinks) / 16) : 0
  return pages * blockBytes + (sinkSlots + windowBlocks * 16) * layers * 2 * kvElements * 4
}

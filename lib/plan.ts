/** What a cache takes, before there is one. */
import { requireInteger, requireList, requireObject } from './arguments'
import { Cache } from './cache'
import { Codebook } from './codebook'
import type { Codec, CodecLike, LayerCodecs } from './codec'
import { codecsFor, meanBits } from './codec'
import { codesBytes } from './codes'
import { throwExpected } from './errors'

export interface PlanOptions {
  layers: number
  kvHeads: number
  /** Channels of a head: 32 to 256 in steps of 8. */
  headDim: number
  /** Tokens of each sequence. */
  context: number
  /** Default 1. */
  sequences?: number | undefined
  /** Codecs to plan for, of both sides. Default 2c8b, 4c8b, 8c10b, 8c8b and 16c12b, as far as they fit headDim. */
  codecs?: readonly CodecLike[] | undefined
  /** Codebooks to plan for as well, such as those whose codecs differ by layer and head. */
  codebooks?: readonly Codebook[] | undefined
  /** First tokens of a sequence in full precision; default 4. */
  sinks?: number | undefined
  /** Last tokens of a sequence in full precision; default 32. */
  window?: number | undefined
  /** Bytes that caches and codebook may take together. */
  budget?: number | undefined
}

export interface PlannedCache {
  /** `float16`, `int8`, `int4`, a codec's name, or those of a codebook: `cq-4c8b/cq-8c8b` of keys and values, `mixed-1.25` with the bits of its codes. */
  name: string
  /** Bytes of codes of all sequences, padding included; of a cache that is not couplet's, all of it. */
  pageBytes: number
  /** Bytes of tokens in full precision, slots not used yet included. */
  rawBytes: number
  /** Bytes of the tables in memory, once for all sequences. */
  codebookBytes: number
  /** All three. */
  totalBytes: number
  /** 8 * totalBytes over the channels of all tokens. */
  bitsPerChannel: number
  /**
   * Tokens that each sequence can reach within `budget`, one by one and all sequences alike; 0 when not even one fits. `memory` of the
   * cache is then the budget less codebookBytes. Undefined without a budget.
   */
  longestContext: number | undefined
}

/** Tokens of a page and of a block of full-precision tokens (native/abi/layout.h, native/cache/blocks.h). */
const pageTokens = 64
const rawBlockTokens = 16
/** The most that a sequence holds. */
const mostTokens = 2 ** 31 - 1

const usualCodecs = ['cq-2c8b', 'cq-4c8b', 'cq-8c10b', 'cq-8c8b', 'cq-16c12b']

/** Scalar caches: blocks of 32 elements with a float16 scale, as ggml's q8_0 and q4_0; onnxruntime's are of like size. */
const scalarBits: Record<string, number> = { float16: 16, int8: 8.5, int4: 4.5 }

/**
 * Memory of a KV cache in float16, in plain integers and in each codec, exact for couplet's: what `cache.statistics()` says once
 * sequences of `context` tokens are in it.
 *
 * @throws {TypeError | RangeError} `ERR_COUPLET_INVALID_ARGUMENT`
 */
export function plan(options: PlanOptions): PlannedCache[] {
  requireObject(options, 'options')
  const { layers, kvHeads, headDim, context, sequences = 1, sinks = 4, window = 32, budget } = options
  requireInteger(layers, 'layers', 1, 65536)
  requireInteger(kvHeads, 'kvHeads', 1)
  requireInteger(headDim, 'headDim', 32, 256)
  if (headDim % 8 !== 0) throwExpected('a multiple of 8', 'headDim', headDim, true)
  requireInteger(context, 'context', 1, mostTokens)
  requireInteger(sequences, 'sequences', 1)
  requireInteger(sinks, 'sinks', 0)
  requireInteger(window, 'window', 0)
  if (budget !== undefined) requireInteger(budget, 'budget', 1, Number.MAX_SAFE_INTEGER)
  if (options.codebooks !== undefined) requireList(options.codebooks, 'codebooks')
  const codecs = codecsFor(headDim, options.codecs, usualCodecs, 'codecs')

  const channels = layers * 2 * kvHeads * headDim
  const planned = (name: string, codebookBytes: number, { pageBytes, rawBytes }: Sizes, peakOf: (length: number) => number): PlannedCache => {
    const totalBytes = sequences * (pageBytes + rawBytes) + codebookBytes
    const room = budget === undefined ? undefined : Math.floor((budget - codebookBytes) / sequences)
    return {
      name,
      pageBytes: sequences * pageBytes,
      rawBytes: sequences * rawBytes,
      codebookBytes,
      totalBytes,
      bitsPerChannel: 8 * totalBytes / (channels * context * sequences),
      longestContext: room === undefined ? undefined : longest((length) => peakOf(length) <= room),
    }
  }
  const scalars = Object.entries(scalarBits).map(([name, bits]) => {
    const bytes = (length: number): number => Math.ceil(length * channels * bits / 8)
    return planned(name, 0, { pageBytes: bytes(context), rawBytes: 0 }, bytes)
  })
  const given = (options.codebooks ?? []).map((codebook) => {
    if (!(codebook instanceof Codebook)) throwExpected('Codebooks', 'codebooks', codebook)
    codebook.check({ layers, kvHeads, headDim })
    return { name: nameOf(codebook), codecs: codebook.codecs, codebookBytes: codebookBytesOf(codebook) }
  })
  const uniform = codecs.map((codec) => {
    const parts = [{ firstHead: 0, heads: kvHeads, keyCodec: codec, valueCodec: codec }]
    return { name: codec.name, codecs: Array<typeof parts>(layers).fill(parts), codebookBytes: layers * codebookLayerBytes(codec, kvHeads, headDim) }
  })
  const coded = [...uniform, ...given].map(({ name, codecs, codebookBytes }) => {
    const shape = { layers, kvHeads, headDim, sinks, window, pageBytes: pageBytesOf(codecs, headDim) }
    return planned(name, codebookBytes, sizeAt(shape, context, context), (length) => peakBytes(shape, length))
  })
  return [...scalars, ...coded]
}

function nameOf({ keyCodec, valueCodec, codecs }: Codebook): string {
  if (keyCodec === undefined || valueCodec === undefined) return `mixed-${Number(meanBits(codecs).toFixed(3))}`
  return keyCodec.name === valueCodec.name ? keyCodec.name : `${keyCodec.name}/${valueCodec.name}`
}

/** Of one page of every layer, side and kv head. */
function pageBytesOf(codecs: LayerCodecs, headDim: number): number {
  const bytes = (codec: Codec, kvHeads: number): number => codesBytes({ codec, tokens: pageTokens, kvHeads, headDim, pageTokens })
  return codecs.flat().reduce((sum, { heads, keyCodec, valueCodec }) => sum + bytes(keyCodec, heads) + bytes(valueCodec, heads), 0)
}

interface Sizes { pageBytes: number; rawBytes: number }
interface CodedShape { layers: number; kvHeads: number; headDim: number; sinks: number; window: number; pageBytes: number }

/** Bytes of a sequence that a step has brought to `length` tokens while its window still covers what it did at `windowOf` tokens. */
function sizeAt({ layers, kvHeads, headDim, sinks, window, pageBytes }: CodedShape, length: number, windowOf: number): Sizes {
  const codedEnd = Math.max(sinks, length - window)
  const pages = codedEnd > sinks ? Math.ceil(codedEnd / pageTokens) - Math.floor(sinks / pageTokens) : 0
  const sinkTokens = Math.min(sinks, Math.ceil(Math.min(length, sinks) / rawBlockTokens) * rawBlockTokens)
  const windowStart = Math.max(sinks, windowOf - window) - sinks
  const windowEnd = length - sinks
  const windowBlocks = windowStart < windowEnd ? Math.ceil(windowEnd / rawBlockTokens) - Math.floor(windowStart / rawBlockTokens) : 0
  const rawTokens = sinkTokens + windowBlocks * rawBlockTokens
  return { pageBytes: pages * pageBytes, rawBytes: layers * 2 * kvHeads * headDim * 4 * rawTokens }
}

/** The most that a sequence takes on its way to `length` tokens, one by one: inside a step, before it drops what has left the window. */
function peakBytes(shape: CodedShape, length: number): number {
  let most = 0
  // Blocks of the window come and go every 16 tokens while pages only grow: no earlier length takes more than one of these.
  for (let now = Math.max(1, length - pageTokens - rawBlockTokens); now <= length; now++) {
    const { pageBytes, rawBytes } = sizeAt(shape, now, shape.window === 0 ? now : now - 1)
    most = Math.max(most, pageBytes + rawBytes)
  }
  return most
}

/** The largest length that fits; `fits` is true up to it and false beyond. */
function longest(fits: (length: number) => boolean): number {
  let [low, high] = [0, mostTokens]
  while (low < high) {
    const middle = Math.ceil((low + high) / 2)
    if (fits(middle)) low = middle
    else high = middle - 1
  }
  return low
}

/** Of the tables of one layer as the backend keeps them: it is asked, with tables of zeros. */
function codebookLayerBytes(codec: Codec, kvHeads: number, headDim: number): number {
  const table = new Float32Array(kvHeads * headDim * codec.centroids)
  using codebook = Codebook.fromTables({ keyTables: [table], valueTables: [table], keyCodec: codec, valueCodec: codec, kvHeads, headDim })
  return codebookBytesOf(codebook)
}

function codebookBytesOf(codebook: Codebook): number {
  using cache = new Cache({ codebook, queryHeads: codebook.kvHeads })
  return cache.statistics().codebookBytes
}

import { setImmediate } from 'node:timers/promises'
import { requireCallOptions, requireInteger, requireObject } from '../arguments'
import { captureActivations } from '../calibrate'
import type { Activations } from '../calibrate/sample'
import type { Texts } from '../calibrate/text'
import { EvenChoice, TextReader } from '../calibrate/text'
import { Codebook } from '../codebook'
import { rangeError } from '../errors'
import { DecoderModel } from '../onnx/model'
import type { ModelShape } from '../onnx/decoder'
import type { CodedSide } from './coding'
import { codingOf, measureCoding, mergeParts, enteringRows, throughCodes } from './coding'
import type { Correlation } from './correlation'
import { channelCorrelation } from './correlation'
import type { ChannelEntropy, SampledRows } from './entropy'
import { channelEntropies, independentOrders } from './entropy'
import type { AttentionMass } from './mass'
import { attentionMass } from './mass'

export interface InspectOptions {
  /** Directory of the model. */
  model: string
  /** One text or several, at least 2 tokens: each a string, token ids, or `{ file }`. They are read twice, so no stream. */
  text: Texts
  /** Codebook or its file; without it nothing is said of errors and codes. */
  codebook?: Codebook | string | undefined
  /** Tokens of a chunk; every chunk is a sequence of its own. Default 512. */
  length?: number | undefined
  /**
   * Tokens kept at most, a uniform sample of all that are run. Default 16384, or what 1 GiB holds if that is less: the sample takes
   * points * layers * 2 * kvHeads * headDim * 4 bytes.
   */
  points?: number | undefined
  /** First tokens that stay in full precision; default 4. */
  sinks?: number | undefined
  /** Newest tokens that stay in full precision; default 32. */
  window?: number | undefined
  /** Of the sample, and of the orders that tear channels apart; default 0. */
  seed?: number | undefined
  threads?: number | undefined
  signal?: AbortSignal | undefined
  onProgress?: ((progress: InspectProgress) => void) | undefined
}

export interface InspectProgress {
  /** `capture`: tokens are run; `count`: layers are counted; `attention`: chunks are run again for their attention. */
  phase: 'capture' | 'count' | 'attention'
  done: number
  /** An estimate until the text has ended. */
  total: number
}

export interface InspectedSide {
  /** Of 1 to 4 neighbouring channels. */
  entropy: ChannelEntropy[]
  correlation: Correlation
  /** Undefined without a codebook. */
  coding: CodedSide | undefined
}

/** Numbers and arrays of them alone: JSON holds it. */
export interface Inspection {
  shape: ModelShape
  /** Fingerprint of the model. */
  fingerprint: string
  /** Tokens run, and those of the sample. */
  tokens: number
  sampled: number
  /** Tokens of a chunk. */
  length: number
  sinks: number
  window: number
  layers: Record<'key' | 'value', InspectedSide>[]
  /** Of `attentionChunks` chunks. */
  attention: AttentionMass
  attentionChunks: number
}

const mostSampleBytes = 2 ** 30
/** Chunks whose attention is looked at, spread over the text. */
const mostAttentionChunks = 16

/**
 * What a codebook has to do with a model's keys and values: how much neighbouring channels know of one another, what codes lose and
 * which are used, and how much attention falls on them. Memory does not grow with the text, only with `points` and with the square of
 * `length`.
 *
 * @throws {RangeError} `ERR_COUPLET_INVALID_ARGUMENT` for a text of fewer than two tokens
 * @throws {CoupletError} `ERR_COUPLET_CODEBOOK_MISMATCH` for a codebook of another model
 */
export async function inspect(options: InspectOptions): Promise<Inspection> {
  requireObject(options, 'options')
  const { length = 512, sinks = 4, window = 32, seed = 0, threads, signal, onProgress } = options
  requireInteger(length, 'length', 2)
  requireInteger(sinks, 'sinks', 0)
  requireInteger(window, 'window', 0)
  requireInteger(seed, 'seed', 0)
  if (options.points !== undefined) requireInteger(options.points, 'points', 2)
  requireCallOptions(options)
  const texts = await attentionTexts(options.text, options.model, length)
  const own = typeof options.codebook === 'string'
  const codebook = typeof options.codebook === 'string' ? await Codebook.load(options.codebook) : options.codebook
  const model = await DecoderModel.load(options.model, threads === undefined ? {} : { threads })
  try {
    const { shape, fingerprint, file } = model
    const { layers, kvHeads, headDim, rotary } = shape
    codebook?.check({ layers, kvHeads, headDim, rotary, model: fingerprint })
    const points = options.points ?? Math.max(2, Math.min(16384, Math.floor(mostSampleBytes / (layers * 2 * kvHeads * headDim * 4))))
    const captured = await captureActivations(model, {
      text: options.text, directory: options.model, length, points, seed, heldOut: 0,
      ...(signal && { signal }),
      ...(onProgress && { onProgress: ({ done, total = done }) => { onProgress({ phase: 'capture', done, total }) } }),
    })
    let inspected: Inspection['layers']
    const { tokens, sample: { tokensKept: sampled } } = captured
    try {
      inspected = await inspectLayers(captured.sample, shape, { codebook, seed, threads, signal, onProgress })
    } finally {
      captured.dispose()
    }
    model.dispose() // before there is a second session
    const attention = await attentionMass(file, texts, {
      sinks, window, threads, signal,
      ...(codebook && { coded: (rows, layer, side) => throughCodes(rows, codingOf(codebook, layer, side), { kvHeads, headDim, threads, signal }) }),
      ...(onProgress && { onProgress: (done: number, total: number) => { onProgress({ phase: 'attention', done, total }) } }),
    })
    return { shape, fingerprint, tokens, sampled, length, sinks, window, layers: inspected, attention, attentionChunks: texts.length }
  } finally {
    model.dispose()
    if (own) codebook?.dispose()
  }
}

type LayerOptions = Pick<InspectOptions, 'threads' | 'signal' | 'onProgress'> & { codebook: Codebook | undefined; seed: number }

async function inspectLayers(sample: Activations, { layers, kvHeads, headDim }: ModelShape, options: LayerOptions): Promise<Inspection['layers']> {
  const { codebook, seed, threads, signal, onProgress } = options
  const { tokensKept: tokens } = sample
  const orders = independentOrders(tokens, seed)
  const inspectSide = async (layer: number, side: 'key' | 'value'): Promise<InspectedSide> => {
    // Counting blocks this thread: a turn for others, side by side.
    await setImmediate(undefined, { signal })
    const { rows: data } = await sample.side(layer, side)
    const rows: SampledRows = { data, offset: 0, tokens, tokenStride: kvHeads * headDim, kvHeads, headDim }
    const parts: CodedSide[] = []
    const how = codebook && codingOf(codebook, layer, side)
    const mixed = how && { ...rows, data: await enteringRows(data, how.transforms, { tokens, kvHeads, headDim }) }
    for (const { firstHead, heads, codec, tables, metric } of how?.parts ?? []) {
      const own = { ...mixed!, offset: firstHead * headDim, kvHeads: heads }
      parts.push(await measureCoding(own, { codec, tables, metric, threads, signal }))
    }
    const coding = codebook && mergeParts(parts)
    return { entropy: channelEntropies(rows, orders), correlation: channelCorrelation(rows), coding }
  }
  const inspected: Inspection['layers'] = []
  for (let layer = 0; layer < layers; layer++) {
    inspected.push({ key: await inspectSide(layer, 'key'), value: await inspectSide(layer, 'value') })
    onProgress?.({ phase: 'count', done: layer + 1, total: layers })
  }
  return inspected
}

/** Whole chunks, spread evenly over the text; the longest one of a text that has no whole one. */
async function attentionTexts(text: Texts, directory: string, length: number): Promise<number[][]> {
  const reader = await TextReader.open(text, { directory, length })
  if (!reader.isRepeatable) throw rangeError('Expected texts that can be read twice for `text` but received a stream')
  const whole = new EvenChoice<number[]>(mostAttentionChunks)
  let longest: number[] = []
  for await (const { tokens } of reader.read()) {
    if (tokens.length === length) whole.add(tokens)
    if (tokens.length > longest.length) longest = tokens
  }
  if (longest.length < 2) throw rangeError(`Expected a text of at least 2 tokens for \`text\` but received ${reader.tokens}`)
  return whole.items.length > 0 ? [...whole.items] : [longest]
}

import { createHash } from 'node:crypto'
import { requireCallOptions, requireInteger, requireObject, resultArray } from './arguments'
import { chunks } from './chunks'
import { type Codec, codec as parseCodec } from './codec'
import { Codebook } from './codebook'
import type { DeviceOptions } from './device'
import { rangeError, throwExpected, typeError } from './errors'
import { kmeans } from './kmeans'
import { GradientFile } from './gradient/file'
import { GradientModel } from './gradient/model'
import { GradientSample } from './gradient/sample'
import type { LayerRows, TokenRows } from './gradient/sample'
import type { Sample } from './onnx/capture'
import { Capture } from './onnx/capture'
import { DecoderModel } from './onnx/model'
import { loadTokenizer } from './tokenizer'

/** What the importance of a token is when centroids are learned; see docs/algorithm.md. */
export type WeightKind = 'uniform' | 'attention' | 'fisher'

export interface CalibrationProgress {
  /** `capture`: tokens are run through the model; `learn`: centroids are learned. */
  phase: 'capture' | 'learn'
  done: number
  total: number
}

interface Common {
  /** Seed of the reservoir and of k-means. Default 0. The same seed and text give the same codebook on any number of threads of a kind of device. */
  seed?: number | bigint
  threads?: number
  signal?: AbortSignal
  onProgress?: (progress: CalibrationProgress) => void
}

export interface CaptureActivationsOptions extends Common {
  /** Text to run, or its token ids. */
  text: string | ArrayLike<number>
  /** Where the tokenizer lies; needed for a text. */
  directory?: string
  /** Tokens of a chunk; every chunk is a sequence of its own. Default 512. */
  length?: number
  /**
   * Tokens kept at most, a uniform sample of all that were run. Default 32768. Memory: points * layers * 2 * kvHeads * headDim * 4 bytes,
   * twice that with fisher weights.
   */
  points?: number
  /** Default 'uniform'. `fisher` runs the graph's gradient as well, unless `gradients` has it: its memory grows with `length` (docs/gradients.md). */
  weights?: WeightKind
  /** For fisher weights: a file of gradients of this text, computed elsewhere (docs/gradients.md). */
  gradients?: string
}

/** `device` is where centroids are learned; a text is run on the CPU in any case. */
export interface LearnOptions extends Common, DeviceOptions {
  /** Such as `'cq-8c8b'`, or one for each side. */
  codec: string | Codec | { key: string | Codec; value: string | Codec }
  /** Lloyd iterations at most. Default 100. */
  iterations?: number
}

/** Activations of a text, from which any number of codebooks can be learned. */
export interface Captured {
  readonly capture: Sample
  readonly model: DecoderModel
  readonly weights: WeightKind
  /** Tokens run. */
  readonly tokens: number
  /** SHA-256 of the token ids that were run, uint32 little-endian, in hexadecimal digits. */
  readonly text: string
  dispose(): void
  [Symbol.dispose](): void
}

/**
 * Runs a text through a model at full precision and keeps a sample of its keys (before rotary embedding) and values.
 * Memory stays bounded by `points`, whatever the length of the text.
 *
 * @throws {RangeError} `ERR_COUPLET_INVALID_ARGUMENT` when the text has no token, or `gradients` is of another text or model
 * @throws {CoupletError} `ERR_COUPLET_UNSUPPORTED_MODEL` for fisher weights of a graph through which couplet cannot compute gradients
 */
export async function captureActivations(model: DecoderModel, options: CaptureActivationsOptions): Promise<Captured> {
  requireModel(model)
  requireObject(options, 'options')
  const { length = 512, points = 32768, weights = 'uniform', gradients, directory } = options
  requireInteger(length, 'length', 1)
  requireInteger(points, 'points', 1)
  requireCallOptions(options)
  if (!['uniform', 'attention', 'fisher'].includes(weights)) throwExpected('"uniform", "attention" or "fisher"', 'weights', weights)
  if (gradients !== undefined && weights !== 'fisher') throwExpected('"fisher" beside `gradients`', 'weights', weights)
  const tokens = await tokenIds(options.text, directory)
  if (tokens.length === 0) throw rangeError('Expected a text of at least one token for `text` but received an empty one')
  const text: Text = { tokens, length, points: Math.min(points, tokens.length), hash: hashTokens(tokens) }
  let capture: Sample
  if (weights !== 'fisher') capture = await captureForward(model, text, weights, options)
  else if (gradients === undefined) capture = await captureGradients(model, text, options)
  else capture = await captureWithFile(model, text, gradients, options)
  const dispose = () => { capture.dispose() }
  return { capture, model, weights, tokens: tokens.length, text: text.hash, dispose, [Symbol.dispose]: dispose }
}

interface Text {
  tokens: ArrayLike<number>
  length: number
  points: number
  hash: string
}

/** Hands every chunk to `run` and reports. */
async function forEachChunk({ tokens, length }: Text, { onProgress }: Common, run: (chunk: number[], first: number) => Promise<void>): Promise<void> {
  let done = 0
  for (const chunk of chunks(tokens, length)) {
    await run(chunk, done)
    done += chunk.length
    onProgress?.({ phase: 'capture', done, total: tokens.length })
  }
}

async function captureForward(model: DecoderModel, text: Text, weights: 'uniform' | 'attention', options: Common): Promise<Sample> {
  const { seed = 0, signal } = options
  const capture = new Capture({ model, points: text.points, weights, seed })
  try {
    await forEachChunk(text, options, async (chunk) => {
      using sequence = model.sequence()
      await model.run([{ sequence, tokens: chunk }], { capture, logits: 'last', ...(signal && { signal }) })
    })
    return capture
  } catch (error) {
    capture.dispose()
    throw error
  }
}

async function captureGradients({ file, shape }: DecoderModel, text: Text, options: Common): Promise<Sample> {
  const { seed = 0, threads, signal } = options
  const sample = new GradientSample({ shape, points: text.points, seed })
  using model = await GradientModel.load(file, threads === undefined ? {} : { threads })
  const layerRows = (arrays: Float32Array[]): LayerRows[] => arrays.map((data) => ({ data, offset: 0, tokenStride: shape.kvHeads * shape.headDim }))
  await forEachChunk(text, options, async (chunk) => {
    const { rows, gradients } = await model.run(chunk, signal)
    const bothSides = ({ key, value }: typeof rows): TokenRows['rows'] => ({ key: layerRows(key), value: layerRows(value) })
    sample.add({ tokens: chunk.length, rows: bothSides(rows), gradients: bothSides(gradients) })
  })
  return sample
}

/** Keys and values by a run of the model, gradients from the file. */
async function captureWithFile(model: DecoderModel, text: Text, path: string, options: Common): Promise<Sample> {
  const { seed = 0, signal } = options
  const { shape } = model
  const width = shape.kvHeads * shape.headDim
  const sample = new GradientSample({ shape, points: text.points, seed })
  const file = await GradientFile.open(path, shape, { tokens: text.tokens.length, length: text.length, hash: text.hash })
  try {
    await forEachChunk(text, options, async (chunk, first) => {
      using sequence = model.sequence()
      using capture = new Capture({ model, points: chunk.length, weights: 'uniform' }) // keeps all tokens in order
      await model.run([{ sequence, tokens: chunk }], { capture, logits: 'last', ...(signal && { signal }) })
      const gradients = await file.read(first, chunk.length)
      const captured = (data: Float32Array): LayerRows[] =>
        Array.from({ length: shape.layers }, (_, layer) => ({ data, offset: layer * width, tokenStride: shape.layers * width }))
      const read = (arrays: Float32Array[]): LayerRows[] => arrays.map((data) => ({ data, offset: 0, tokenStride: width }))
      sample.add({
        tokens: chunk.length,
        rows: { key: captured(capture.keys), value: captured(capture.values) },
        gradients: { key: read(gradients.key), value: read(gradients.value) },
      })
    })
  } finally {
    await file.close()
  }
  return sample
}

/**
 * Learns one codebook from captured activations: one batch of weighted k-means problems a side, a problem being
 * a (layer, kv head, group).
 */
export async function learnCodebook(captured: Captured, options: LearnOptions): Promise<Codebook> {
  requireObject(captured, 'captured')
  requireObject(options, 'options')
  const { capture, model } = captured
  requireModel(model)
  requireCallOptions(options)
  const { layers, kvHeads, headDim, rotary } = model.shape
  const { iterations = 100, seed = 0, threads, signal, onProgress, device, deviceIndex } = options
  const codecs = bothSides(options.codec, headDim)

  const learnSide = async (side: 'key' | 'value', offset: number): Promise<Float32Array[]> => {
    const { groupChannels, centroids } = codecs[side]
    const groups = headDim / groupChannels
    const weights = groupWeights(side === 'key' ? capture.keyWeights : capture.valueWeights, captured, groupChannels)
    const weightGroups = weights ? weights.length / (capture.tokensKept * layers * kvHeads) : 1
    const result = await kmeans(side === 'key' ? capture.keys : capture.values, {
      problems: layers * kvHeads * groups,
      points: capture.tokensKept,
      channels: groupChannels,
      centroids,
      iterations,
      seed,
      device,
      deviceIndex,
      // The reservoir is [token][layer][kvHead][headDim]: consecutive groups are consecutive problems.
      layout: {
        problemStride: groupChannels,
        pointStride: layers * kvHeads * headDim,
        weightProblemStride: 1,
        weightPointStride: layers * kvHeads * weightGroups,
        weightSharing: groups / weightGroups,
      },
      ...(weights && { weights }),
      ...(threads !== undefined && { threads }),
      ...(signal && { signal }),
      ...(onProgress && { onProgress: ({ done, total }) => { onProgress({ phase: 'learn', done: offset * total + done, total: 2 * total }) } }),
    })
    const stride = kvHeads * groups * centroids * groupChannels
    return Array.from({ length: layers }, (_, layer) => result.centroids.subarray(layer * stride, (layer + 1) * stride))
  }

  const keyTables = await learnSide('key', 0)
  const valueTables = await learnSide('value', 1)
  return Codebook.fromTables({
    keyTables, valueTables, keyCodec: codecs.key, valueCodec: codecs.value, kvHeads, headDim,
    metadata: {
      formatVersion: 1,
      rotary,
      model: model.fingerprint,
      learned: { weights: captured.weights, iterations, seed: String(seed), tokens: captured.tokens, text: captured.text },
    },
  })
}

/** Weights of heads as they are; those of channels summed over each group, [tokens][layers][kvHeads][groups]. */
function groupWeights(weights: Float32Array | undefined, { capture, model: { shape } }: Captured, groupChannels: number): Float32Array | undefined {
  if (weights === undefined || weights.length === capture.tokensKept * shape.layers * shape.kvHeads) return weights
  const sums = resultArray(undefined, Float32Array, weights.length / groupChannels)
  for (let group = 0; group < sums.length; group++) {
    for (let channel = 0; channel < groupChannels; channel++) sums[group]! += weights[group * groupChannels + channel]!
  }
  return sums
}

export interface CalibrateOptions extends CaptureActivationsOptions, LearnOptions {
  /** Directory of the model (tokenizer.json, onnx/model.onnx). */
  model: string
}

/**
 * Learns a codebook for a model from a text: `captureActivations`, then `learnCodebook`.
 *
 * @example
 * const codebook = await calibrate({ model: 'models/tiny-llama-bytes', text, codec: 'cq-8c8b', weights: 'attention' })
 * await codebook.save('tiny.cq-8c8b.safetensors')
 */
export async function calibrate(options: CalibrateOptions): Promise<Codebook> {
  requireObject(options, 'options')
  const model = await DecoderModel.load(options.model, options.threads === undefined ? {} : { threads: options.threads })
  try {
    bothSides(options.codec, model.shape.headDim) // before the text is run, which may take long
    using captured = await captureActivations(model, { ...options, directory: options.model })
    return await learnCodebook(captured, options)
  } finally {
    model.dispose()
  }
}

/** Token ids as they are, or of a text by the tokenizer of a model directory. */
export async function tokenIds(text: string | ArrayLike<number>, directory: string | undefined): Promise<ArrayLike<number>> {
  if (typeof text !== 'string') {
    if (!Array.isArray(text) && !ArrayBuffer.isView(text)) throwExpected('a string or an array of token ids', 'text', text)
    return text
  }
  if (directory === undefined) throw typeError('Expected token ids for `text`, or the `directory` of a tokenizer, but received a text alone')
  return (await loadTokenizer(directory)).encode(text)
}

export function requireModel(model: unknown): asserts model is DecoderModel {
  if (!(model instanceof DecoderModel)) throwExpected('a DecoderModel', 'model', model)
}

function bothSides(given: LearnOptions['codec'] | null, headDim: number): { key: Codec; value: Codec } {
  const parse = (like: string | Codec): Codec => {
    const codec = parseCodec(like)
    if (headDim % codec.groupChannels !== 0)
      throw rangeError(`Expected a codec whose group channels divide headDim ${headDim} but received "${codec.name}"`)
    return codec
  }
  if (given === null) throwExpected('a codec', 'codec', given)
  if (typeof given === 'object' && 'key' in given) return { key: parse(given.key), value: parse(given.value) }
  const both = parse(given)
  return { key: both, value: both }
}

/** SHA-256 of token ids, uint32 little-endian, in hexadecimal digits. */
export function hashTokens(tokens: ArrayLike<number>): string {
  return createHash('sha256').update(Uint32Array.from(tokens)).digest('hex')
}

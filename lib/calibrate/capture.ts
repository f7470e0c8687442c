import { requireCallOptions, requireInteger, requireObject, requireSeed } from '../arguments'
import { CoupletError, rangeError, throwExpected } from '../errors'
import type { Side } from '../gradient/attention'
import { GradientFile } from '../gradient/file'
import { GradientModel } from '../gradient/model'
import { Capture } from '../onnx/capture'
import type { ModelShape } from '../onnx/decoder'
import { DecoderModel } from '../onnx/model'
import type { Activations, LayerRows, SampleStore, TokenRows, WeightWidth } from './sample'
import { ActivationSample, MemoryStore } from './sample'
import type { Chunk, Texts } from './text'
import { EvenChoice, TextReader } from './text'

/** What the importance of a token is when centroids are learned; see docs/algorithm.md. */
export type WeightKind = 'uniform' | 'attention' | 'fisher'

export interface CalibrationProgress {
  /**
   * `capture`: tokens are run through the model; `choose`: codecs are tried; `learn`: centroids are learned; `tune`: the best ones are tuned; `predict`:
   * what they cost is measured.
   */
  phase: 'capture' | 'choose' | 'learn' | 'tune' | 'predict'
  /** Tokens; sides of layers by codecs; sides of layers, with the share that is done of the present one; steps; chunks. */
  done: number
  /** An estimate until the text has ended; undefined for a stream. */
  total: number | undefined
}

export interface CommonOptions {
  /** Seed of the reservoir and of k-means. Default 0. The same seed and text give the same codebook on any number of threads of a kind of device. */
  seed?: number | bigint
  threads?: number
  signal?: AbortSignal
  onProgress?: (progress: CalibrationProgress) => void
}

export interface CaptureActivationsOptions extends CommonOptions {
  /** One text or several: each a string, token ids, `{ file }`, or a stream. What is read of it at a time is 16 Ki characters. */
  text: Texts
  /** Where the tokenizer lies; needed for a text. */
  directory?: string
  /** Tokens of a chunk; every chunk is a sequence of its own. Default 512. */
  length?: number
  /**
   * Tokens kept at most, a uniform sample of all that were run. Default 32768. Memory: points * layers * 2 * kvHeads * headDim * 4 bytes,
   * twice that with fisher weights, and an eighth more for the tokens held out.
   */
  points?: number
  /**
   * Share of the chunks that nothing is learned from, so that codebooks can be judged by them; evenly spread. Default 0.1; 0 learns
   * from all. A text of fewer than half of 1 / heldOut chunks has none.
   */
  heldOut?: number
  /** Default 'uniform'. `fisher` runs the graph's gradient as well, unless `gradients` has it: its memory grows with `length` (docs/gradients.md). */
  weights?: WeightKind
  /** For fisher weights: a file of gradients of this text, computed elsewhere (docs/gradients.md). */
  gradients?: string
}

/** Activations of a text, from which any number of codebooks can be learned. */
export interface Captured {
  readonly model: DecoderModel
  readonly weights: WeightKind
  /** To learn from. */
  readonly sample: Activations
  /** To judge by: tokens of other chunks; undefined when the text was too short to hold any out. */
  readonly heldOut: Activations | undefined
  /** Up to 1120 of the chunks that may be learned from, and up to 8 of those held out, evenly spread, as token ids. */
  readonly learnedChunks: readonly (readonly number[])[]
  readonly heldOutChunks: readonly (readonly number[])[]
  /** Tokens run, those held out among them. */
  readonly tokens: number
  /** SHA-256 of the token ids that were run, uint32 little-endian, in hexadecimal digits. */
  readonly text: string
  /** Lets go of the sample. */
  dispose(): void
  [Symbol.dispose](): void
}

/** Chunks that are kept as tokens, to be predicted when the codebook is there. */
export const judgedChunks = 8

/** Chunks that are kept as tokens for tuning: what its steps take at most when nothing else is asked for. */
const tuningChunks = 1120

/** Of `points`, for the tokens held out. */
const heldOutPoints = 1 / 8

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
  const { points } = checkCapture(options)
  return capture(model, options, memoryStores(points))
}

/** How far the text has been run. */
export interface CaptureState {
  chunks: number
  tokens: number
  /** Hash of these tokens. */
  text: string
  /** Whether that is all of it. */
  whole: boolean
}

/** Keeps what the stores have across processes. */
export interface CaptureCheckpoint {
  /** What the stores have already; undefined: nothing. */
  readonly state: CaptureState | undefined
  /** After each chunk, and at the end. */
  save(state: CaptureState): Promise<void>
  /** Throws: the state is that of another text. */
  refuseText(): never
}

/** Where a sample goes. */
export interface CaptureStores {
  sample: SampleStore
  heldOut: SampleStore
}

export function memoryStores(points: number): CaptureStores {
  return { sample: new MemoryStore(points), heldOut: new MemoryStore(heldOutPointsOf(points)) }
}

function heldOutPointsOf(points: number): number {
  return Math.max(1, Math.ceil(points * heldOutPoints))
}

type CapturePlan = Required<Pick<CaptureActivationsOptions, 'length' | 'points' | 'heldOut' | 'weights' | 'seed'>>

/** Options with their defaults. */
export function checkCapture(options: CaptureActivationsOptions): CapturePlan {
  const { length = 512, points = 32768, heldOut = 0.1, weights = 'uniform', gradients, seed = 0 } = options
  requireInteger(length, 'length', 1)
  requireInteger(points, 'points', 1)
  requireSeed(seed, 'seed')
  if (typeof heldOut !== 'number' || !(heldOut >= 0 && heldOut <= 0.5)) throwExpected('a number from 0 to 0.5', 'heldOut', heldOut, typeof heldOut === 'number')
  requireCallOptions(options)
  if (!['uniform', 'attention', 'fisher'].includes(weights)) throwExpected('"uniform", "attention" or "fisher"', 'weights', weights)
  if (gradients !== undefined && weights !== 'fisher') throwExpected('"fisher" beside `gradients`', 'weights', weights)
  return { length, points, heldOut, weights, seed }
}

/** {@link captureActivations} into stores of the caller, which may have the first chunks already. */
export async function capture(model: DecoderModel, options: CaptureActivationsOptions, stores: CaptureStores, checkpoint?: CaptureCheckpoint,
): Promise<Captured> {
  const { length, points, heldOut: share, weights, seed } = checkCapture(options)
  const { signal, onProgress } = options
  const { shape } = model
  const width = ({ uniform: 'none', attention: 'heads', fisher: 'channels' } as const satisfies Record<WeightKind, WeightWidth>)[weights]
  const sampleIn = (store: SampleStore, count: number) => new ActivationSample({ shape, points: count, seed, weights: width, store })
  const sample = sampleIn(stores.sample, points)
  const heldOut = sampleIn(stores.heldOut, heldOutPointsOf(points))
  const judged = new EvenChoice<readonly number[]>(judgedChunks)
  const tuned = new EvenChoice<readonly number[]>(tuningChunks)
  const reader = await TextReader.open(options.text, { directory: options.directory, length, signal })
  const known = checkpoint?.state?.chunks ?? 0
  await using runner = new Runner(model, options)
  for await (const chunk of reader.read()) {
    signal?.throwIfAborted()
    const held = isHeldOut(chunk.index, share)
    ;(held ? judged : tuned).add(chunk.tokens)
    if (chunk.index < known) {
      (held ? heldOut : sample).skip(chunk.tokens.length)
      if (chunk.index + 1 === known && reader.hash !== checkpoint?.state?.text) checkpoint?.refuseText()
      continue
    }
    if (checkpoint?.state?.whole) checkpoint.refuseText()
    await (held ? heldOut : sample).add(await runner.run(chunk))
    await checkpoint?.save({ chunks: reader.chunks, tokens: reader.tokens, text: reader.hash, whole: false })
    onProgress?.({ phase: 'capture', done: reader.tokens, total: reader.expectedTokens })
  }
  if (reader.chunks < known) checkpoint?.refuseText()
  if (reader.tokens === 0) throw rangeError('Expected a text of at least one token for `text` but received an empty one')
  const { tokens, hash: text, chunks } = reader
  await checkpoint?.save({ chunks, tokens, text, whole: true })
  const dispose = () => {
    stores.sample.dispose()
    stores.heldOut.dispose()
  }
  const heldOutAny = heldOut.tokensKept > 0 ? heldOut : undefined
  const chosen = { learnedChunks: tuned.items, heldOutChunks: judged.items }
  return { model, weights, sample, heldOut: heldOutAny, ...chosen, tokens, text, dispose, [Symbol.dispose]: dispose }
}

/** One chunk in 1 / share, first the one in the middle of the first so many. */
function isHeldOut(index: number, share: number): boolean {
  if (share === 0) return false
  const period = Math.round(1 / share)
  return index % period === Math.floor(period / 2)
}

type Run = (chunk: Chunk) => Promise<TokenRows>

/** Runs chunks of a text, each a sequence of its own; what it needs besides the model is opened for the first one. */
class Runner implements AsyncDisposable {
  readonly #model: DecoderModel
  readonly #options: CaptureActivationsOptions
  #run: Run | undefined
  #close: (() => Promise<void> | void) | undefined

  constructor(model: DecoderModel, options: CaptureActivationsOptions) {
    this.#model = model
    this.#options = options
  }

  async run(chunk: Chunk): Promise<TokenRows> {
    this.#run ??= await this.#open()
    return this.#run(chunk)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.#close?.()
  }

  async #open(): Promise<Run> {
    const { weights = 'uniform', gradients, threads, signal } = this.#options
    const model = this.#model
    if (weights !== 'fisher') return ({ tokens }) => runForward(model, tokens, weights, signal)
    if (gradients === undefined) {
      const backward = await GradientModel.load(model.file, threads === undefined ? {} : { threads })
      this.#close = () => { backward.dispose() }
      return (chunk) => runBackward(backward, chunk, signal)
    }
    const { length } = checkCapture(this.#options)
    const file = await GradientFile.open(gradients, model.shape, { length, ...await readThrough(this.#options, length) })
    this.#close = () => file.close()
    return async ({ tokens, first }) => {
      const { rows } = await runForward(model, tokens, 'uniform', signal)
      return { tokens: tokens.length, rows, weights: finite(await file.read(first, tokens.length), model.shape, first) }
    }
  }
}

/** Keys and values of one chunk, before rotary embedding. */
export async function runForward(model: DecoderModel, tokens: readonly number[], weights: 'uniform' | 'attention', signal: AbortSignal | undefined,
): Promise<TokenRows> {
  const { layers, kvHeads, headDim } = model.shape
  using sequence = model.sequence()
  using all = new Capture({ model, points: tokens.length, weights }) // keeps all tokens in order
  await model.run([{ sequence, tokens }], { capture: all, logits: 'last', ...(signal && { signal }) })
  const layerRows = (data: Float32Array, width: number): LayerRows[] =>
    Array.from({ length: layers }, (_, layer) => ({ data, offset: layer * width, tokenStride: layers * width }))
  const { keys, values, keyWeights, valueWeights } = all
  return {
    tokens: tokens.length,
    rows: { key: layerRows(keys, kvHeads * headDim), value: layerRows(values, kvHeads * headDim) },
    ...(keyWeights && valueWeights && { weights: { key: layerRows(keyWeights, kvHeads), value: layerRows(valueWeights, kvHeads) } }),
  }
}

async function runBackward(model: GradientModel, { tokens, first }: Chunk, signal: AbortSignal | undefined): Promise<TokenRows> {
  const { rows, gradients } = await model.run(tokens, signal)
  const tokenStride = model.shape.kvHeads * model.shape.headDim
  const layerRows = (arrays: Float32Array[]): LayerRows[] => arrays.map((data) => ({ data, offset: 0, tokenStride }))
  return { tokens: tokens.length, rows: { key: layerRows(rows.key), value: layerRows(rows.value) }, weights: finite(gradients, model.shape, first) }
}

/**
 * Gradients, [tokens][kvHeads][headDim]: the sum of their squares over the channels of a group is its Fisher weight.
 * @throws {CoupletError} `ERR_COUPLET_NOT_FINITE` for a gradient that is a NaN or an infinity; `token` counts from the text's first.
 */
function finite(gradients: Record<Side, Float32Array[]>, { kvHeads, headDim }: ModelShape, first: number): Record<Side, LayerRows[]> {
  const tokenStride = kvHeads * headDim
  const ofSide = (side: Side) => gradients[side].map((data, layer): LayerRows => {
    const wrong = data.findIndex((gradient) => !Number.isFinite(gradient))
    if (wrong >= 0) {
      const place = { layer, kvHead: Math.floor((wrong % tokenStride) / headDim), token: first + Math.floor(wrong / tokenStride), channel: wrong % headDim }
      throw new CoupletError('ERR_COUPLET_NOT_FINITE', `Expected finite gradients but the ${side} of layer ${layer}, kv head ${place.kvHead}, token ${place.token}, channel ${place.channel} has a NaN or an infinity`, place)
    }
    return { data, offset: 0, tokenStride }
  })
  return { key: ofSide('key'), value: ofSide('value') }
}

/** Number and hash of the tokens, before anything is run. */
async function readThrough({ text, directory, signal }: CaptureActivationsOptions, length: number): Promise<{ tokens: number; hash: string }> {
  const reader = await TextReader.open(text, { directory, length, signal })
  if (!reader.isRepeatable) throw rangeError('Expected texts that can be read twice for `text` beside `gradients` but received a stream')
  for await (const chunk of reader.read()) void chunk
  return { tokens: reader.tokens, hash: reader.hash }
}

export function requireModel(model: unknown): asserts model is DecoderModel {
  if (!(model instanceof DecoderModel)) throwExpected('a DecoderModel', 'model', model)
}

import { AsyncLocalStorage } from 'node:async_hooks'
import { requireInteger, requireObject } from '../arguments'
import type { CacheStatistics } from '../cache'
import { Codebook } from '../codebook'
import type { DeviceOptions } from '../device'
import { throwExpected } from '../errors'
import { DecoderModel } from '../onnx/model'
import type { ProviderName } from '../onnx/provider'
import { unsupported, unsupportedModel } from './errors'
import { locateModel } from './locate'
import { Residents, type ReuseCounts } from './residents'
import { CoupledSession, type GenerateCall, type TokenCounts } from './session'
import { findStack } from './stack'
import type { GenerateOptions, ModelSession, OnnxruntimeModule, PretrainedModel, TransformersModule } from './types'

/**
 * Options of `attach`. `device` is where codebooks and the cache live and attention is computed; `executionProvider` is where onnxruntime runs the
 * rest.
 */
export interface AttachOptions extends DeviceOptions {
  /**
   * Codebooks of this model, or the path of their safetensors file. Without them the cache is kept in full precision by the
   * same machinery, and results are those of the untouched model.
   */
  codebooks?: Codebook | string
  /** Last tokens of a sequence that stay in full precision (default 32). */
  window?: number
  /** First tokens of a sequence that stay in full precision (default 4). */
  sinks?: number
  /** Bytes that all sequences may take together. Default: no limit but `sequences`. */
  memory?: number
  /** Sequences kept for reuse when no generate() call works on them (default 16). */
  sequences?: number
  /**
   * Tokens of a prompt that go through the model at once (default 1024): bounds the memory of activations and logits. Tokens of
   * one chunk see each other in full precision, those of earlier chunks as the cache holds them.
   */
  chunk?: number
  /** Threads of attention and of the rest of the graph. Default: all cores. */
  threads?: number
  /** What from_pretrained was given (model id or folder), or the .onnx file. Needed when config.json does not say it. */
  path?: string
  /** `release`: free the original session, half of the memory that weights take; detach() then leaves the model unusable. Default `keep`. */
  original?: 'keep' | 'release'
  /** Ends every step, also inside generate(): it rejects with the signal's reason. */
  signal?: AbortSignal
  /** The module '@huggingface/transformers' that loaded the model, when couplet resolves to another copy. */
  transformers?: TransformersModule
  /** The module 'onnxruntime-node' under it, when couplet resolves to another copy. */
  onnxruntime?: OnnxruntimeModule
  /** What runs the nodes around attention; default 'auto': CUDA where attention runs there and the installed onnxruntime-node has it. */
  executionProvider?: ProviderName
}

/** What an attached model did so far. */
export interface AttachmentStatistics extends TokenCounts, ReuseCounts {
  /** Sequences that are there to be reused. */
  sequences: number
  /** Bytes and tokens of the cache. */
  cache: CacheStatistics
}

/** A model whose generate() runs on packed codes until `detach()`. */
export class Attachment {
  /** The decoder that runs; its cache, shape and fingerprint. */
  readonly decoder: DecoderModel
  readonly #model: PretrainedModel
  readonly #session: CoupledSession
  readonly #original: ModelSession
  readonly #residents: Residents
  readonly #calls: AsyncLocalStorage<GenerateCall>
  readonly #generate: PretrainedModel['generate']
  /** What the model had of its own before: usually nothing, the method lives on the prototype. */
  readonly #replaced: PropertyDescriptor | undefined
  readonly #signal: AbortSignal | undefined

  /** @internal Use `attach`. */
  constructor(model: PretrainedModel, parts: AttachmentParts) {
    this.#model = model
    this.#original = parts.original
    this.#signal = parts.signal
    this.decoder = parts.decoder
    this.#calls = new AsyncLocalStorage()
    this.#residents = new Residents(() => parts.decoder.sequence(), parts.sequences)
    this.#session = new CoupledSession({
      original: parts.original, decoder: parts.decoder, tensors: parts.onnxruntime.Tensor,
      residents: this.#residents, calls: this.#calls, chunk: parts.chunk, signal: parts.signal,
    })
    const generate = model.generate.bind(model)
    this.#replaced = Object.getOwnPropertyDescriptor(model, 'generate')
    this.#generate = (options) => this.#run(generate, options)
    model.sessions['model'] = this.#session
    model.generate = this.#generate
  }

  /**
   * tokensRun: tokens that went through the model; tokensReused: tokens of prompts that did not have to, because a sequence
   * in the cache began with them; forks, rollbacks, evictions: how often a sequence was continued beside another one, cut
   * back, or dropped for room.
   */
  statistics(): AttachmentStatistics {
    return { ...this.#session.tokens, ...this.#residents.counts, sequences: this.#residents.size, cache: this.decoder.cache.statistics() }
  }

  /** Gives the model its own session back and frees sequences and decoder; a step that is running ends first. Idempotent. */
  detach(): void {
    if (this.#model.sessions['model'] === this.#session) this.#model.sessions['model'] = this.#original
    if (this.#model.generate === this.#generate) {
      delete (this.#model as Partial<PretrainedModel>).generate
      if (this.#replaced) Object.defineProperty(this.#model, 'generate', this.#replaced)
    }
    this.#session.close()
  }

  [Symbol.dispose](): void {
    this.detach()
  }

  async #run(generate: PretrainedModel['generate'], options: GenerateOptions): Promise<unknown> {
    refuseBeams(this.#model, options)
    const signals = [this.#signal, options.signal].filter((signal) => signal !== undefined)
    const signal = signals.length > 1 ? AbortSignal.any(signals) : signals[0]
    signal?.throwIfAborted()
    const call: GenerateCall = { signal }
    try {
      const done = this.#calls.run(call, () => generate(options))
      return await (signal ? firstOf(done, signal) : done)
    } finally {
      this.#residents.end(call)
    }
  }
}

interface AttachmentParts {
  readonly original: ModelSession
  readonly decoder: DecoderModel
  readonly onnxruntime: OnnxruntimeModule
  readonly sequences: number
  readonly chunk: number
  readonly signal: AbortSignal | undefined
}

/**
 * Makes `model.generate()`, and calling `model` itself, run on packed codes.
 *
 * @param model A text decoder loaded by @huggingface/transformers 4 (`AutoModelForCausalLM.from_pretrained`, or
 *   `pipeline(...).model`), on the CPU, whose graph has com.microsoft.GroupQueryAttention nodes.
 * @throws {CoupletError} `ERR_COUPLET_UNSUPPORTED_MODEL` where the plug does not reach: encoder-decoder and multimodal models, graphs
 *   whose attention cannot be replaced (use `CoupledCache` there); `ERR_COUPLET_UNSUPPORTED` for a model on another device or of
 *   another major version of transformers.js; `ERR_COUPLET_CODEBOOK_MISMATCH` for codebooks of another model; `ERR_COUPLET_ONNXRUNTIME` when
 *   onnxruntime-node is missing or unsuitable.
 */
export async function attach(model: PretrainedModel, options: AttachOptions = {}): Promise<Attachment> {
  requireObject(options, 'options')
  const { codebooks, window, sinks, memory, threads, path, signal, device, deviceIndex, executionProvider } = options
  const { chunk = 1024, sequences = 16, original: fate = 'keep' } = options
  requireInteger(sequences, 'sequences', 0)
  requireInteger(chunk, 'chunk', 1)
  const areCodebooks = codebooks === undefined || typeof codebooks === 'string' || codebooks instanceof Codebook
  if (!areCodebooks) throwExpected('a Codebook or the path of its file', 'codebooks', codebooks)
  if (!['keep', 'release'].includes(fate)) throwExpected('"keep" or "release"', 'original', fate)
  const original = findSession(model)
  const { transformers, onnxruntime } = await findStack(model, original, options)
  const file = locateModel(model, original, path, transformers.env)
  const codebook = typeof codebooks === 'string' ? await Codebook.load(codebooks) : codebooks
  signal?.throwIfAborted()
  const decoder = await DecoderModel.load(file, {
    onnxruntime,
    ...(codebook !== undefined && { codebook }),
    ...(window !== undefined && { window }),
    ...(sinks !== undefined && { sinks }),
    ...(memory !== undefined && { memory }),
    ...(threads !== undefined && { threads }),
    device,
    deviceIndex,
    executionProvider,
  })
  try {
    compareShapes(decoder, original, file)
    if (findSession(model) !== original) throw unsupported('the session of this model was replaced while attach() loaded its graph')
    if (fate === 'release') await original.release()
  } catch (error) {
    decoder.dispose()
    throw error
  }
  return new Attachment(model, { original, decoder, onnxruntime, sequences, chunk, signal })
}

/** The session that attach() replaces, when it is one that it can replace. */
function findSession(model: PretrainedModel): ModelSession {
  const sessions = (model as Partial<PretrainedModel> | undefined)?.sessions
  if (typeof sessions !== 'object') throwExpected('a model loaded by @huggingface/transformers', 'model', model)
  const config = model.config as { is_encoder_decoder?: boolean; model_type?: string }
  const kind = `"${config.model_type ?? 'unknown'}"`
  if (config.is_encoder_decoder || (sessions['model'] && sessions['decoder_model_merged'])) {
    throw unsupportedModel(
      `${kind} is an encoder-decoder model: its cross attention reads keys that never grow, which attach() does not replace; run it without couplet, or use a decoder-only model`,
    )
  }
  const others = Object.keys(sessions).filter((name) => name !== 'model')
  const session = sessions['model'] as ModelSession | undefined
  if (others.length > 0 || !session) {
    throw unsupportedModel(
      `${kind} is made of several graphs (${Object.keys(sessions).join(', ')}), as multimodal models are, and attach() replaces the session of a text decoder; pass a CoupledCache as past_key_values`,
    )
  }
  if (session instanceof CoupledSession) throw unsupported('this model is attached already; call detach() of its attachment first')
  const device = session.config?.device ?? 'cpu'
  if (device !== 'cpu') {
    throw unsupported(`the model was loaded for the device "${device}" and couplet runs it on the CPU; load it with { device: 'cpu' }`)
  }
  const strange = session.inputNames.find((name) => !KNOWN_INPUTS.has(name) && !/^past_key_values\.\d+\.(key|value)$/.test(name))
  if (strange !== undefined) {
    throw unsupportedModel(
      `the graph of ${kind} has the input "${strange}", a state or an embedding that attach() does not know how to feed; pass a CoupledCache as past_key_values`,
    )
  }
  const positions = session.inputMetadata.find(({ name }) => name === 'position_ids')
  if (positions?.shape && positions.shape.length > 2) {
    throw unsupportedModel(`the graph of ${kind} takes positions of more than one axis, as multimodal models do; pass a CoupledCache as past_key_values`)
  }
  return session
}

const KNOWN_INPUTS = new Set(['input_ids', 'attention_mask', 'position_ids', 'num_logits_to_keep'])

/** The file was found by its name; its cache must at least look like the cache of the session it replaces. */
function compareShapes(decoder: DecoderModel, session: ModelSession, file: string): void {
  const keys = session.inputMetadata.filter(({ name }) => /^past_key_values\.\d+\.key$/.test(name))
  const { layers, kvHeads, headDim } = decoder.shape
  const [, heads, , channels] = keys[0]?.shape ?? []
  if (keys.length !== layers || heads !== kvHeads || channels !== headDim) {
    throw unsupportedModel(
      `${file} is not what the model was loaded from: it has ${layers} layers of ${kvHeads} kv heads of ${headDim} channels, the model ${keys.length} of ${heads ?? 'no'} of ${channels ?? 'no'}; pass \`path\``,
    )
  }
}

/** Beams swap places between steps, and a sequence of codes is bound to its row. */
function refuseBeams(model: PretrainedModel, options: GenerateOptions): void {
  const given = [options, options.generation_config, (model as { generation_config?: unknown }).generation_config, model.config]
  const beams = given
    .map((place) => (place as { num_beams?: unknown } | null | undefined)?.num_beams)
    .find((value) => value !== undefined && value !== null)
  if (typeof beams === 'number' && beams > 1) {
    throw unsupported(
      `Beam search (num_beams: ${beams}) moves rows of the cache between sequences, which attach() does not do; use num_beams: 1, or detach() first`,
    )
  }
}

/** `work`, or the rejection of `signal`, whichever comes first. */
async function firstOf<T>(work: Promise<T>, signal: AbortSignal): Promise<T> {
  let stop: (() => void) | undefined
  const aborted = new Promise<never>((_, reject) => {
    stop = () => { reject(signal.reason as Error) }
    signal.addEventListener('abort', stop, { once: true })
  })
  try {
    return await Promise.race([work, aborted])
  } finally {
    if (stop) signal.removeEventListener('abort', stop)
  }
}

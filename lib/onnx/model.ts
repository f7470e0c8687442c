import { availableParallelism } from 'node:os'

import { requireInteger, requireObject } from '../arguments'
import type { Sequence } from '../cache'
import { Cache } from '../cache'
import { Codebook } from '../codebook'
import type { DeviceOptions } from '../device'
import { disposedError, throwExpected } from '../errors'
import { addon } from '../native/addon'
import { abortable, requireSignal } from '../native/call'
import type { NativeOutput, NativeSession } from '../native/onnxruntime'
import { Capture } from './capture'
import type { ModelShape } from './decoder'
import { openDecoder } from './decoder'
import type { BatchRow, GraphInputs } from './feeds'
import { feedsOf } from './feeds'
import { openOnnxruntime } from './library'
import { cutLogits, firstLogitInput } from './logits'
import { encodeModel } from './proto'
import type { ExecutionProvider, ProviderName } from './provider'
import { createOnProvider, reasonAgainstCuda, requireProvider } from './provider'
import type { AttentionLayer } from './rewrite'

export type { ExecutionProvider, ModelShape, ProviderName }

/**
 * `device` is where keys, values and codes are kept and attention is computed; each layer's queries, keys, values and outputs go from and to the
 * host's memory. `executionProvider` is where onnxruntime runs the rest of the graph.
 */
export interface DecoderModelOptions extends DeviceOptions {
  /** Codes keys and values; without it the cache keeps them in full precision. */
  codebook?: Codebook
  /** Last tokens of a sequence kept in full precision; default 32, and all of them without a codebook. */
  window?: number
  /** First tokens of a sequence kept in full precision; default 4. */
  sinks?: number
  /** Bytes that the cache may take; default no limit. */
  memory?: number
  /** Threads of attention and of onnxruntime's operators; default all cores. */
  threads?: number
  /** The module onnxruntime-node, or the path of its folder, when it has to be that copy. */
  onnxruntime?: unknown
  /** What runs the nodes around attention; default 'auto': CUDA where attention runs there and the installed onnxruntime-node has it. */
  executionProvider?: ProviderName | undefined
}

export interface ModelRow {
  sequence: Sequence
  /** New tokens, at least one. */
  tokens: ArrayLike<number | bigint>
}

export interface ModelRunOptions {
  /** How new tokens meet each other: in full precision, or as if they had come one by one. Default 'exact'. */
  prefill?: 'exact' | 'coded'
  /** Adds keys and values of the new tokens to a sample. */
  capture?: Capture
  /** Rejects with its reason; the sequences are then as before the call. */
  signal?: AbortSignal
  /** Logits of every column, or of the last one only. Default 'all'. */
  logits?: 'all' | 'last'
}

export interface ModelTensor {
  readonly dims: readonly number[]
  /** A Uint16Array holds the bits of float16, a Uint8Array booleans too. */
  readonly data: OutputArray
}

export interface ModelRunResult {
  /** float32 [rows][columns][vocabulary]: columns is 1, or that of the longest row, whose tokens are the last ones of each row. */
  logits: Float32Array
  /** [rows, columns, vocabulary] */
  dims: number[]
  /** Other outputs of the graph, as it gives them. */
  outputs: Record<string, ModelTensor>
}

type ModelParts = Pick<DecoderModel, 'file' | 'shape' | 'fingerprint' | 'cache' | 'executionProvider' | 'inputNames' | 'vocabulary'> & {
  inputs: GraphInputs
  outputNames: readonly string[]
}

/**
 * A decoder graph whose attention runs on couplet's cache, in an onnxruntime session of its own. The graph is an ONNX file with
 * com.microsoft.GroupQueryAttention nodes; the file on disk is not changed.
 */
export class DecoderModel {
  /** The .onnx file, an absolute path. */
  readonly file: string
  readonly shape: ModelShape
  /** "sha256:..." over the graph and all its weights. */
  readonly fingerprint: string
  readonly cache: Cache
  /** What runs the nodes around attention, and why that. */
  readonly executionProvider: ExecutionProvider
  /** Inputs for tokens that the rewritten graph has; `run` makes all of them. */
  readonly inputNames: readonly string[]
  /** Tokens the model knows, as far as the graph says. */
  readonly vocabulary: number | undefined
  readonly #inputs: GraphInputs
  readonly #outputNames: readonly string[]
  #session: NativeSession | undefined

  private constructor(session: NativeSession, parts: ModelParts) {
    this.#session = session
    this.#inputs = parts.inputs
    this.#outputNames = parts.outputNames
    this.file = parts.file
    this.shape = parts.shape
    this.fingerprint = parts.fingerprint
    this.cache = parts.cache
    this.executionProvider = parts.executionProvider
    this.inputNames = parts.inputNames
    this.vocabulary = parts.vocabulary
  }

  /**
   * @param path an .onnx file, or a folder that has onnx/model.onnx or model.onnx.
   * @throws {CoupletError} `ERR_COUPLET_UNSUPPORTED_MODEL` for a graph whose attention cannot be replaced, with the reason;
   *   `ERR_COUPLET_ONNXRUNTIME` when onnxruntime-node is missing, unsuitable or refuses the graph, or the execution provider is not there;
   *   `ERR_COUPLET_CODEBOOK_MISMATCH` for the codebook of another model; `ERR_COUPLET_BACKEND_UNAVAILABLE` when the device is not there.
   */
  static async load(path: string, options: DecoderModelOptions = {}): Promise<DecoderModel> {
    if (typeof path !== 'string') throwExpected('a path', 'path', path)
    requireObject(options, 'options')
    const { codebook, threads = 0, executionProvider: wish = 'auto' } = options
    requireInteger(threads, 'threads', 0, 256)
    requireProvider(wish)
    if (codebook !== undefined && !(codebook instanceof Codebook)) throwExpected('a Codebook', 'codebook', codebook)
    const { library } = openOnnxruntime(options.onnxruntime)
    const { device, deviceIndex } = addon().findDevice({ device: options.device, deviceIndex: options.deviceIndex })
    const { graph, folder, layers, measuredPasts, shape, fingerprint: digest, ...ports } = await openDecoder(path)
    const names = cutLogits(graph) ? [...ports.inputNames, firstLogitInput] : ports.inputNames

    const model = encodeModel(graph)
    const settings = { library, model, folder, threads: threads === 0 ? availableParallelism() : threads, deviceIndex: device === 'cuda' ? deviceIndex : 0 }
    const [{ session, provider }, fingerprint] = await Promise.all([
      createOnProvider({ wish, device, reasonAgainstCuda: () => reasonAgainstCuda(library) }, (name) =>
        addon().createSession({ ...settings, cuda: name === 'cuda' })),
      digest(),
    ])
    try {
      codebook?.check({ layers: shape.layers, kvHeads: shape.kvHeads, headDim: shape.headDim, rotary: shape.rotary, model: fingerprint })
      const cache = await createCache(shape, layers, options)
      const inputs = { names, measuredPasts, kvHeads: shape.kvHeads }
      return new DecoderModel(session, { shape, fingerprint, cache, executionProvider: provider, inputs, ...ports })
    } catch (error) {
      addon().disposeSession(session)
      throw error
    }
  }

  /** An empty sequence of this model's cache. */
  sequence(): Sequence {
    return this.cache.sequence()
  }

  /**
   * Runs new tokens of some sequences, each sequence once. Runs of other sequences may overlap.
   * @returns logits that follow each new token (or the last one of each row).
   * @throws {CoupletError} `ERR_COUPLET_CACHE_FULL`, `ERR_COUPLET_BUSY` for a sequence that another run works on,
   *   `ERR_COUPLET_ONNXRUNTIME`; whatever happens, a run that fails leaves its sequences as they were.
   */
  async run(rows: readonly ModelRow[], options: ModelRunOptions = {}): Promise<ModelRunResult> {
    const session = this.#session
    if (session === undefined) throw disposedError('model')
    requireObject(options, 'options')
    const { prefill = 'exact', capture, signal, logits = 'all' } = options
    if (!['all', 'last'].includes(logits)) throwExpected('"all" or "last"', 'logits', logits)
    if (capture !== undefined && !(capture instanceof Capture)) throwExpected('a Capture', 'capture', capture)
    this.#checkRows(rows)
    if (rows.length === 0) return { logits: new Float32Array(0), dims: [0, 0, this.vocabulary ?? 0], outputs: {} }
    requireSignal(signal)
    signal?.throwIfAborted()

    const step = this.cache.begin(rows.map(({ sequence, tokens }) => ({ sequence, tokens: tokens.length })), { prefill })
    try {
      const batch: BatchRow[] = rows.map(({ sequence, tokens }) => ({ past: sequence.length, tokens }))
      const outputs = await abortable(signal, (cancel) => {
        const interrupt = (): void => { if (cancel) addon().interruptSession(session, cancel) }
        signal?.addEventListener('abort', interrupt, { once: true })
        const running = addon().runSession({
          session,
          step: step.native,
          capture: capture?.native,
          cancel,
          feeds: feedsOf(this.#inputs, batch, logits === 'last'),
          outputs: [...this.#outputNames],
          logits: 'logits',
          lastColumn: logits === 'last',
        })
        return running.finally(() => signal?.removeEventListener('abort', interrupt))
      })
      step.commit()
      return resultOf(outputs)
    } catch (error) {
      // Whatever the cache or the graph made of it.
      throw this.#isDisposed() ? disposedError('model') : error
    } finally {
      step[Symbol.dispose]()
    }
  }

  /** Frees the session and the cache; runs under way reject with `ERR_COUPLET_DISPOSED`. Idempotent. */
  dispose(): void {
    if (this.#session === undefined) return
    addon().disposeSession(this.#session)
    this.#session = undefined
    this.cache.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }

  #isDisposed(): boolean {
    return this.#session === undefined
  }

  #checkRows(rows: readonly ModelRow[]): void {
    if (!Array.isArray(rows)) throwExpected('an array of rows', 'rows', rows)
    const most = BigInt(this.vocabulary ?? 2 ** 31)
    for (const row of rows as readonly (ModelRow | undefined)[]) {
      requireObject(row, 'rows')
      const { tokens } = row
      if (!((tokens as ModelRow['tokens'] | undefined)?.length ?? 0)) throwExpected('at least one token', 'tokens', tokens)
      for (let i = 0; i < tokens.length; i++) {
        const token = tokens[i]!
        const isId = (typeof token === 'bigint' || Number.isInteger(token)) && token >= 0 && token < most
        if (!isId) throwExpected(`token ids from 0 to ${most - 1n}`, `tokens[${i}]`, token)
      }
    }
  }
}

function createCache(shape: ModelShape, layers: readonly AttentionLayer[], options: DecoderModelOptions): Promise<Cache> {
  const { codebook, window, sinks, memory, threads, device, deviceIndex } = options
  const { queryHeads, kvHeads, headDim } = shape
  return Cache.create({
    ...(codebook && { codebook }),
    layers: shape.layers,
    queryHeads,
    kvHeads,
    headDim,
    ...(sinks !== undefined && { sinks }),
    window: window ?? (codebook ? 32 : Infinity),
    ...(memory !== undefined && { memory }),
    ...(threads !== undefined && { threads }),
    device,
    deviceIndex,
    layerOptions: layers.map(({ scale, softcap, localWindow, headSinks, rotary }) => ({
      ...(scale !== 0 && { scale }),
      softcap,
      localWindow,
      ...(headSinks && { headSinks }),
      rotary,
    })),
  })
}

function resultOf(outputs: readonly NativeOutput[]): ModelRunResult {
  const result: ModelRunResult = { logits: new Float32Array(0), dims: [], outputs: {} }
  for (const { name, type, dims, data } of outputs) {
    if (name === 'logits') Object.assign(result, { logits: new Float32Array(data), dims })
    else result.outputs[name] = { dims, data: new (outputArrays[type] ?? Uint8Array)(data) }
  }
  return result
}

export type OutputArray =
  | Float32Array | Float64Array | Int8Array | Uint8Array | Int16Array | Uint16Array | Int32Array | Uint32Array | BigInt64Array | BigUint64Array

/** By TensorProto.DataType. */
const outputArrays: Record<number, new (data: ArrayBuffer) => OutputArray> = {
  1: Float32Array, 2: Uint8Array, 3: Int8Array, 4: Uint16Array, 5: Int16Array, 6: Int32Array, 7: BigInt64Array, 9: Uint8Array,
  10: Uint16Array, 11: Float64Array, 12: Uint32Array, 13: BigUint64Array,
}

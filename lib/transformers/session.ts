import type { AsyncLocalStorage } from 'node:async_hooks'
import { disposedError } from '../errors'
import type { DecoderModel, ModelRunOptions, ModelRunResult } from '../onnx/model'
import { invalid, isCacheFull } from './errors'
import { readRequest, spreadLogits, type Past, type Request } from './request'
import type { Resident, Residents } from './residents'
import type { TokenList } from './tokens'
import type { ModelSession, OrtTensor, OrtTensorClass, ValueMetadata } from './types'

/** A generate() call in progress, and all that may end it early. */
export interface GenerateCall {
  readonly signal?: AbortSignal | undefined
}

/** Tokens that went through the model, and tokens that did not have to. */
export interface TokenCounts {
  tokensRun: number
  tokensReused: number
}

export interface CoupledSessionOptions {
  readonly original: ModelSession
  readonly decoder: DecoderModel
  readonly residents: Residents
  readonly tensors: OrtTensorClass
  readonly calls: AsyncLocalStorage<GenerateCall>
  /** Tokens of a prompt that go through the model at once, when only the last logits are asked for. */
  readonly chunk: number
  /** For steps outside generate(). */
  readonly signal?: AbortSignal | undefined
}

/** A row on its way through the model: tokens of `text` that the resident does not hold are still to be run. */
interface Work {
  readonly resident: Resident
  readonly text: TokenList
}

/**
 * Stands where transformers.js expects the model's InferenceSession, and runs the same graph on packed codes.
 *
 * It keeps to the protocol of the graph it replaces, with one change: past and present shrink to one empty tensor each,
 * [batch, kvHeads, tokens, 0], which says how long the past is and stands for its text. Keys and values stay in the cache,
 * where any text that comes back finds the longest part of it which is still there. So a past_key_values of transformers.js
 * goes on working, whether or not its sequences were evicted, taken over or forked meanwhile.
 */
export class CoupledSession implements ModelSession {
  readonly inputNames: readonly string[]
  readonly outputNames: readonly string[]
  readonly inputMetadata: readonly ValueMetadata[]
  readonly outputMetadata: readonly ValueMetadata[]
  readonly config: ModelSession['config']
  readonly tokens: TokenCounts = { tokensRun: 0, tokensReused: 0 }
  readonly #options: CoupledSessionOptions
  readonly #pastName: string
  readonly #presentName: string
  readonly #pasts = new WeakMap<OrtTensor, Past>()
  #steps = 0
  #closed = false

  constructor(options: CoupledSessionOptions) {
    const { original, decoder } = options
    this.#options = options
    this.config = original.config
    const past = original.inputMetadata.find(({ name }) => name.startsWith('past_key_values.'))
    this.#pastName = past?.name ?? 'past_key_values.0.key'
    this.#presentName = this.#pastName.replace('past_key_values', 'present')
    const kept = original.inputMetadata.filter(({ name }) => !name.startsWith('past_key_values.') && name !== KEEP.name)
    const state = { isTensor: true, type: 'float32', shape: ['batch_size', decoder.shape.kvHeads, 'past_sequence_length', 0] }
    this.inputMetadata = [...kept, KEEP, { name: this.#pastName, ...state }]
    this.inputNames = this.inputMetadata.map(({ name }) => name)
    const logits = original.outputMetadata.find(({ name }) => name === 'logits')
    this.outputMetadata = [logits ?? { name: 'logits', isTensor: true, type: 'float32' }, { name: this.#presentName, ...state }]
    this.outputNames = this.outputMetadata.map(({ name }) => name)
  }

  /**
   * One step of the decoder. Inside generate() transformers.js asks for the last logits only (num_logits_to_keep = 1), and
   * whatever the cache still holds of the text is not run again; a direct call of the model asks for all, and runs all.
   */
  async run(feeds: Record<string, OrtTensor>): Promise<Record<string, OrtTensor>> {
    if (this.#closed) throw disposedError('attachment')
    const { calls, decoder, tensors, signal } = this.#options
    const call = calls.getStore()
    const past = this.#past(feeds[this.#pastName])
    const request = readRequest(feeds, past)

    this.#steps += 1
    try {
      const logits = await this.#step(request, past, call, call?.signal ?? signal)
      const columns = (past?.columns ?? 0) + request.columns
      const present = new tensors('float32', new Float32Array(0), [request.rows.length, decoder.shape.kvHeads, columns, 0])
      this.#pasts.set(present, { texts: request.rows.map(({ text }) => text), columns })
      return { logits, [this.#presentName]: present }
    } catch (error) {
      // generate() has rejected by itself, with the signal's reason. transformers.js prints every rejection of run() along
      // with all inputs, so its loop is left waiting instead: nothing refers to it any more.
      if (call?.signal?.aborted) return new Promise<never>(() => undefined)
      throw error
    } finally {
      this.#steps -= 1
      this.#settle()
    }
  }

  /** Asked for by model.dispose(): frees this session and the one it stands for. */
  async release(): Promise<void> {
    this.close()
    await this.#options.original.release()
  }

  /** Frees sequences and model as soon as no step runs on them. */
  close(): void {
    if (this.#closed) return
    this.#closed = true
    this.#settle()
  }

  #settle(): void {
    if (!this.#closed || this.#steps > 0) return
    this.#options.residents.clear()
    this.#options.decoder.dispose()
  }

  #past(tensor: OrtTensor | undefined): Past | undefined {
    if (!tensor || tensor.dims.at(-2) === 0) return undefined
    const past = this.#pasts.get(tensor)
    if (past) return past
    throw invalid('past_key_values', 'a cache that this attached model filled (its sequences stay in couplet), or none', 'one that was filled elsewhere')
  }

  async #step(request: Request, past: Past | undefined, call: GenerateCall | undefined, signal: AbortSignal | undefined): Promise<OrtTensor> {
    const { residents, tensors } = this.#options
    signal?.throwIfAborted()
    const taken: Resident[] = []
    try {
      const work: Work[] = []
      const ran = request.rows.map(({ text, fresh, wanted }, index) => {
        if (fresh === 0) return -1
        const resident = residents.acquire(text, text.length - wanted, call)
        taken.push(resident)
        this.tokens.tokensReused += Math.max(0, resident.text.length - (past?.texts[index]?.length ?? 0))
        return resident.text.length < text.length ? work.push({ resident, text }) - 1 : -1
      })
      const result = await this.#runAll(work, request.rows.some(({ wanted }) => wanted > 1), signal)
      const [, columns = 0, vocabulary = 0] = result.dims
      const data = spreadLogits(request, ran, result.logits, columns, vocabulary)
      return new tensors('float32', data, [request.rows.length, request.logitColumns, vocabulary])
    } finally {
      residents.release(taken)
    }
  }

  /** Brings every resident up to its text; the logits are of the tokens that run last, or of all. */
  async #runAll(work: readonly Work[], allLogits: boolean, signal: AbortSignal | undefined): Promise<ModelRunResult> {
    for (const { resident } of work) resident.running = true
    const options = { logits: allLogits ? 'all' : 'last', ...(signal && { signal }) } as const
    if (!allLogits) {
      const { chunk } = this.#options
      const long = () => work.filter(({ resident, text }) => text.length - resident.text.length > chunk)
      for (let rows = long(); rows.length > 0; rows = long()) await this.#runChunk(rows, chunk, options)
    }
    return this.#runChunk(work, Infinity, options)
  }

  /** Runs the next tokens of each row, `most` at most; when the cache is full, what was used least recently makes room. */
  async #runChunk(work: readonly Work[], most: number, options: ModelRunOptions): Promise<ModelRunResult> {
    const { decoder, residents } = this.#options
    const rows = work.map(({ resident, text }) => ({ sequence: resident.sequence, tokens: text.view(resident.text.length).subarray(0, most) }))
    for (;;) {
      try {
        const result = await decoder.run(rows, options)
        for (const [index, { resident, text }] of work.entries()) {
          const { length } = rows[index]!.tokens
          resident.text = text.prefix(resident.text.length + length)
          this.tokens.tokensRun += length
        }
        return result
      } catch (error) {
        if (!isCacheFull(error) || !residents.evict()) throw error
      }
    }
  }
}

const KEEP: ValueMetadata = { name: 'num_logits_to_keep', isTensor: true, type: 'int64', shape: [] }

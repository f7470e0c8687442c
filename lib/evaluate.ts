import { requireCallOptions, requireObject } from './arguments'
import { tokenIds } from './calibrate/text'
import { chunks, countChunks } from './chunks'
import { Codebook } from './codebook'
import { rangeError, throwExpected } from './errors'
import { DecoderModel } from './onnx/model'
import type { DeviceOptions } from './device'

/** `device` is where attention is computed, as in `DecoderModelOptions`. */
export interface EvaluateOptions extends DeviceOptions {
  /** Directory of the model. */
  model: string
  /** Text, or its token ids. */
  text: string | ArrayLike<number>
  /** Tokens of a chunk; every chunk is a sequence of its own. Default 512. */
  length?: number
  /** Codebook or its file; without it everything stays in full precision. */
  codebook?: Codebook | string
  /** Newest tokens that a query reads in full precision, itself among them. Default 32; 0 codes every token. */
  window?: number
  /** First tokens in full precision. Default 4. */
  sinks?: number
  threads?: number
  signal?: AbortSignal
  /** Chunks done and in all. */
  onProgress?: (done: number, total: number) => void
}

export interface Evaluation {
  /** exp of the mean loss (natural logarithm) over tokens 1 .. length - 1 of every chunk. */
  perplexity: number
  /** The same loss in bits. */
  bitsPerToken: number
  /** Cache bytes of one chunk in bits per cached channel: codes, padding, sinks and window. The codebook is counted apart, as all sequences share it. */
  bitsPerChannel: number
  /** Cache bytes per token at the end of a chunk. */
  bytesPerToken: number
  /** Bytes of the tables in memory. */
  codebookBytes: number
  /** Tokens whose loss was counted. */
  tokens: number
}

/**
 * Perplexity of a model on a text with its KV cache coded. New tokens meet each other as one-by-one decoding would see them
 * (`prefill: 'coded'`): token t reads the sinks and t - window + 1 .. t in full precision and codes for the rest.
 *
 * @throws {RangeError} `ERR_COUPLET_INVALID_ARGUMENT` for a text of fewer than two tokens
 * @throws {CoupletError} `ERR_COUPLET_CODEBOOK_MISMATCH` for a codebook of another model
 */
export async function evaluate(options: EvaluateOptions): Promise<Evaluation> {
  requireObject(options, 'options')
  const { length = 512, window = 32, sinks = 4, threads, signal, onProgress, device, deviceIndex } = options
  if (!Number.isInteger(length) || length < 2) throwExpected('an integer of at least 2', 'length', length, typeof length === 'number')
  requireCallOptions(options)
  const tokens = await tokenIds(options.text, options.model)
  if (tokens.length < 2) throw rangeError(`Expected a text of at least 2 tokens for \`text\` but received ${tokens.length}`)
  const own = typeof options.codebook === 'string'
  const codebook = typeof options.codebook === 'string' ? await Codebook.load(options.codebook) : options.codebook
  try {
    const cache = codebook ? { codebook, window, sinks } : { sinks: 0 }
    const model = await DecoderModel.load(options.model, { ...cache, ...(threads !== undefined && { threads }), device, deviceIndex })
    try {
      const { layers, kvHeads, headDim } = model.shape
      const total = countChunks(tokens.length, length, 2)
      let done = 0
      const measured = await measure(model, chunks(tokens, length, 2), signal, () => onProgress?.(++done, total))
      const { loss, bytesPerToken, codebookBytes } = measured
      return {
        perplexity: Math.exp(loss),
        bitsPerToken: loss / Math.LN2,
        bitsPerChannel: (bytesPerToken * 8) / (layers * 2 * kvHeads * headDim),
        bytesPerToken,
        codebookBytes,
        tokens: measured.tokens,
      }
    } finally {
      model.dispose()
    }
  } finally {
    if (own) codebook?.dispose()
  }
}

/** What the cache of the first chunk took, and the mean loss (natural logarithm) of the next tokens of all chunks, each of two or more tokens. */
export interface MeasuredChunks {
  loss: number
  /** Of each chunk. */
  losses: number[]
  /** Tokens whose loss was counted. */
  tokens: number
  /** Bytes of the cache: of a token, and of the tables. */
  bytesPerToken: number
  codebookBytes: number
}

export async function measure(model: DecoderModel, texts: Iterable<readonly number[]>, signal?: AbortSignal, onChunk?: () => void): Promise<MeasuredChunks> {
  const losses: number[] = []
  let total = 0
  let counted = 0
  let bytesPerToken = 0
  let codebookBytes = 0
  using sequence = model.sequence()
  for (const chunk of texts) {
    sequence.reset()
    const { logits } = await model.run([{ sequence, tokens: chunk }], { prefill: 'coded', logits: 'all', ...(signal && { signal }) })
    const vocabulary = logits.length / chunk.length
    let loss = 0
    for (let t = 1; t < chunk.length; t++) loss += crossEntropy(logits.subarray((t - 1) * vocabulary, t * vocabulary), chunk[t]!)
    if (counted === 0) {
      const statistics = model.cache.statistics()
      bytesPerToken = (statistics.pageBytes + statistics.rawBytes) / statistics.tokens
      codebookBytes = statistics.codebookBytes
    }
    losses.push(loss / (chunk.length - 1))
    total += loss
    counted += chunk.length - 1
    onChunk?.()
  }
  return { loss: total / counted, losses, tokens: counted, bytesPerToken, codebookBytes }
}

/** -log softmax(logits)[target], in double precision. */
export function crossEntropy(logits: Float32Array, target: number): number {
  let highest = -Infinity
  for (const logit of logits) highest = Math.max(highest, logit)
  let sum = 0
  for (const logit of logits) sum += Math.exp(logit - highest)
  return highest + Math.log(sum) - (logits[target] as number)
}

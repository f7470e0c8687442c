/** Perplexity and distance to full precision of a model whose cache a method quantizes. */
import { crossEntropy } from '../../lib/evaluate'
import type { Kept, TwoVersionAttention } from './attention'
import type { LayeredModel, Rows } from './layers'
import type { Method, Quantizer } from './methods/method'

export interface Figures {
  perplexity: number
  /** Mean over all predicted tokens of KL(full precision || quantized), in nats. */
  divergence: number
  /** Share of predicted tokens whose likeliest one is that of full precision. */
  agreement: number
  /** Bits that codes and their overheads take, a channel of a coded token; tokens in full precision are apart. */
  bits: number
  /** Bytes shared by all sequences. */
  tableBytes: number
}

export interface Evaluation {
  readonly model: LayeredModel
  readonly attention: TwoVersionAttention
  /** Sequences. */
  readonly chunks: readonly (readonly number[])[]
}

/** Which tokens stay as they are, and whether keys are quantized after rotary embedding. */
export type Quantized = Kept & Pick<Method, 'rotated'>

/** Logits in full precision of each chunk. */
export async function fullPrecision({ model, attention, chunks }: Evaluation): Promise<Float32Array[]> {
  const logits: Float32Array[] = []
  for (const tokens of chunks) {
    logits.push(await model.run(tokens, (number, { query, key, value }) => {
      const layer = model.layers[number]!
      attention.rotate(layer, query, 0)
      attention.rotate(layer, key, 0)
      return attention.attend(layer, query, { key, value })
    }))
  }
  return logits
}

/** Logits of one sequence, its cache quantized, and the bits and channels that were coded. */
export async function quantizedLogits({ model, attention }: Omit<Evaluation, 'chunks'>, tokens: ArrayLike<number>,
  quantizer: Quantizer, kept: Quantized): Promise<{ logits: Float32Array; bits: number; channels: number }> {
  let bits = 0
  let channels = 0
  const logits = await model.run(tokens, (number, { query, key, value }) => {
    const layer = model.layers[number]!
    attention.rotate(layer, query, 0)
    const plainKey = kept.rotated ? key : { ...key, data: key.data.slice() }
    attention.rotate(layer, key, 0)
    const coded = (rows: Rows, side: 'key' | 'value'): Rows => {
      const tail = { ...rows, data: afterSinks(rows, kept.sinks), tokens: Math.max(0, rows.tokens - kept.sinks) }
      bits += quantizer.quantize(tail, { layer: number, side })
      channels += tail.data.length
      if (side === 'key' && !kept.rotated) attention.rotate(layer, tail, kept.sinks)
      return withSinks(rows.tokens, tail)
    }
    const versions = { key: coded(kept.rotated ? key : plainKey, 'key'), value: coded(value, 'value') }
    return attention.attend(layer, query, { key, value }, { ...versions, ...kept })
  })
  return { logits, bits, channels }
}

/** @param full what {@link fullPrecision} gave */
export async function evaluateMethod(evaluation: Evaluation, full: readonly Float32Array[], quantizer: Quantizer, kept: Quantized): Promise<Figures> {
  const sum = { loss: 0, divergence: 0, agreed: 0, predicted: 0, bits: 0, channels: 0 }
  for (const [index, tokens] of evaluation.chunks.entries()) {
    const { logits, bits, channels } = await quantizedLogits(evaluation, tokens, quantizer, kept)
    const exact = full[index]!
    const vocabulary = logits.length / tokens.length
    for (let t = 1; t < tokens.length; t++) {
      const row = (all: Float32Array) => all.subarray((t - 1) * vocabulary, t * vocabulary)
      const { divergence, agrees } = compare(row(exact), row(logits))
      sum.loss += crossEntropy(row(logits), tokens[t]!)
      sum.divergence += divergence
      if (agrees) sum.agreed += 1
    }
    sum.predicted += tokens.length - 1
    sum.bits += bits
    sum.channels += channels
  }
  return {
    perplexity: Math.exp(sum.loss / sum.predicted),
    divergence: sum.divergence / sum.predicted,
    agreement: sum.agreed / sum.predicted,
    bits: sum.bits / sum.channels,
    tableBytes: quantizer.tableBytes,
  }
}

/** KL(softmax(exact) || softmax(logits)) in nats, and whether both have the same likeliest token. */
export function compare(exact: Float32Array, logits: Float32Array): { divergence: number; agrees: boolean } {
  const [a, b] = [logSum(exact), logSum(logits)]
  let divergence = 0
  for (let i = 0; i < exact.length; i++) divergence += Math.exp(exact[i]! - a.logSum) * (exact[i]! - a.logSum - logits[i]! + b.logSum)
  return { divergence, agrees: a.best === b.best }
}

function logSum(logits: Float32Array): { logSum: number; best: number } {
  let best = 0
  for (let i = 1; i < logits.length; i++) if (logits[i]! > logits[best]!) best = i
  let sum = 0
  for (const logit of logits) sum += Math.exp(logit - logits[best]!)
  return { logSum: logits[best]! + Math.log(sum), best }
}

/** A copy of the tokens from `sinks` on. */
function afterSinks({ data, heads, tokens, channels }: Rows, sinks: number): Float32Array {
  const first = Math.min(sinks, tokens)
  const out = new Float32Array(heads * (tokens - first) * channels)
  for (let head = 0; head < heads; head++) {
    out.set(data.subarray((head * tokens + first) * channels, (head + 1) * tokens * channels), head * (tokens - first) * channels)
  }
  return out
}

/** All `tokens` tokens again; the first ones, which no query reads from codes, are zero. */
function withSinks(tokens: number, tail: Rows): Rows {
  if (tail.tokens === tokens) return tail
  const data = new Float32Array(tail.heads * tokens * tail.channels)
  const size = tail.tokens * tail.channels
  for (let head = 0; head < tail.heads; head++) data.set(tail.data.subarray(head * size, (head + 1) * size), (head + 1) * tokens * tail.channels - size)
  return { ...tail, data, tokens }
}

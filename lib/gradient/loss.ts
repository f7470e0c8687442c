/** Losses at the end of a decoder: their value, and the gradient with respect to the logits that the reverse pass begins with. */
import type { NativeFeed } from '../native/onnxruntime'
import { DataType } from '../onnx/proto'
import type { GraphBuilder } from './builder'

export interface Loss {
  /** float32 scalar */
  readonly value: string
  /** Of the logits' shape and type. */
  readonly gradient: string
}

const labelsInput = 'couplet.labels'
const countedInput = 'couplet.counted'
const targetInput = 'couplet.target'

/** Sum of the cross-entropies of the next tokens: logits of token t against token t + 1 of the same row. */
export function crossEntropyLoss(build: GraphBuilder, logits: string): Loss {
  const labels = build.input(labelsInput, DataType.int64, ['couplet.rows', 'couplet.tokens'])
  const counted = build.input(countedInput, DataType.float, ['couplet.rows', 'couplet.tokens', 1])
  const vocabulary = build.add('Gather', [build.add('Shape', [logits]), build.integers([2])])
  const target = build.add('OneHot', [labels, vocabulary, build.floats(Float32Array.of(0, 1), [2])])
  const wide = build.cast(logits, DataType.float)
  const likelihood = build.reduce('ReduceSum', build.add('Mul', [target, build.add('LogSoftmax', [wide])]), [2])
  const value = build.add('Neg', [build.add('ReduceSum', [build.add('Mul', [likelihood, counted])], { attributes: { keepdims: 0 } })])
  const difference = build.add('Sub', [build.add('Softmax', [wide]), target])
  return { value, gradient: build.add('CastLike', [build.add('Mul', [difference, counted]), logits]) }
}

/** Feeds of crossEntropyLoss for rows of equally many tokens; the last token of a row has no next one. */
export function crossEntropyFeeds(rows: readonly (readonly number[])[]): NativeFeed[] {
  const tokens = rows[0]?.length ?? 0
  const labels = BigInt64Array.from(rows.flatMap((row) => [...row.slice(1), 0]), BigInt)
  const counted = Float32Array.from(rows.flatMap((row) => row.map((_, t) => (t + 1 < row.length ? 1 : 0))))
  return [
    { name: labelsInput, type: DataType.int64, dims: [rows.length, tokens], data: labels },
    { name: countedInput, type: DataType.float, dims: [rows.length, tokens, 1], data: counted },
  ]
}

/** Mean over all tokens of the KL divergence from a distribution that is fed to that of the logits. */
export function divergenceLoss(build: GraphBuilder, logits: string): Loss {
  const wide = build.cast(logits, DataType.float)
  const target = build.add('LogSoftmax', [build.input(targetInput, DataType.float, ['couplet.rows', 'couplet.tokens', 'couplet.vocabulary'])])
  const probability = build.add('Exp', [target])
  const gap = build.add('Sub', [target, build.add('LogSoftmax', [wide])])
  const sizes = build.cast(build.add('Shape', [logits]), DataType.float)
  const count = build.add('Mul', [0, 1].map((axis) => build.add('Gather', [sizes, build.integers([axis], [])])))
  const total = build.add('ReduceSum', [build.add('Mul', [probability, gap])], { attributes: { keepdims: 0 } })
  const difference = build.add('Div', [build.add('Sub', [build.add('Softmax', [wide]), probability]), count])
  return { value: build.add('Div', [total, count]), gradient: build.add('CastLike', [difference, logits]) }
}

/** The feed of divergenceLoss: logits of the wanted distribution, float32 [rows][tokens][vocabulary]. */
export function divergenceFeeds(logits: Float32Array, dims: number[]): NativeFeed[] {
  return [{ name: targetInput, type: DataType.float, dims, data: logits }]
}

import type { Codec } from '../codec'
import type { NativeFeed } from '../native/onnxruntime'
import type { ModelShape } from '../onnx/decoder'
import { openDecoder } from '../onnx/decoder'
import { removeUnused } from '../onnx/graph'
import { DataType } from '../onnx/proto'
import type { Side } from './attention'
import { expandAttention, rowsName, sides } from './attention'
import { GraphBuilder } from './builder'
import { differentiate } from './differentiate'
import { divergenceFeeds, divergenceLoss } from './loss'
import { decoderFeeds, floatsOf, gradientName, lossName } from './model'
import { GraphSession } from './session'

/** Centroids of all layers: for each, float32 [kvHeads][groups][centroids][groupChannels]. */
export type Tables = Record<Side, Float32Array[]>

export interface CodedGradientOptions {
  codecs: Record<Side, Codec>
  /** Tokens in full precision, as evaluate has them. */
  sinks: number
  window: number
  threads?: number
}

/** Texts of equally many tokens, and the logits of the model in full precision: float32 [texts][tokens][vocabulary]. */
export interface CodedBatch {
  texts: readonly (readonly number[])[]
  logits: Float32Array
}

const tablesName = (layer: number, side: Side): string => `${rowsName(layer, side)}.tables`
const codedName = (layer: number, side: Side): string => `${rowsName(layer, side)}.coded`
const codesName = (layer: number, side: Side): string => `${rowsName(layer, side)}.codes`

/**
 * A decoder that reads keys and values from codes, with the gradient of the KL divergence from its full-precision logits
 * with respect to the centroids. Codes are those of the nearest centroids, anew in every run, and count as constant.
 */
export class CodedGradientModel {
  readonly shape: ModelShape
  readonly fingerprint: () => Promise<string>
  readonly #codecs: Record<Side, Codec>
  readonly #session: GraphSession
  readonly #feeds: (batch: CodedBatch) => NativeFeed[]

  private constructor(parts: {
    shape: ModelShape; fingerprint: () => Promise<string>; codecs: Record<Side, Codec>; session: GraphSession; feeds: (batch: CodedBatch) => NativeFeed[]
  }) {
    this.shape = parts.shape
    this.fingerprint = parts.fingerprint
    this.#codecs = parts.codecs
    this.#session = parts.session
    this.#feeds = parts.feeds
  }

  /** @throws {CoupletError} `ERR_COUPLET_UNSUPPORTED_MODEL` naming the node through which couplet cannot compute a gradient */
  static async load(path: string, { codecs, sinks, window, threads = 0 }: CodedGradientOptions): Promise<CodedGradientModel> {
    const decoder = await openDecoder(path)
    const { graph, folder, layers, shape, fingerprint } = decoder
    const coded = (build: GraphBuilder, layer: number, side: Side, rows: string) => addCoding(build, { layer, side, rows, shape, codec: codecs[side] })
    const attentionFeeds = expandAttention(graph, layers, { coded, sinks, window })
    const build = new GraphBuilder(graph, 'couplet.loss')
    const loss = divergenceLoss(build, 'logits')
    graph.graph.node.push(...build.take())
    const places = layers.flatMap((_, layer) => sides.map((side) => ({ layer, side })))
    const targets = places.map(({ layer, side }) => codedName(layer, side))
    const gradients = await differentiate(graph, { seeds: new Map([['logits', loss.gradient]]), targets, folder })
    graph.graph.output = []
    build.output(loss.value, lossName)
    for (const { layer, side } of places) {
      build.declare(codesName(layer, side), DataType.int64)
      build.output(gradients.get(codedName(layer, side))!, gradientName(layer, side))
    }
    graph.graph.node.push(...build.take())
    removeUnused(graph)
    const feeds = ({ texts, logits }: CodedBatch) => {
      const tokens = texts[0]!.length
      const dims = [texts.length, tokens, logits.length / tokens / texts.length]
      return [...decoderFeeds(decoder, texts), ...attentionFeeds(tokens), ...divergenceFeeds(logits, dims)]
    }
    return new CodedGradientModel({ shape, fingerprint, codecs, session: await GraphSession.create(graph, { folder, threads }), feeds })
  }

  /** Mean KL divergence over all tokens; with `gradients`, those with respect to every centroid are added to them. */
  async run(batch: CodedBatch, tables: Tables, { gradients, signal }: { gradients?: Tables; signal?: AbortSignal | undefined } = {}): Promise<number> {
    const { layers, kvHeads, headDim } = this.shape
    const tableFeeds = sides.flatMap((side) => tables[side].map((data, layer): NativeFeed => {
      const { groupChannels, centroids } = this.#codecs[side]
      return { name: tablesName(layer, side), type: DataType.float, dims: [kvHeads * headDim / groupChannels, centroids, groupChannels], data }
    }))
    const outputs = await this.#session.run([...this.#feeds(batch), ...tableFeeds], signal)
    for (const side of gradients ? sides : []) {
      const { groupChannels, centroids } = this.#codecs[side]
      for (let layer = 0; layer < layers; layer++) {
        const codes = new BigInt64Array(outputs.get(codesName(layer, side))!.data)
        const rows = floatsOf(outputs, gradientName(layer, side))
        addByCode(gradients![side][layer]!, { codes, rows, groups: kvHeads * headDim / groupChannels, groupChannels, centroids })
      }
    }
    return floatsOf(outputs, lossName)[0]!
  }

  dispose(): void {
    this.#session.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}

interface CodingSite {
  layer: number
  side: Side
  rows: string
  shape: ModelShape
  codec: Codec
}

/**
 * Nearest centroids as plain operators. rows [texts][tokens][kvHeads][headDim] -> points [groups of all heads][points][groupChannels];
 * distances, but for |x|^2, as one product of (x, 1) and (-2 C, |C|^2), both relative to the mean centroid: keys have channels whose mean
 * is many times their spread, and there |C|^2 - 2 x.C would cancel.
 */
function addCoding(build: GraphBuilder, { layer, side, rows, shape: { kvHeads, headDim }, codec: { groupChannels, centroids } }: CodingSite): string {
  const groups = (kvHeads * headDim) / groupChannels
  const tables = build.input(tablesName(layer, side), DataType.float, [groups, centroids, groupChannels])
  const swap = (value: string) => build.add('Transpose', [value], { attributes: { perm: [1, 0, 2] } })
  const points = swap(build.add('Reshape', [rows, build.integers([-1, groups, groupChannels])]))
  const mean = build.reduce('ReduceMean', tables, [1])
  const [centered, near] = [tables, points].map((value) => build.add('Sub', [value, mean])) as [string, string]
  const append = (value: string, column: string) => build.add('Concat', [value, column], { attributes: { axis: 2 } })
  const norms = build.reduce('ReduceSum', build.add('Mul', [centered, centered]), [2])
  const counts = build.add('Slice', [build.add('Shape', [near]), build.integers([0]), build.integers([2])])
  const sizes = build.add('Concat', [counts, build.integers([1])], { attributes: { axis: 0 } })
  const ones = build.add('Expand', [build.floats(Float32Array.of(1), [1]), sizes])
  const right = append(build.add('Mul', [centered, build.floats(Float32Array.of(-2), [])]), norms)
  const distances = build.matmul(append(near, ones), right, { transB: true })
  const codes = build.add('ArgMin', [distances], { attributes: { axis: 2, keepdims: 0 }, outputs: [codesName(layer, side)] })
  const offsets = build.integers(Array.from({ length: groups }, (_, group) => group * centroids), [groups, 1])
  const flat = build.add('Reshape', [tables, build.integers([-1, groupChannels])])
  const decoded = build.add('Gather', [flat, build.add('Add', [codes, offsets])], { attributes: { axis: 0 } })
  return build.add('Reshape', [swap(decoded), build.add('Shape', [rows])], { outputs: [codedName(layer, side)] })
}

interface CodedRows {
  /** [groups][points] */
  codes: BigInt64Array
  /** float32 [points][groups][groupChannels] */
  rows: Float32Array
  groups: number
  groupChannels: number
  centroids: number
}

/** Adds to every centroid, [groups][centroids][groupChannels], the rows that are coded by it. */
function addByCode(sums: Float32Array, { codes, rows, groups, groupChannels, centroids }: CodedRows): void {
  const points = codes.length / groups
  for (let group = 0; group < groups; group++) {
    for (let point = 0; point < points; point++) {
      const to = (group * centroids + Number(codes[group * points + point])) * groupChannels
      const from = (point * groups + group) * groupChannels
      for (let channel = 0; channel < groupChannels; channel++) sums[to + channel]! += rows[from + channel]!
    }
  }
}

import type { Codebook } from '../codebook'
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

/** Centroids of all layers: for each, its parts one after another, float32 [heads][groups][centroids][groupChannels]. */
export type Tables = Record<Side, Float32Array[]>

export interface CodedGradientOptions {
  /** Whose codecs and transforms they are; its tables are given with every run. */
  codebook: Codebook
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

const codedName = (layer: number, side: Side): string => `${rowsName(layer, side)}.coded`

/** One side of some heads of a layer: what is coded by tables of its own. */
interface CodedPart {
  layer: number
  side: Side
  firstHead: number
  heads: number
  codec: Codec
  /** float32 [groups of its heads][centroids][groupChannels]: place in the table of its layer and side. */
  begin: number
  end: number
  /** float32 [groups of its heads][groupChannels][groupChannels]: what is near; undefined: the plain distance. */
  metric: Float32Array | undefined
}

const tablesName = ({ layer, side, firstHead }: CodedPart): string => `${rowsName(layer, side)}.tables.${firstHead}`
const codesName = ({ layer, side, firstHead }: CodedPart): string => `${rowsName(layer, side)}.codes.${firstHead}`

function codedParts(codebook: Codebook): CodedPart[] {
  return codebook.codecs.flatMap((_, layer) => sides.flatMap((side) => {
    let end = 0
    return codebook.parts(layer).map(({ firstHead, heads, ...part }): CodedPart => {
      const [codec, metric] = side === 'key' ? [part.keyCodec, part.keyMetric] : [part.valueCodec, part.valueMetric]
      const begin = end
      end += heads * codebook.headDim * codec.centroids
      return { layer, side, firstHead, heads, codec, begin, end, metric: metric?.slice() }
    })
  }))
}

/**
 * A decoder that reads keys and values from codes, with the gradient of the KL divergence from its full-precision logits
 * with respect to the centroids. Codes are those of the nearest centroids, anew in every run, and count as constant.
 */
export class CodedGradientModel {
  readonly shape: ModelShape
  readonly fingerprint: () => Promise<string>
  readonly #parts: readonly CodedPart[]
  readonly #session: GraphSession
  readonly #feeds: (batch: CodedBatch) => NativeFeed[]

  private constructor(made: {
    shape: ModelShape; fingerprint: () => Promise<string>; parts: readonly CodedPart[]; session: GraphSession; feeds: (batch: CodedBatch) => NativeFeed[]
  }) {
    this.shape = made.shape
    this.fingerprint = made.fingerprint
    this.#parts = made.parts
    this.#session = made.session
    this.#feeds = made.feeds
  }

  /** @throws {CoupletError} `ERR_COUPLET_UNSUPPORTED_MODEL` naming the node through which couplet cannot compute a gradient */
  static async load(path: string, { codebook, sinks, window, threads = 0 }: CodedGradientOptions): Promise<CodedGradientModel> {
    const decoder = await openDecoder(path)
    const { graph, folder, layers, shape, fingerprint } = decoder
    const parts = codedParts(codebook)
    const coded = (build: GraphBuilder, layer: number, side: Side, rows: string) => {
      const own = parts.filter((part) => part.layer === layer && part.side === side)
      const site = { rows, headDim: shape.headDim, parts: own, output: codedName(layer, side) }
      const matrices = matricesOf(codebook, layer, side)
      return matrices ? addMixed(build, site, ...matrices) : addCoding(build, site)
    }
    const attentionFeeds = expandAttention(graph, layers, { coded, sinks, window })
    const build = new GraphBuilder(graph, 'couplet.loss')
    const loss = divergenceLoss(build, 'logits')
    graph.graph.node.push(...build.take())
    const places = layers.flatMap((_, layer) => sides.map((side) => ({ layer, side })))
    const targets = places.map(({ layer, side }) => codedName(layer, side))
    const gradients = await differentiate(graph, { seeds: new Map([['logits', loss.gradient]]), targets, folder })
    graph.graph.output = []
    build.output(loss.value, lossName)
    for (const part of parts) build.declare(codesName(part), DataType.int64)
    for (const { layer, side } of places) build.output(gradients.get(codedName(layer, side))!, gradientName(layer, side))
    graph.graph.node.push(...build.take())
    removeUnused(graph)
    const feeds = ({ texts, logits }: CodedBatch) => {
      const tokens = texts[0]!.length
      const dims = [texts.length, tokens, logits.length / tokens / texts.length]
      return [...decoderFeeds(decoder, texts), ...attentionFeeds(tokens), ...divergenceFeeds(logits, dims)]
    }
    return new CodedGradientModel({ shape, fingerprint, parts, session: await GraphSession.create(graph, { folder, threads }), feeds })
  }

  /** Mean KL divergence over all tokens; with `gradients`, those with respect to every centroid are added to them. */
  async run(batch: CodedBatch, tables: Tables, { gradients, signal }: { gradients?: Tables; signal?: AbortSignal | undefined } = {}): Promise<number> {
    const { kvHeads, headDim } = this.shape
    const tableFeeds = this.#parts.map((part): NativeFeed => {
      const { layer, side, heads, begin, end, codec: { groupChannels, centroids } } = part
      const data = tables[side][layer]!.subarray(begin, end)
      return { name: tablesName(part), type: DataType.float, dims: [heads * headDim / groupChannels, centroids, groupChannels], data }
    })
    const outputs = await this.#session.run([...this.#feeds(batch), ...tableFeeds], signal)
    for (const part of gradients ? this.#parts : []) {
      const { layer, side, firstHead, heads, begin, end, codec: { groupChannels, centroids } } = part
      const codes = new BigInt64Array(outputs.get(codesName(part))!.data)
      const rows = floatsOf(outputs, gradientName(layer, side)).subarray(firstHead * headDim)
      const sums = gradients![side][layer]!.subarray(begin, end)
      addByCode(sums, { codes, rows, rowStride: kvHeads * headDim, groups: heads * headDim / groupChannels, groupChannels, centroids })
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
  rows: string
  headDim: number
  /** Of a layer and side, all heads. */
  parts: readonly CodedPart[]
  output: string
}

/** Rows enter as x M and leave as x M', matrices [kvHeads][headDim][headDim]: those of values, or an order of keys, which is exact as a product too. */
function matricesOf(codebook: Codebook, layer: number, side: Side): [Float32Array, Float32Array] | undefined {
  if (side === 'value') {
    const [mix, unmix] = [codebook.transform('value.mix', layer), codebook.transform('value.unmix', layer)]
    return mix && unmix && [mix.slice(), unmix.slice()]
  }
  const order = codebook.transform('key.group', layer)
  if (order === undefined) return undefined
  const { kvHeads, headDim } = codebook
  const [enter, leave] = [new Float32Array(kvHeads * headDim ** 2), new Float32Array(kvHeads * headDim ** 2)]
  for (let head = 0; head < enter.length; head += headDim ** 2) {
    order.forEach((channel, place) => { enter[head + channel * headDim + place] = leave[head + place * headDim + channel] = 1 })
  }
  return [enter, leave]
}

/** As {@link addCoding}, of rows that are coded as x M and read as what M' makes of their codes. */
function addMixed(build: GraphBuilder, site: CodingSite, mix: Float32Array, unmix: Float32Array): string {
  const { rows, headDim } = site
  const through = (value: string, matrices: Float32Array) => {
    const heads = build.floats(matrices, [matrices.length / headDim ** 2, headDim, headDim])
    const headsFirst = build.add('Transpose', [value], { attributes: { perm: [0, 2, 1, 3] } })
    return build.add('Transpose', [build.add('MatMul', [headsFirst, heads])], { attributes: { perm: [0, 2, 1, 3] } })
  }
  return through(addCoding(build, { ...site, rows: through(rows, mix) }), unmix)
}

/** rows [texts][tokens][kvHeads][headDim] -> what their codes stand for, part by part. */
function addCoding(build: GraphBuilder, { rows, headDim, parts, output }: CodingSite): string {
  if (parts.length === 1) return addNearest(build, { part: parts[0]!, headDim, rows, outputs: [output] })
  const split = build.addAll('Split', [rows, build.integers(parts.map(({ heads }) => heads))], { attributes: { axis: 2 }, outputs: parts.length })
  const coded = parts.map((part, index) => addNearest(build, { part, headDim, rows: split[index]! }))
  return build.add('Concat', coded, { attributes: { axis: 2 }, outputs: [output] })
}

interface NearestSite {
  part: CodedPart
  headDim: number
  rows: string
  outputs?: [string]
}

/**
 * Nearest centroids as plain operators. rows [texts][tokens][heads][headDim] -> points [groups of all heads][points][groupChannels];
 * distances, but for |x|^2, as one product of (x, 1) and (-2 C, |C|^2), both relative to the mean centroid: keys have channels whose mean
 * is many times their spread, and there |C|^2 - 2 x.C would cancel.
 */
function addNearest(build: GraphBuilder, { part, headDim, rows, outputs }: NearestSite): string {
  const { groupChannels, centroids } = part.codec
  const groups = (part.heads * headDim) / groupChannels
  const tables = build.input(tablesName(part), DataType.float, [groups, centroids, groupChannels])
  const swap = (value: string) => build.add('Transpose', [value], { attributes: { perm: [1, 0, 2] } })
  const points = swap(build.add('Reshape', [rows, build.integers([-1, groups, groupChannels])]))
  const mean = build.reduce('ReduceMean', tables, [1])
  const metric = part.metric && build.add('Transpose', [build.floats(part.metric, [groups, groupChannels, groupChannels])], { attributes: { perm: [0, 2, 1] } })
  const [centered, near] = [tables, points].map((value) => {
    const difference = build.add('Sub', [value, mean])
    return metric === undefined ? difference : build.add('MatMul', [difference, metric])
  }) as [string, string]
  const append = (value: string, column: string) => build.add('Concat', [value, column], { attributes: { axis: 2 } })
  const norms = build.reduce('ReduceSum', build.add('Mul', [centered, centered]), [2])
  const counts = build.add('Slice', [build.add('Shape', [near]), build.integers([0]), build.integers([2])])
  const sizes = build.add('Concat', [counts, build.integers([1])], { attributes: { axis: 0 } })
  const ones = build.add('Expand', [build.floats(Float32Array.of(1), [1]), sizes])
  const right = append(build.add('Mul', [centered, build.floats(Float32Array.of(-2), [])]), norms)
  const distances = build.matmul(append(near, ones), right, { transB: true })
  const codes = build.add('ArgMin', [distances], { attributes: { axis: 2, keepdims: 0 }, outputs: [codesName(part)] })
  const offsets = build.integers(Array.from({ length: groups }, (_, group) => group * centroids), [groups, 1])
  const flat = build.add('Reshape', [tables, build.integers([-1, groupChannels])])
  const decoded = build.add('Gather', [flat, build.add('Add', [codes, offsets])], { attributes: { axis: 0 } })
  return build.add('Reshape', [swap(decoded), build.add('Shape', [rows])], outputs ? { outputs } : {})
}

interface CodedRows {
  /** [groups][points] */
  codes: BigInt64Array
  /** float32 [points][groups][groupChannels], points rowStride elements apart. */
  rows: Float32Array
  rowStride: number
  groups: number
  groupChannels: number
  centroids: number
}

/** Adds to every centroid, [groups][centroids][groupChannels], the rows that are coded by it. */
function addByCode(sums: Float32Array, { codes, rows, rowStride, groups, groupChannels, centroids }: CodedRows): void {
  const points = codes.length / groups
  for (let group = 0; group < groups; group++) {
    for (let point = 0; point < points; point++) {
      const to = (group * centroids + Number(codes[group * points + point])) * groupChannels
      const from = point * rowStride + group * groupChannels
      for (let channel = 0; channel < groupChannels; channel++) sums[to + channel]! += rows[from + channel]!
    }
  }
}

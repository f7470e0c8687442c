/** Where attention goes: to the sinks, to the window, or to tokens that would be codes; and what codes make of its outputs. */
import type { Coding, Side } from '../gradient/attention'
import { expandAttention, outputName, probabilitiesName, rowsName, sides } from '../gradient/attention'
import { GraphBuilder } from '../gradient/builder'
import { decoderFeeds, floatsOf } from '../gradient/model'
import { GraphSession } from '../gradient/session'
import type { NativeFeed } from '../native/onnxruntime'
import type { Decoder } from '../onnx/decoder'
import { openDecoder } from '../onnx/decoder'
import { removeUnused } from '../onnx/graph'
import { DataType } from '../onnx/proto'

/** Shares of one head's attention, which add up to 1. */
export interface AttentionShares {
  sinks: number
  window: number
  codes: number
}

export interface LayerMass {
  /** A mean over heads. */
  shares: AttentionShares
  /** Of each kv head, a mean over the query heads that read it. */
  heads: AttentionShares[]
  /** Share beyond the sinks and a window of `windows[i]` tokens, a mean over heads. */
  beyond: number[]
  /**
   * Of each kv head, what codes change of its outputs, sinks and window being exact: sum |output - output on codes|^2 / sum |output|^2. The
   * layer's queries, keys and values are those of full precision. Undefined without a codebook.
   */
  outputErrors?: number[]
}

export interface MassOptions {
  /** First tokens that stay in full precision. */
  sinks: number
  /** Newest tokens that do, the query's own among them. */
  window: number
  /** What codes stand for of rows float32 [tokens][kvHeads][headDim]. */
  coded?: ((rows: Float32Array, layer: number, side: Side) => Promise<Float32Array>) | undefined
  threads?: number | undefined
  signal?: AbortSignal | undefined
  onProgress?: (done: number, total: number) => void
}

export interface AttentionMass {
  /** Windows of {@link LayerMass.beyond}: 0, powers of two and the one asked for, up to the length of a text. */
  windows: number[]
  layers: LayerMass[]
}

const classesInput = 'couplet.classes'
const countedInput = 'couplet.counted'
const massName = (layer: number): string => `couplet.${layer}.mass`
const codedName = (layer: number, side: Side): string => `${rowsName(layer, side)}.coded`
const squaresName = (layer: number, of: 'output' | 'change'): string => `couplet.${layer}.${of}.squares`

/**
 * Exact attention of the queries in the second half of each text, which have half a text and more behind them. A run takes
 * queryHeads * tokens^2 * 4 bytes for the probabilities of a layer.
 *
 * @param path as for DecoderModel.load
 * @param texts token ids, all of the same number, at least 2
 */
export async function attentionMass(path: string, texts: readonly (readonly number[])[], options: MassOptions): Promise<AttentionMass> {
  const { sinks, window, coded, threads = 0, signal, onProgress } = options
  const decoder = await openDecoder(path)
  const { graph, folder, layers, shape } = decoder
  const rowDims = [shape.kvHeads, shape.headDim]
  // Codes are computed between two runs, by encode and decode: in the first one zeros stand for them.
  const input: Coding['coded'] = (build, layer, side) => build.input(codedName(layer, side), DataType.float, [1, 'couplet.tokens', ...rowDims])
  const coding = coded && { sinks, window, isAside: true, coded: input }
  const attentionFeeds = expandAttention(graph, layers, coding)
  const tokens = texts[0]!.length
  const windows = windowsUpTo(tokens, window)
  addOutputs(decoder, coded !== undefined)

  const session = await GraphSession.create(graph, { folder, threads })
  try {
    const fixed = [...attentionFeeds(tokens), classFeed(tokens, sinks, windows), ...(coded ? [countedFeed(tokens)] : [])]
    const masses = layers.map(({ queryHeads }) => new Float64Array(queryHeads * (windows.length + 1)))
    const squares = layers.map(({ kvHeads }) => ({ output: new Float64Array(kvHeads), change: new Float64Array(kvHeads) }))
    const places = layers.flatMap((_, layer) => sides.map((side) => ({ layer, side })))
    const codedFeed = (layer: number, side: Side, data: Float32Array): NativeFeed =>
      ({ name: codedName(layer, side), type: DataType.float, dims: [1, tokens, ...rowDims], data })
    const zeros = coded ? places.map(({ layer, side }) => codedFeed(layer, side, new Float32Array(tokens * shape.kvHeads * shape.headDim))) : []
    const first = [...layers.keys()].map(massName).concat(coded ? places.map(({ layer, side }) => rowsName(layer, side)) : [])
    const second = [...layers.keys()].flatMap((layer) => [squaresName(layer, 'output'), squaresName(layer, 'change')])
    for (const [done, text] of texts.entries()) {
      const feeds = [...decoderFeeds(decoder, [text]), ...fixed]
      const outputs = await session.run([...feeds, ...zeros], signal, first)
      masses.forEach((sum, layer) => { addTo(sum, floatsOf(outputs, massName(layer))) })
      if (coded) {
        const codes: NativeFeed[] = []
        for (const { layer, side } of places) codes.push(codedFeed(layer, side, await coded(floatsOf(outputs, rowsName(layer, side)), layer, side)))
        const compared = await session.run([...feeds, ...codes], signal, second)
        squares.forEach((sums, layer) => {
          for (const of of ['output', 'change'] as const) addTo(sums[of], floatsOf(compared, squaresName(layer, of)))
        })
      }
      onProgress?.(done + 1, texts.length)
    }
    const at = windows.indexOf(Math.min(window, tokens))
    return {
      windows,
      layers: masses.map((sum, layer) => ({
        ...layerMass(sum, { kvHeads: layers[layer]!.kvHeads, windows, at }),
        ...(coded && { outputErrors: Array.from(squares[layer]!.change, (change, head) => (change === 0 ? 0 : change / squares[layer]!.output[head]!)) }),
      })),
    }
  } finally {
    session.dispose()
  }
}

function addTo(sums: Float64Array, values: Float32Array): void {
  values.forEach((value, i) => { sums[i]! += value })
}

/** The sums that are wanted in place of logits; with `isCoded`, keys and values as well. */
function addOutputs({ graph, layers }: Decoder, isCoded: boolean): void {
  const build = new GraphBuilder(graph, 'couplet.mass')
  graph.graph.output = []
  build.input(classesInput, DataType.float, ['couplet.pairs', 'couplet.classes'])
  if (isCoded) build.input(countedInput, DataType.float, ['couplet.tokens', 1])
  for (const [layer, { queryHeads, kvHeads, headDim }] of layers.entries()) {
    const flat = build.add('Reshape', [probabilitiesName(layer), build.integers([queryHeads, -1])])
    build.output(build.add('MatMul', [flat, classesInput]), massName(layer))
    if (!isCoded) continue
    for (const side of sides) build.declare(rowsName(layer, side))
    const counted = (output: string) =>
      build.add('Mul', [build.add('Reshape', [output, build.integers([kvHeads, queryHeads / kvHeads, -1, headDim])]), countedInput])
    const [exact, coded] = [outputName(layer, 'exact'), outputName(layer, 'coded')]
    for (const [of, value] of [['output', exact], ['change', build.add('Sub', [exact, coded])]] as const) {
      const rows = counted(value)
      build.output(build.reduce('ReduceSum', build.add('Mul', [rows, rows]), [1, 2, 3]), squaresName(layer, of))
    }
  }
  graph.graph.node.push(...build.take())
  removeUnused(graph)
}

/** Windows whose share is wanted: ascending, the first 0, the last one all tokens. */
function windowsUpTo(tokens: number, window: number): number[] {
  const all = [0, Math.min(window, tokens), tokens]
  for (let size = 1; size < tokens; size *= 2) all.push(size)
  return [...new Set(all)].sort((a, b) => a - b)
}

/**
 * A column for each class of a pair (query, token), 1 in one of them for queries that count: the sinks, then distances from
 * windows[i] to windows[i + 1] - 1. float32 [tokens * tokens][windows.length + 1], the last column empty.
 */
function classFeed(tokens: number, sinks: number, windows: readonly number[]): NativeFeed {
  const classes = windows.length + 1
  const data = new Float32Array(tokens * tokens * classes)
  for (let query = Math.floor(tokens / 2); query < tokens; query++) {
    for (let token = 0; token <= query; token++) {
      const distance = query - token
      const own = token < sinks ? 0 : windows.findLastIndex((from) => from <= distance) + 1
      data[(query * tokens + token) * classes + own] = 1
    }
  }
  return { name: classesInput, type: DataType.float, dims: [tokens * tokens, classes], data }
}

/** 1 for queries that count: float32 [tokens][1]. */
function countedFeed(tokens: number): NativeFeed {
  return { name: countedInput, type: DataType.float, dims: [tokens, 1], data: new Float32Array(tokens).fill(1, Math.floor(tokens / 2)) }
}

/** @param sum [queryHeads][sinks, then distances from each window on] */
function layerMass(sum: Float64Array, { kvHeads, windows, at }: { kvHeads: number; windows: readonly number[]; at: number }): LayerMass {
  const classes = windows.length + 1
  const queryHeads = sum.length / classes
  const byHead = Array.from({ length: queryHeads }, (_, head) => {
    const masses = sum.subarray(head * classes, (head + 1) * classes)
    const total = masses.reduce((a, b) => a + b, 0)
    const beyond = windows.map((_, i) => masses.subarray(i + 1).reduce((a, b) => a + b, 0) / total)
    return { sinks: masses[0]! / total, window: beyond[0]! - beyond[at]!, codes: beyond[at]!, beyond }
  })
  const mean = (heads: readonly AttentionShares[]): AttentionShares => {
    const of = (name: keyof AttentionShares) => heads.reduce((all, head) => all + head[name], 0) / heads.length
    return { sinks: of('sinks'), window: of('window'), codes: of('codes') }
  }
  const repeats = queryHeads / kvHeads
  return {
    shares: mean(byHead),
    heads: Array.from({ length: kvHeads }, (_, head) => mean(byHead.slice(head * repeats, (head + 1) * repeats))),
    beyond: windows.map((_, i) => byHead.reduce((all, { beyond }) => all + beyond[i]!, 0) / queryHeads),
  }
}

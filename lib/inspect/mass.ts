/** Where attention goes: to the sinks, to the window, or to tokens that would be codes. */
import { expandAttention, probabilitiesName } from '../gradient/attention'
import { GraphBuilder } from '../gradient/builder'
import { decoderFeeds, floatsOf } from '../gradient/model'
import { GraphSession } from '../gradient/session'
import type { NativeFeed } from '../native/onnxruntime'
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
}

export interface MassOptions {
  /** First tokens that stay in full precision. */
  sinks: number
  /** Newest tokens that do, the query's own among them. */
  window: number
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
const massName = (layer: number): string => `couplet.${layer}.mass`

/**
 * Exact attention of the queries in the second half of each text, which have half a text and more behind them. A run takes
 * queryHeads * tokens^2 * 4 bytes for the probabilities of a layer.
 *
 * @param path as for DecoderModel.load
 * @param texts token ids, all of the same number, at least 2
 */
export async function attentionMass(path: string, texts: readonly (readonly number[])[], options: MassOptions): Promise<AttentionMass> {
  const { sinks, window, threads = 0, signal, onProgress } = options
  const decoder = await openDecoder(path)
  const { graph, folder, layers } = decoder
  const attentionFeeds = expandAttention(graph, layers)
  const tokens = texts[0]!.length
  const windows = windowsUpTo(tokens, window)
  const build = new GraphBuilder(graph, 'couplet.mass')
  graph.graph.output = []
  build.input(classesInput, DataType.float, ['couplet.pairs', 'couplet.classes'])
  for (const [layer, { queryHeads }] of layers.entries()) {
    const flat = build.add('Reshape', [probabilitiesName(layer), build.integers([queryHeads, -1])])
    build.output(build.add('MatMul', [flat, classesInput]), massName(layer))
  }
  graph.graph.node.push(...build.take())
  removeUnused(graph)

  const session = await GraphSession.create(graph, { folder, threads })
  try {
    const classes = classFeed(tokens, sinks, windows)
    const sums = layers.map(({ queryHeads }) => new Float64Array(queryHeads * (windows.length + 1)))
    for (const [done, text] of texts.entries()) {
      const outputs = await session.run([...decoderFeeds(decoder, [text]), ...attentionFeeds(tokens), classes], signal)
      sums.forEach((sum, layer) => { floatsOf(outputs, massName(layer)).forEach((mass, i) => { sum[i]! += mass }) })
      onProgress?.(done + 1, texts.length)
    }
    const at = windows.indexOf(Math.min(window, tokens))
    return { windows, layers: sums.map((sum, layer) => layerMass(sum, { kvHeads: layers[layer]!.kvHeads, windows, at })) }
  } finally {
    session.dispose()
  }
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

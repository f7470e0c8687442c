/**
 * Attention as plain operators, so that it has a gradient: every couplet.Attention node of a rewritten graph is expanded. Runs
 * are whole texts: every row of a batch is a fresh sequence, and all rows have as many tokens.
 */
import type { NativeFeed } from '../native/onnxruntime'
import { attribute } from '../onnx/graph'
import type { Model, NodeProto } from '../onnx/proto'
import { DataType } from '../onnx/proto'
import { runInput } from '../onnx/rewrite'
import type { AttentionLayer } from '../onnx/rewrite'
import type { RotaryTables } from '../onnx/rotary'
import { GraphBuilder } from './builder'

export type Side = 'key' | 'value'
export const sides: readonly Side[] = ['key', 'value']

/** Name of the keys (before rotary embedding) or values of a layer: float32 [rows][tokens][kvHeads][headDim]. */
export function rowsName(layer: number, side: Side): string {
  return `couplet.${layer}.${side}`
}

/** Name of the softmax that a layer goes on with, the column of learned sinks left out: float32 [rows][kvHeads][repeats * tokens][tokens]. */
export function probabilitiesName(layer: number): string {
  return `couplet.${layer}.probabilities`
}

/** Names of a layer's outputs by `Coding.isAside`: float32 [rows][kvHeads][repeats * tokens][headDim]. */
export function outputName(layer: number, version: 'exact' | 'coded'): string {
  return `couplet.${layer}.output.${version}`
}

export interface Coding {
  /** Adds nodes that code the value `rows` and decode it again: same shape. */
  coded(build: GraphBuilder, layer: number, side: Side, rows: string): string
  /** What a query reads as it is, as in evaluate: the first tokens, and the last ones with itself among them. */
  sinks: number
  window: number
  /** Layers go on with exact outputs, and both versions are there to be compared. Default: they go on with what codes give. */
  isAside?: boolean
}

/** What does not fit into a logit's bias: far below every logit, and finite, so that nothing becomes NaN. */
const masked = -1e30

/**
 * Expands all attention of a rewritten graph in place. With `coding`, a query reads tokens from their codes, as `evaluate` has
 * it; without, all is in full precision.
 * @returns makes the feeds that the expanded graph needs for texts of `tokens` tokens each.
 */
export function expandAttention(model: Model, layers: readonly AttentionLayer[], coding?: Coding): (tokens: number) => NativeFeed[] {
  const { graph } = model
  const build = new GraphBuilder(model, 'couplet.attention')
  const feeds = new Feeds(build)
  graph.input = graph.input.filter(({ name }) => name !== runInput)
  graph.node = graph.node.flatMap((node) => {
    if (node.domain !== 'couplet' || node.opType !== 'Attention') return [node]
    const number = Number(attribute(node, 'layer')!.i)
    expand(node, { build, feeds, layer: layers[number]!, number, ...(coding && { coding }) })
    return build.take()
  })
  return (tokens) => feeds.make(tokens)
}

interface Context {
  build: GraphBuilder
  feeds: Feeds
  layer: AttentionLayer
  number: number
  coding?: Coding
}

/**
 * With repeats = queryHeads / kvHeads, the query heads of a kv head stand below one another:
 * queries [rows][kvHeads][repeats * tokens][headDim] x keys [rows][kvHeads][headDim][tokens] -> logits
 * [rows][kvHeads][repeats * tokens][tokens] -> probabilities x values [rows][kvHeads][tokens][headDim].
 */
function expand(node: NodeProto, { build, feeds, layer, number, coding }: Context): void {
  const { queryHeads, kvHeads, headDim, rotary, softcap, headSinks } = layer
  const repeats = queryHeads / kvHeads
  const reshape = (value: string, dims: number[]) => build.add('Reshape', [value, build.integers(dims)])
  const headsFirst = (value: string) => build.add('Transpose', [value], { attributes: { perm: [0, 2, 1, 3] } })
  const rotate = (value: string) => (rotary ? rotated(build, feeds, value, rotary, headDim) : value)

  const [, query = '', key, value] = node.input
  const widths = [queryHeads, kvHeads, kvHeads].map((heads) => heads * headDim)
  const parts = key && value ? [query, key, value] : build.addAll('Split', [query, build.integers(widths)], { attributes: { axis: 2 }, outputs: 3 })
  const scale = layer.scale === 0 ? 1 / Math.sqrt(headDim) : layer.scale
  const turned = rotate(headsFirst(reshape(parts[0]!, [0, 0, queryHeads, headDim])))
  const queries = reshape(build.add('Mul', [turned, build.floats(Float32Array.of(scale), [])]), [0, kvHeads, -1, headDim])
  const split = build.integers([0, 0, kvHeads, headDim])
  const rows = (part: string, side: Side) => build.add('Reshape', [part, split], { outputs: [rowsName(number, side)] })
  const exact = { key: rows(parts[1]!, 'key'), value: rows(parts[2]!, 'value') }
  const codedRows = coding && { key: coding.coded(build, number, 'key', exact.key), value: coding.coded(build, number, 'value', exact.value) }
  const kept = coding && coding.sinks + coding.window > 0 ? build.cast(feeds.keptMask(repeats, coding), DataType.bool) : undefined

  const logitsOf = (keys: string) => build.matmul(queries, rotate(headsFirst(keys)), { transB: true })
  const column = (value: string, count: number) => build.add('Pad', [value, build.integers([0, 0, 0, 0, 0, 0, 0, count])])
  const softmaxOf = (logits: string): string => {
    if (softcap > 0) {
      const cap = build.floats(Float32Array.of(softcap), [])
      logits = build.add('Mul', [build.add('Tanh', [build.add('Div', [logits, cap])]), cap])
    }
    const bias = feeds.bias(layer, repeats)
    const softmax = build.add('Softmax', [build.add('Add', [headSinks ? column(logits, 1) : logits, bias])], { attributes: { axis: -1 } })
    return headSinks ? column(softmax, -1) : softmax
  }
  const sum = (part: string, values: string) => build.add('MatMul', [part, headsFirst(values)])
  const attend = (coded: Record<Side, string> | undefined): { probabilities: string; output: string } => {
    if (kept === undefined || coded === undefined) {
      const { key: keys, value: values } = coded ?? exact
      const probabilities = softmaxOf(logitsOf(keys))
      return { probabilities, output: sum(probabilities, values) }
    }
    const probabilities = softmaxOf(build.add('Where', [kept, logitsOf(exact.key), logitsOf(coded.key)]))
    const zero = build.floats(Float32Array.of(0), [])
    const share = (...branches: [string, string]) => build.add('Where', [kept, ...branches])
    return { probabilities, output: build.add('Add', [sum(share(probabilities, zero), exact.value), sum(share(zero, probabilities), coded.value)]) }
  }

  const { probabilities, output } = attend(coding?.isAside ? undefined : codedRows)
  build.add('Identity', [probabilities], { outputs: [probabilitiesName(number)] })
  if (coding?.isAside) {
    build.add('Identity', [output], { outputs: [outputName(number, 'exact')] })
    build.add('Identity', [attend(codedRows).output], { outputs: [outputName(number, 'coded')] })
  }
  const joined = headsFirst(reshape(output, [0, queryHeads, -1, headDim]))
  build.add('Reshape', [joined, build.integers([0, 0, queryHeads * headDim])], { outputs: [node.output[0]!] })
}

/** x cos + (x S) sin for [rows][heads][tokens][headDim], S the signed permutation that pairs channels. */
function rotated(build: GraphBuilder, feeds: Feeds, value: string, tables: RotaryTables, headDim: number): string {
  const { cos, sin, pairing } = feeds.rotary(tables, headDim)
  return build.add('Add', [build.add('Mul', [value, cos]), build.add('Mul', [build.add('MatMul', [value, pairing]), sin])])
}

/** The two channels of rotary pair i. */
function pairOf({ kind, dim }: RotaryTables, i: number): [number, number] {
  return kind === 'half' ? [i, i + dim / 2] : [2 * i, 2 * i + 1]
}

/** Graph inputs that depend on the number of tokens alone; layers that need the same ones share them. */
class Feeds {
  readonly #build: GraphBuilder
  readonly #makers = new Map<string, (tokens: number) => Pick<NativeFeed, 'dims' | 'data'>>()
  readonly #names = new Map<unknown, string>()
  readonly #pairings = new Map<string, string>()

  constructor(build: GraphBuilder) {
    this.#build = build
  }

  make(tokens: number): NativeFeed[] {
    return Array.from(this.#makers, ([name, maker]) => ({ name, type: DataType.float, ...maker(tokens) }))
  }

  rotary(tables: RotaryTables, headDim: number): { cos: string; sin: string; pairing: string } {
    const pairs = tables.dim / 2
    const maker = (side: 'cos' | 'sin') => (tokens: number) => {
      const data = new Float32Array(tokens * headDim).fill(side === 'cos' ? 1 : 0) // channels beyond dim stay as they are
      for (let t = 0; t < tokens; t++) {
        for (let i = 0; i < pairs; i++) for (const channel of pairOf(tables, i)) data[t * headDim + channel] = tables[side][t * pairs + i]!
      }
      return { dims: [tokens, headDim], data }
    }
    const input = (side: 'cos' | 'sin') => this.#input(tables[side], side, ['couplet.tokens', headDim], maker(side))
    return { cos: input('cos'), sin: input('sin'), pairing: this.#pairing(tables, headDim) }
  }

  /** What is added to logits: 0, or far below for tokens that a query must not see; with sinks, their logit in one more column. */
  bias({ kvHeads, localWindow, headSinks }: AttentionLayer, repeats: number): string {
    const heads = headSinks ? kvHeads : 1
    const extra = headSinks ? 1 : 0
    const name = `bias.${repeats}.${localWindow}.${headSinks?.join() ?? ''}`
    return this.#input(name, 'bias', [heads, 'couplet.queries', 'couplet.seen'], (tokens) => {
      const columns = tokens + extra
      const data = new Float32Array(heads * repeats * tokens * columns).fill(masked)
      for (let line = 0; line < heads * repeats * tokens; line++) {
        const query = line % tokens
        const first = localWindow > 0 ? Math.max(0, query - localWindow + 1) : 0
        data.fill(0, line * columns + first, line * columns + query + 1)
        if (headSinks) data[line * columns + tokens] = headSinks[Math.floor(line / tokens)]!
      }
      return { dims: [heads, repeats * tokens, columns], data }
    })
  }

  /** 1 where a query reads a token as it is. */
  keptMask(repeats: number, { sinks, window }: Coding): string {
    return this.#input(`kept.${repeats}`, 'kept', ['couplet.queries', 'couplet.tokens'], (tokens) => {
      const data = new Float32Array(repeats * tokens * tokens)
      for (let line = 0; line < repeats * tokens; line++) {
        const query = line % tokens
        data.fill(1, line * tokens, line * tokens + Math.min(sinks, tokens))
        data.fill(1, line * tokens + Math.max(0, query - window + 1), line * tokens + query + 1)
      }
      return { dims: [repeats * tokens, tokens], data }
    })
  }

  #pairing(tables: RotaryTables, headDim: number): string {
    const key = `${tables.kind} ${tables.dim} ${headDim}`
    let name = this.#pairings.get(key)
    if (name === undefined) {
      const matrix = new Float32Array(headDim * headDim)
      for (let i = 0; i < tables.dim / 2; i++) {
        const [first, second] = pairOf(tables, i)
        matrix[second * headDim + first] = -1
        matrix[first * headDim + second] = 1
      }
      this.#pairings.set(key, (name = this.#build.floats(matrix, [headDim, headDim])))
    }
    return name
  }

  /** `key` tells inputs apart: equal keys share one. */
  #input(key: unknown, kind: string, dims: (number | string)[], maker: (tokens: number) => Pick<NativeFeed, 'dims' | 'data'>): string {
    let name = this.#names.get(key)
    if (name === undefined) {
      name = `couplet.${kind}.${this.#names.size}`
      this.#build.input(name, DataType.float, dims)
      this.#names.set(key, name)
      this.#makers.set(name, maker)
    }
    return name
  }
}

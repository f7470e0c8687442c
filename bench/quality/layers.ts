/**
 * A decoder graph cut at its attention, so that JavaScript can stand between the layers: stage l is what onnxruntime computes
 * between the attention of layer l - 1 and that of layer l. For evaluation only; the product runs the whole graph in one session.
 */
import { create } from '@bufbuild/protobuf'
import * as ort from 'onnxruntime-node'
import { float32FromFloat16 } from '../../lib/float16'
import { type Decoder, openDecoder } from '../../lib/onnx/decoder'
import { feedsOf, type GraphInputs, knownInputs } from '../../lib/onnx/feeds'
import { attribute, valuesRead } from '../../lib/onnx/graph'
import { encodeModel, GraphSchema, type Model, type NodeProto, ValueInfoSchema } from '../../lib/onnx/proto'
import { type AttentionLayer, runInput } from '../../lib/onnx/rewrite'

/** Rows of one layer: float32 [heads][tokens][channels]. */
export interface Rows {
  readonly data: Float32Array
  readonly heads: number
  readonly tokens: number
  readonly channels: number
}

/** What stands where the attention of a layer stood: queries, keys (before rotary) and values of all tokens to outputs [queryHeads][tokens][channels]. */
export type Attend = (layer: number, rows: { query: Rows; key: Rows; value: Rows }) => Promise<Float32Array>

interface Stage {
  session: ort.InferenceSession
  /** Tensors that the session takes from the graph's inputs or from earlier stages. */
  inputs: readonly string[]
}

export class LayeredModel {
  /** Of the rewritten graph, in the order of their numbers. */
  readonly layers: readonly AttentionLayer[]
  readonly #stages: readonly Stage[]
  readonly #attention: readonly NodeProto[]
  readonly #inputs: GraphInputs

  private constructor(layers: readonly AttentionLayer[], stages: readonly Stage[], attention: readonly NodeProto[], inputs: GraphInputs) {
    this.layers = layers
    this.#stages = stages
    this.#attention = attention
    this.#inputs = inputs
  }

  /** @param directory a model that DecoderModel.load accepts, its weights in the file itself */
  static async load(directory: string, threads = 1): Promise<LayeredModel> {
    return LayeredModel.of(await openDecoder(directory), threads)
  }

  static async of({ graph: model, layers, measuredPasts }: Pick<Decoder, 'graph' | 'layers' | 'measuredPasts'>, threads = 1): Promise<LayeredModel> {
    const isAttention = (node: NodeProto) => node.domain === 'couplet'
    const numberOf = (node: NodeProto) => Number(attribute(node, 'layer')?.i ?? 0)
    const attention = model.graph.node.filter(isAttention).sort((a, b) => numberOf(a) - numberOf(b))
    const stageOf = assignStages(model, isAttention)
    attention.forEach((node, layer) => {
      if (stageOf.get(node) !== layer) throw new Error(`attention ${layer} does not follow attention ${layer - 1}: this graph cannot be cut`)
    })

    const types = new Map(model.graph.input.map(({ name, type }) => [name, type?.tensorType?.elemType ?? 0]))
    const stages: Stage[] = []
    for (let number = 0; number <= attention.length; number++) {
      const nodes = model.graph.node.filter((node) => !isAttention(node) && stageOf.get(node) === number)
      const later = model.graph.node.filter((node) => isAttention(node) ? numberOf(node) >= number : stageOf.get(node)! > number)
      const wanted = new Set([...later.flatMap(valuesRead), ...model.graph.output.map(({ name }) => name)])
      const stage = await createStage(model, nodes, wanted, types, threads)
      stages.push(stage)
      stage.session.outputMetadata.forEach((value) => { if (value.isTensor) types.set(value.name, elementTypes[value.type] ?? 0) })
      const next = attention[number]
      if (next) types.set(next.output[0]!, 1)
    }
    const names = model.graph.input.map(({ name }) => name).filter((name) => knownInputs.includes(name))
    return new LayeredModel(layers, stages, attention, { names, measuredPasts, kvHeads: layers[0]!.kvHeads })
  }

  /** Logits of all tokens of a fresh sequence: float32 [tokens][vocabulary]. */
  async run(tokens: ArrayLike<number>, attend: Attend): Promise<Float32Array> {
    const values = new Map(feedsOf(this.#inputs, [{ past: 0, tokens }], false)
      .map(({ name, type, data, dims }) => [name, type === 7 ? new ort.Tensor('int64', data, dims) : emptyTensor(type, dims)]))
    for (const [number, { session, inputs }] of this.#stages.entries()) {
      if (session.outputNames.length > 0) {
        const results = await session.run(Object.fromEntries(inputs.map((name) => [name, values.get(name)!])))
        for (const [name, tensor] of Object.entries(results)) values.set(name, tensor)
      }
      const node = this.#attention[number]
      if (node) values.set(node.output[0]!, await this.#attend(number, node, values, tokens.length, attend))
    }
    const logits = values.get('logits')!.data
    return logits instanceof Float32Array ? logits : float32FromFloat16(logits as Uint16Array)
  }

  async release(): Promise<void> {
    for (const { session } of this.#stages) await session.release()
  }

  async #attend(number: number, node: NodeProto, values: Map<string, ort.Tensor>, tokens: number, attend: Attend): Promise<ort.Tensor> {
    const { queryHeads, kvHeads, headDim } = this.layers[number]!
    const [query, key, value] = node.input.filter((name) => name !== '' && name !== runInput).map((name) => values.get(name)!.data as Float32Array)
    const packed = !key || !value
    const width = packed ? (queryHeads + 2 * kvHeads) * headDim : queryHeads * headDim
    const rows = (data: Float32Array, stride: number, heads: number, first: number) => headsFirst(data, { stride, heads, first, tokens, channels: headDim })
    const outputs = await attend(number, {
      query: rows(query!, width, queryHeads, 0),
      key: packed ? rows(query!, width, kvHeads, queryHeads * headDim) : rows(key, kvHeads * headDim, kvHeads, 0),
      value: packed ? rows(query!, width, kvHeads, (queryHeads + kvHeads) * headDim) : rows(value, kvHeads * headDim, kvHeads, 0),
    })
    return new ort.Tensor('float32', tokensFirst(outputs, queryHeads, tokens, headDim), [1, tokens, queryHeads * headDim])
  }
}

/** The stage in which each node can run: after all attention that it depends on. */
function assignStages({ graph }: Model, isAttention: (node: NodeProto) => boolean): Map<NodeProto, number> {
  const ofValue = new Map<string, number>()
  const stages = new Map<NodeProto, number>()
  for (const node of graph.node) { // in topological order, as ONNX asks
    const stage = Math.max(0, ...valuesRead(node).map((value) => ofValue.get(value) ?? 0))
    stages.set(node, stage)
    for (const value of node.output) ofValue.set(value, isAttention(node) ? stage + 1 : stage)
  }
  return stages
}

async function createStage(model: Model, nodes: NodeProto[], wanted: Set<string>, types: Map<string, number>, threads: number): Promise<Stage> {
  const made = new Set(nodes.flatMap(({ output }) => output))
  const read = new Set(nodes.flatMap(valuesRead))
  const inputs = [...read].filter((name) => !made.has(name) && !model.initializers.has(name))
  const outputs = [...made].filter((name) => wanted.has(name))
  const graph = create(GraphSchema, {
    name: 'stage',
    node: nodes,
    input: inputs.map((name) => model.graph.input.find((input) => input.name === name)
      ?? create(ValueInfoSchema, { name, type: { tensorType: { elemType: types.get(name) ?? 0 } } })),
    output: outputs.map((name) => create(ValueInfoSchema, { name })),
  })
  const initializers = new Map([...model.initializers].filter(([name]) => read.has(name)))
  const options = { intraOpNumThreads: threads, interOpNumThreads: 1, logSeverityLevel: 3 as const }
  return { session: await ort.InferenceSession.create(encodeModel({ head: model.head, graph, initializers }), options), inputs }
}

/** By the names of onnxruntime-node: TensorProto.DataType. */
const elementTypes: Record<string, number> = { float32: 1, int32: 6, int64: 7, bool: 9, float16: 10 }

function emptyTensor(type: number, dims: number[]): ort.Tensor {
  return type === 10 ? new ort.Tensor('float16', new Uint16Array(0), dims) : new ort.Tensor('float32', new Float32Array(0), dims)
}

interface Slice { stride: number; heads: number; first: number; tokens: number; channels: number }

/** [tokens][stride], from channel `first` on, to [heads][tokens][channels]. */
function headsFirst(data: Float32Array, { stride, heads, first, tokens, channels }: Slice): Rows {
  const out = new Float32Array(heads * tokens * channels)
  for (let head = 0; head < heads; head++) {
    for (let token = 0; token < tokens; token++) {
      const from = token * stride + first + head * channels
      out.set(data.subarray(from, from + channels), (head * tokens + token) * channels)
    }
  }
  return { data: out, heads, tokens, channels }
}

function tokensFirst(data: Float32Array, heads: number, tokens: number, channels: number): Float32Array {
  const out = new Float32Array(data.length)
  for (let head = 0; head < heads; head++) {
    for (let token = 0; token < tokens; token++) {
      const from = (head * tokens + token) * channels
      out.set(data.subarray(from, from + channels), (token * heads + head) * channels)
    }
  }
  return out
}

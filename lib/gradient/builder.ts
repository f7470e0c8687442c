/** Adds nodes and constants to a graph, with names that nothing else has. */
import { create } from '@bufbuild/protobuf'

import type { AttributeProto, Model, NodeProto } from '../onnx/proto'
import { AttributeType, createNode, DataType, encodeTensor, OperatorSetSchema, ValueInfoSchema } from '../onnx/proto'

/** A whole number, whole numbers, a float, or a text. */
export type Attributes = Record<string, number | readonly number[] | { float: number } | { text: string }>

export interface NodeOptions {
  attributes?: Attributes
  domain?: string
  /** Names of the outputs, or how many; default 1. */
  outputs?: readonly string[] | number
}

/**
 * Nodes are collected in the order in which they are made, until `take` hands them over. `prefix` begins the name of all
 * that a builder makes; two builders of one model need two prefixes.
 */
export class GraphBuilder {
  /** Of the operators of ONNX itself. */
  readonly opset: number
  readonly #model: Model
  readonly #prefix: string
  readonly #constants = new Map<string, string>()
  #nodes: NodeProto[] = []
  #count = 0

  constructor(model: Model, prefix: string) {
    this.#model = model
    this.#prefix = prefix
    this.opset = Number(model.head.opsetImport.find(({ domain }) => domain === '' || domain === 'ai.onnx')?.version ?? 0n)
    if (!model.head.opsetImport.some(({ domain }) => domain === 'com.microsoft')) {
      model.head.opsetImport.push(create(OperatorSetSchema, { domain: 'com.microsoft', version: 1n }))
    }
  }

  /** All nodes made since the last call. */
  take(): NodeProto[] {
    const nodes = this.#nodes
    this.#nodes = []
    return nodes
  }

  /** Adds a node and returns the name of its first output. */
  add(opType: string, input: readonly string[], options: NodeOptions = {}): string {
    return this.addAll(opType, input, options)[0]!
  }

  /** Adds a node and returns the names of its outputs. */
  addAll(opType: string, input: readonly string[], { attributes = {}, domain = '', outputs = 1 }: NodeOptions = {}): string[] {
    const name = `${this.#prefix}.${this.#count++}.${opType}`
    const output = typeof outputs === 'number' ? Array.from({ length: outputs }, (_, i) => (i === 0 ? name : `${name}.${i}`)) : [...outputs]
    const attribute = Object.entries(attributes).map(toAttribute)
    this.#nodes.push(createNode({ name, opType, domain, input: [...input], output, attribute }))
    return output
  }

  /** com.microsoft.FusedMatMul: alpha * op(a) op(b), where op may swap the last two axes; works for any number of axes. */
  matmul(a: string, b: string, { transA = false, transB = false, alpha = 1 } = {}): string {
    if (!transA && !transB && alpha === 1) return this.add('MatMul', [a, b])
    return this.add('FusedMatMul', [a, b], {
      domain: 'com.microsoft',
      attributes: { transA: Number(transA), transB: Number(transB), alpha: { float: alpha } },
    })
  }

  /** Sum or mean over axes, which stay with one element. */
  reduce(opType: 'ReduceSum' | 'ReduceMean', value: string, axes: readonly number[]): string {
    const byInput = opType === 'ReduceSum' || this.opset >= 18
    return byInput
      ? this.add(opType, [value, this.integers(axes)], { attributes: { keepdims: 1 } })
      : this.add(opType, [value], { attributes: { keepdims: 1, axes } })
  }

  cast(value: string, to: number): string {
    return this.add('Cast', [value], { attributes: { to } })
  }

  /** A constant of the element type that `like` has. */
  scalar(value: number, like: string): string {
    return this.add('CastLike', [this.floats(Float32Array.of(value), []), like])
  }

  /** The constant int64 [values], or of other dimensions. */
  integers(values: readonly number[], dims: readonly number[] = [values.length]): string {
    return this.#constant(DataType.int64, new Uint8Array(BigInt64Array.from(values, BigInt).buffer), dims)
  }

  floats(values: Float32Array, dims: readonly number[]): string {
    return this.#constant(DataType.float, new Uint8Array(values.buffer, values.byteOffset, values.byteLength), dims)
  }

  bytes(values: Uint8Array, dims: readonly number[]): string {
    return this.#constant(DataType.uint8, values, dims)
  }

  /** Declares a graph input; a dimension without a number has a name. */
  input(name: string, elemType: number, dims: readonly (number | string)[]): string {
    this.#model.graph.input.push(tensorInfo(name, elemType, dims))
    return name
  }

  /** Makes a value an output of the graph, under a name of its own. */
  output(value: string, name: string, elemType: number = DataType.float): void {
    this.add('Identity', [value], { outputs: [name] })
    this.declare(name, elemType)
  }

  /** Makes a value an output of the graph, under the name that it has. */
  declare(name: string, elemType: number = DataType.float): void {
    this.#model.graph.output.push(tensorInfo(name, elemType))
  }

  #constant(dataType: number, rawData: Uint8Array, dims: readonly number[]): string {
    const small = rawData.length <= 64
    const key = `${dataType}[${dims.join()}]${small ? rawData.join() : ''}`
    const known = small ? this.#constants.get(key) : undefined
    if (known !== undefined) return known
    const name = `${this.#prefix}.${this.#count++}.constant`
    this.#model.initializers.set(name, encodeTensor({ name, dims: dims.map(BigInt), dataType, rawData }))
    if (small) this.#constants.set(key, name)
    return name
  }
}

function tensorInfo(name: string, elemType: number, dims?: readonly (number | string)[]): ReturnType<typeof create<typeof ValueInfoSchema>> {
  const shape = dims && { dim: dims.map((dim) => (typeof dim === 'string' ? { dimParam: dim } : { dimValue: BigInt(dim) })) }
  return create(ValueInfoSchema, { name, type: { tensorType: { elemType, ...(shape && { shape }) } } })
}

function toAttribute([name, value]: [string, Attributes[string]]): { name: string; type: number } & Partial<Pick<AttributeProto, 'f' | 'i' | 's' | 'ints'>> {
  if (typeof value === 'number') return { name, i: BigInt(value), type: AttributeType.int }
  if ('float' in value) return { name, f: value.float, type: AttributeType.float }
  if ('text' in value) return { name, s: new TextEncoder().encode(value.text), type: AttributeType.string }
  return { name, ints: value.map(BigInt), type: AttributeType.ints }
}

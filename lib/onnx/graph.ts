/** Who makes and who reads each value of a graph, and the removal of what nothing reads any more. */
import type { AttributeProto, GraphProto, Model, NodeProto, TensorProto } from './proto'
import { decodeTensor } from './proto'

/** Producers and readers of the values of a model's main graph, as they are when the index is built. */
export class GraphIndex {
  readonly #producers = new Map<string, NodeProto>()
  readonly #readers = new Map<string, NodeProto[]>()
  readonly #inputs: Set<string>
  readonly #outputs: Set<string>

  constructor(readonly model: Model) {
    const { graph, initializers } = model
    this.#inputs = new Set(graph.input.map(({ name }) => name).filter((name) => !initializers.has(name)))
    this.#outputs = new Set(graph.output.map(({ name }) => name))
    for (const node of graph.node) {
      for (const value of node.output) this.#producers.set(value, node)
      for (const value of valuesRead(node)) this.#readers.set(value, [...this.readers(value), node])
    }
  }

  producer(value: string): NodeProto | undefined {
    return this.#producers.get(value)
  }

  /** The nodes that read `value`, one of them for each time. */
  readers(value: string): readonly NodeProto[] {
    return this.#readers.get(value) ?? []
  }

  /** Whether more than one node or graph output reads `value`. */
  isShared(value: string): boolean {
    return this.readers(value).length + (this.#outputs.has(value) ? 1 : 0) > 1
  }

  /** Whether the caller of the graph has to give `value`. */
  isInput(value: string): boolean {
    return this.#inputs.has(value)
  }

  /** The tensor that `value` always is: an initializer or a Constant node's, through Identity nodes. */
  constant(value: string): TensorProto | undefined {
    const initializer = this.model.initializers.get(value)
    if (initializer) return decodeTensor(initializer)
    const node = this.producer(value)
    if (node?.opType === 'Identity' && node.domain === '') return this.constant(node.input[0]!)
    if (node?.opType === 'Constant' && node.domain === '') return attribute(node, 'value')?.t
    return undefined
  }

  /** Element type and dimensions that the graph declares for one of its inputs, outputs or intermediate values; 0 is unknown. */
  declared(value: string): { type: number; dims: number[] } | undefined {
    const { input, output, valueInfo } = this.model.graph
    const tensor = [input, output, valueInfo].flatMap((infos) => infos.filter(({ name }) => name === value))[0]?.type?.tensorType
    return tensor && { type: tensor.elemType, dims: (tensor.shape?.dim ?? []).map(({ dimValue }) => Number(dimValue)) }
  }
}

export function attribute(node: NodeProto, name: string): AttributeProto | undefined {
  return node.attribute.find((candidate) => candidate.name === name)
}

/** Every value that a node reads: its inputs, and what its subgraphs take from outside. */
export function valuesRead(node: NodeProto): string[] {
  const values = node.input.filter((value) => value !== '')
  for (const graph of subgraphs(node)) values.push(...valuesCaptured(graph))
  return values
}

/** The graphs inside a node: the branches of an If, the body of a Loop or a Scan. */
export function subgraphs(node: NodeProto): GraphProto[] {
  return node.attribute.flatMap(({ g, graphs }) => (g ? [g, ...graphs] : graphs))
}

function valuesCaptured(graph: GraphProto): string[] {
  const own = new Set([
    ...graph.input.map(({ name }) => name),
    ...graph.initializer.map((bytes) => decodeTensor(bytes).name),
    ...graph.node.flatMap(({ output }) => output),
  ])
  return [...graph.node.flatMap(valuesRead), ...graph.output.map(({ name }) => name)].filter((value) => !own.has(value))
}

/** Removes nodes, weights and graph inputs that no graph output depends on. Nodes stand in topological order, as ONNX asks. */
export function removeUnused({ graph, initializers }: Model): void {
  const needed = new Set(graph.output.map(({ name }) => name))
  graph.node = graph.node
    .reverse()
    .filter((node) => {
      const alive = node.output.some((value) => needed.has(value))
      if (alive) for (const value of valuesRead(node)) needed.add(value)
      return alive
    })
    .reverse()
  graph.input = graph.input.filter(({ name }) => needed.has(name))
  for (const name of initializers.keys()) if (!needed.has(name)) initializers.delete(name)
}

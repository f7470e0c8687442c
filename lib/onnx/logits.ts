/**
 * Logits of the last token alone, without those of all others: in a long prompt the projection to the vocabulary takes a good
 * part of the work, and its result more memory than anything else.
 */
import { clearField } from '@bufbuild/protobuf'

import { GraphIndex } from './graph'
import type { Model, NodeProto } from './proto'
import { createNode, DataType, decodeTensor, DimensionSchema, encodeTensor, oneInteger } from './proto'

/** The graph input that says which column the logits begin with: int64 [1]. */
export const firstLogitInput = 'couplet.first_logit'

/** The projection to the vocabulary. */
const projections = new Set(['MatMul', 'MatMulNBits', 'MatMulBnb4'])
/** What may follow it: operators that treat every element alike, with constants of at most one dimension beside. */
const elementwise = new Set(['Cast', 'Identity', 'Tanh', 'Mul', 'Div', 'Add', 'Sub'])

/**
 * Cuts the projection's input, [rows][columns][hidden], to the columns from `couplet.first_logit` on. Leaves the graph as it is,
 * and answers false, where the logits do not come from such a projection.
 */
export function cutLogits(model: Model): boolean {
  const { graph, initializers } = model
  const dims = graph.output.find(({ name }) => name === 'logits')?.type?.tensorType?.shape?.dim
  const chain = findProjection(new GraphIndex(model))
  if (!chain || dims?.length !== 3 || graph.input.some(({ name }) => name === 'num_logits_to_keep')) return false
  const projection = chain.at(-1)!
  const hidden = projection.input[0]!
  const integers = (name: string, value: bigint) => {
    initializers.set(name, encodeTensor({ name, dims: [1n], dataType: DataType.int64, rawData: new Uint8Array(BigInt64Array.of(value).buffer) }))
    return name
  }
  const input = [hidden, firstLogitInput, integers('couplet.logits.ends', 2n ** 63n - 1n), integers('couplet.logits.axes', 1n)]
  const slice = createNode({ name: 'couplet.logits.cut', opType: 'Slice', input, output: ['couplet.logits.hidden'] })
  projection.input[0] = 'couplet.logits.hidden'
  graph.node.splice(graph.node.indexOf(projection), 0, slice)
  graph.input.push(oneInteger(firstLogitInput))
  // What was declared of the results speaks of all columns, and onnxruntime plans its memory by it.
  const results = new Set(chain.flatMap(({ output }) => output))
  graph.valueInfo = graph.valueInfo.filter(({ name }) => !results.has(name))
  const columns = dims[1]!
  clearField(columns, DimensionSchema.field.dimValue)
  columns.dimParam = 'couplet.logits.columns'
  return true
}

/** The nodes from the one that makes the logits back to the projection; undefined when they are of another kind. */
function findProjection(index: GraphIndex): NodeProto[] | undefined {
  const chain: NodeProto[] = []
  for (let value = 'logits'; ;) {
    const node = index.producer(value)
    if (!node || index.isShared(value)) return undefined
    chain.push(node)
    if (projections.has(node.opType)) return weightRank(node, index) === 2 ? chain : undefined
    const constants = node.input.slice(1).map((operand) => index.constant(operand)?.dims.length ?? Infinity)
    if (!elementwise.has(node.opType) || constants.some((rank) => rank > 1)) return undefined
    value = node.input[0]!
  }
}

/** Dimensions of the matrix that a projection multiplies with; those for packed weights have no other kind. */
function weightRank(projection: NodeProto, index: GraphIndex): number | undefined {
  if (projection.opType !== 'MatMul') return 2
  for (let value = projection.input[1]!; ;) {
    const initializer = index.model.initializers.get(value)
    if (initializer) return decodeTensor(initializer).dims.length
    const node = index.producer(value)
    if (!node || !['Cast', 'Identity', 'Transpose', 'DequantizeLinear'].includes(node.opType)) return undefined
    value = node.input[0]!
  }
}

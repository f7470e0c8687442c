/**
 * Rewrites a decoder graph so that its attention runs in couplet: every com.microsoft.GroupQueryAttention node becomes a
 * couplet.Attention node, which keeps keys and values itself. Past and present tensors leave the graph, rotary embedding moves
 * into the operator (keys are coded before rotation), and everything that only served the replaced nodes is removed.
 */
import { create } from '@bufbuild/protobuf'

import { CoupletError } from '../errors'
import { attribute, GraphIndex, removeUnused, subgraphs } from './graph'
import type { Model, NodeProto, TensorProto, ValueInfoProto } from './proto'
import { AttributeType, createNode, DataType, DimensionSchema, oneInteger, OperatorSetSchema } from './proto'
import type { RotaryTables } from './rotary'
import { plainTheta } from './rotary'
import { readFloats } from './tensors'

/** The graph input through which a run tells the operator which step it belongs to: int64 [1]. */
export const runInput = 'couplet.run'

/** What the operator does in one layer, as the replaced node said. */
export interface AttentionLayer {
  /** Name of the replaced node. */
  readonly name: string
  readonly queryHeads: number
  readonly kvHeads: number
  readonly headDim: number
  /** Factor of the logits; 0 stands for 1 / sqrt(headDim). */
  readonly scale: number
  /** 0 for none. */
  readonly softcap: number
  /** Tokens a query sees, its own included; 0 for all. */
  readonly localWindow: number
  /** float32 [queryHeads]: one more logit in each head's softmax. */
  readonly headSinks: Float32Array | undefined
  readonly rotary: RotaryTables | null
}

/** An input for past keys or values of which the graph still wants to know the length, by a Shape node. */
export interface MeasuredPast {
  readonly name: string
  /** TensorProto.DataType; its shape is [rows][kvHeads][past tokens][0] now. */
  readonly elementType: number
}

export interface RewrittenAttention {
  /** The replaced layers, in the order of their numbers (attribute `layer` of the operator). */
  readonly layers: readonly AttentionLayer[]
  readonly measuredPasts: readonly MeasuredPast[]
}

/** Input slots of GroupQueryAttention. */
const slot = {
  query: 0, key: 1, value: 2, pastKey: 3, pastValue: 4, cos: 7, sin: 8, attentionBias: 10, headSink: 11,
  keyScale: 12, valueScale: 13, queryNorm: 14, keyNorm: 15,
} as const

const refusedInputs: readonly [index: number, reason: string][] = [
  [slot.attentionBias, 'it adds an attention bias (input attention_bias)'],
  [slot.keyScale, 'its own cache is quantized (input k_scale)'],
  [slot.valueScale, 'its own cache is quantized (input v_scale)'],
  [slot.queryNorm, 'it normalizes queries and keys itself (input q_norm_weight); an export for the CPU does that in nodes of its own'],
  [slot.keyNorm, 'it normalizes queries and keys itself (input k_norm_weight); an export for the CPU does that in nodes of its own'],
]

/** Attributes of GroupQueryAttention that mean nothing here unless they differ from these values. */
const neutralAttributes = new Map<string, string | number>([
  ['causal', 1], ['qk_output', 0], ['sliding_window_cache', 0], ['k_quant_type', 'NONE'], ['v_quant_type', 'NONE'],
])
const usedAttributes = new Set([
  'num_heads', 'kv_num_heads', 'scale', 'softcap', 'local_window_size', 'do_rotary', 'rotary_interleaved', 'smooth_softmax',
  'kv_cache_bit_width', 'qk_norm_epsilon', // both speak only of features that are refused
])

/** Operators that keep past keys and values and that couplet does not replace. */
const otherAttention = new Set([
  'MultiHeadAttention', 'Attention', 'DecoderMaskedMultiHeadAttention', 'DecoderMaskedSelfAttention', 'PagedAttention', 'SparseAttention',
  'LinearAttention',
])

/** Operators that move elements without changing them, between a RotaryEmbedding and the attention that reads it. */
const layoutOperators = new Set(['Reshape', 'Transpose', 'Identity', 'Squeeze', 'Unsqueeze', 'Cast'])

const advice = 'use CoupledCache of couplet/transformers, which works beside any graph'

/**
 * Rewrites `model` in place.
 * @param folder where its external data lies, if it has a folder.
 * @throws CoupletError ERR_COUPLET_UNSUPPORTED_MODEL when any part of the model's attention cannot be replaced; `model` is then half rewritten.
 */
export async function rewriteAttention(model: Model, folder: string | undefined): Promise<RewrittenAttention> {
  const index = new GraphIndex(model)
  const nodes = findAttention(model)
  const tables = new Map<string, Promise<RotaryTables>>()
  const sites = await Promise.all(nodes.map((node) => readSite(node, { index, folder, tables })))
  sites.sort((a, b) => a.order - b.order)
  checkUniform(sites.map(({ layer }) => layer))

  const { graph, head } = model
  const pasts = new Set(sites.flatMap(({ node }) => [node.input[slot.pastKey]!, node.input[slot.pastValue]!]))
  const presents = new Set(sites.flatMap(({ node }) => node.output.slice(1)))
  const replacements = new Map(sites.map((site, number) => [site.node, replace(site, number)]))
  graph.node = graph.node.flatMap((node) => replacements.get(node) ?? [node])
  graph.output = graph.output.filter(({ name }) => !presents.has(name))
  removeUnused(model)

  const measured = graph.input.filter(({ name }) => pasts.has(name))
  const left = [...graph.input, ...graph.output].find((value) => /^(past|present)([._]|$)/.test(value.name) && !measured.includes(value))
  if (left) refuse(`"${left.name}" belongs to a state that is not a GroupQueryAttention's`)
  graph.input.push(oneInteger(runInput))
  head.opsetImport.push(create(OperatorSetSchema, { domain: 'couplet', version: 1n }))
  return { layers: sites.map(({ layer }) => layer), measuredPasts: measured.map(emptyHeads) }
}

/** Declares that heads of a past have no channels, so that a tensor without elements can tell its length. */
function emptyHeads({ name, type }: ValueInfoProto): MeasuredPast {
  const tensor = type?.tensorType
  const dims = tensor?.shape?.dim
  if (dims?.length !== 4) return refuse(`the graph does not declare four dimensions for "${name}"`)
  dims[3] = create(DimensionSchema, { dimValue: 0n })
  return { name, elementType: tensor!.elemType }
}

const isShape = (node: NodeProto) => node.opType === 'Shape' && node.domain === ''

/** A node to be replaced, and what it takes to do so. */
interface Site {
  node: NodeProto
  layer: AttentionLayer
  /** From the number in the name of its past key, or else the place of the node. */
  order: number
  elementType: number
}

interface Context {
  index: GraphIndex
  folder: string | undefined
  /** Rotary tables by the names of the tensors they come from, so that layers share one. */
  tables: Map<string, Promise<RotaryTables>>
}

function findAttention({ graph, head }: Model): NodeProto[] {
  const isGroupQuery = (node: NodeProto) => node.domain === 'com.microsoft' && node.opType === 'GroupQueryAttention'
  const found = graph.node.filter(isGroupQuery)
  const nested = graph.node.find((node) => subgraphs(node).some((inner) => inner.node.some(isGroupQuery)))
  if (nested) refuse(`its attention is inside a branch (node "${nested.name}", ${nested.opType})`)
  const inFunction = head.functions.find(({ node }) => node.some(isGroupQuery))
  if (inFunction) refuse(`its attention is inside the function "${inFunction.name}"`)
  const other = graph.node.find(({ opType, domain }) => otherAttention.has(opType) && (domain === 'com.microsoft' || domain === ''))
  if (found.length === 0) {
    refuse(other
      ? `its attention is ${other.opType} (node "${other.name}"), not com.microsoft.GroupQueryAttention`
      : 'it has no com.microsoft.GroupQueryAttention node; exports made with onnxruntime-genai or optimized with onnxruntime have them')
  }
  return found
}

async function readSite(node: NodeProto, context: Context): Promise<Site> {
  const { index } = context
  const integer = (name: string, fallback: number) => Number(attribute(node, name)?.i ?? fallback)
  checkNode(node, index)

  const queryHeads = integer('num_heads', 0)
  const kvHeads = integer('kv_num_heads', 0)
  const past = index.declared(node.input[slot.pastKey]!)
  const headDim = past?.dims[3] ?? 0
  if (headDim <= 0) refuseNode(node, `the graph does not say how many channels a head has (shape of "${node.input[slot.pastKey]}")`)
  if (queryHeads <= 0 || kvHeads <= 0 || queryHeads % kvHeads !== 0) refuseNode(node, `it has ${queryHeads} query heads and ${kvHeads} kv heads`)
  const elementType = past?.type ?? 0
  if (elementType !== DataType.float && elementType !== DataType.float16) refuseNode(node, `its element type is ${elementType}, not float32 or float16`)

  const name = node.input[slot.pastKey]!
  const number = /\d+/.exec(name)?.[0]
  const localWindow = integer('local_window_size', -1)
  return {
    node,
    elementType,
    order: number === undefined ? index.model.graph.node.indexOf(node) : Number(number),
    layer: {
      name: node.name || node.output[0]!,
      queryHeads,
      kvHeads,
      headDim,
      scale: attribute(node, 'scale')?.f ?? 0,
      softcap: attribute(node, 'softcap')?.f ?? 0,
      localWindow: localWindow > 0 ? localWindow : 0,
      headSinks: await readSinks(node, context, queryHeads),
      rotary: integer('do_rotary', 0) === 1 ? await readOwnRotary(node, context) : await bypassRotary(node, context),
    },
  }
}

function checkNode(node: NodeProto, index: GraphIndex): void {
  for (const [input, reason] of refusedInputs) if (node.input[input]) refuseNode(node, reason)
  for (const { name, i, s } of node.attribute) {
    const neutral = neutralAttributes.get(name)
    if (neutral === undefined && !usedAttributes.has(name)) refuseNode(node, `this version of couplet does not know its attribute ${name}`)
    const value = typeof neutral === 'string' ? new TextDecoder().decode(s) : Number(i)
    if (neutral !== undefined && value !== neutral) refuseNode(node, `its attribute ${name} is ${value}`)
  }
  for (const past of [slot.pastKey, slot.pastValue]) {
    const value = node.input[past] ?? ''
    if (!index.isInput(value)) refuseNode(node, `its past (${value === '' ? 'none' : `"${value}"`}) is not an input of the graph`)
    if (index.readers(value).some((reader) => reader !== node && !isShape(reader))) refuseNode(node, `another node reads its past "${value}"`)
  }
  for (const present of node.output.slice(1, 3)) {
    if (index.readers(present).length > 0) refuseNode(node, `another node reads its cache "${present}"`)
  }
  if (node.output[3]) refuseNode(node, 'it outputs the products of queries and keys')
  if (Boolean(node.input[slot.key]) !== Boolean(node.input[slot.value])) refuseNode(node, 'it has only one of key and value')
}

async function readSinks(node: NodeProto, { index, folder }: Context, queryHeads: number): Promise<Float32Array | undefined> {
  const value = node.input[slot.headSink]
  if (!value) return Number(attribute(node, 'smooth_softmax')?.i ?? 0) === 1 ? new Float32Array(queryHeads) : undefined
  const tensor = index.constant(value)
  if (!tensor) return refuseNode(node, `its attention sinks "${value}" are computed, not constant`)
  const sinks = await readFloats(tensor, folder)
  return sinks.length === queryHeads ? sinks : refuseNode(node, `it has ${sinks.length} attention sinks for ${queryHeads} query heads`)
}

function readOwnRotary(node: NodeProto, context: Context): Promise<RotaryTables> {
  const interleaved = Number(attribute(node, 'rotary_interleaved')?.i ?? 0) === 1
  return readTables(node, { cos: node.input[slot.cos] ?? '', sin: node.input[slot.sin] ?? '', interleaved }, context)
}

interface TableNames { cos: string; sin: string; interleaved: boolean }

function readTables(node: NodeProto, names: TableNames, context: Context): Promise<RotaryTables> {
  const key = JSON.stringify(names)
  let tables = context.tables.get(key)
  if (!tables) context.tables.set(key, (tables = readNewTables(node, names, context)))
  return tables
}

async function readNewTables(node: NodeProto, { cos, sin, interleaved }: TableNames, { index, folder }: Context): Promise<RotaryTables> {
  const [cosTensor, sinTensor] = [tableTensor(node, cos, index), tableTensor(node, sin, index)]
  if (cosTensor.dims.length !== 2 || cosTensor.dims.join() !== sinTensor.dims.join()) {
    refuseNode(node, `its rotary tables have shapes [${cosTensor.dims.join()}] and [${sinTensor.dims.join()}]`)
  }
  const [positions = 0, pairs = 0] = cosTensor.dims.map(Number)
  const [cosTable, sinTable] = await Promise.all([readFloats(cosTensor, folder), readFloats(sinTensor, folder)])
  const dim = 2 * pairs
  return { kind: interleaved ? 'interleaved' : 'half', dim, positions, cos: cosTable, sin: sinTable, theta: plainTheta(cosTable, sinTable, dim) }
}

function tableTensor(node: NodeProto, name: string, index: GraphIndex): TensorProto {
  const changes = index.producer(name)?.opType === 'If'
  return index.constant(name)
    ?? refuseNode(node, `its rotary table "${name}" ${changes ? 'changes with the length of the text (LongRoPE)' : 'is computed, not constant'}`)
}

/**
 * For a node that leaves rotation to RotaryEmbedding nodes before it: reads their tables and lets the attention read what they
 * rotated. null when nothing rotates its queries and keys.
 */
async function bypassRotary(node: NodeProto, context: Context): Promise<RotaryTables | null> {
  if (!node.input[slot.key]) return null
  const query = findRotation(node, slot.query, context.index)
  const key = findRotation(node, slot.key, context.index)
  if (!query && !key) return null
  if (!query || !key) return refuseNode(node, `a RotaryEmbedding node rotates its ${query ? 'queries' : 'keys'} alone`)
  if (JSON.stringify(query.tables) !== JSON.stringify(key.tables)) refuseNode(node, 'its queries and keys are rotated with different tables')
  const tables = await readTables(query.rotation, query.tables, context)
  for (const { rotation, reader, input } of [query, key]) {
    const dim = Number(attribute(rotation, 'rotary_embedding_dim')?.i ?? 0)
    if (dim !== 0 && dim !== tables.dim) refuseNode(rotation, `it rotates ${dim} channels with tables for ${tables.dim}`)
    reader.input[input] = rotation.input[0]!
  }
  return tables
}

/** A RotaryEmbedding node, and the node and input slot that read what it rotated. */
interface Rotation { rotation: NodeProto; reader: NodeProto; input: number; tables: TableNames }

function findRotation(attention: NodeProto, attentionInput: number, index: GraphIndex): Rotation | undefined {
  let [reader, input] = [attention, attentionInput]
  for (;;) {
    const value = reader.input[input]!
    const producer = index.producer(value)
    if (producer?.opType === 'RotaryEmbedding') return { rotation: producer, reader, input, tables: rotationTables(producer) }
    if (!producer || !layoutOperators.has(producer.opType) || producer.domain !== '') return undefined
    if (index.isShared(value) && leadsToRotation(producer, index)) refuseNode(attention, `another node reads "${value}", which is rotated`)
    ;[reader, input] = [producer, 0]
  }
}

function leadsToRotation(node: NodeProto, index: GraphIndex): boolean {
  const producer = index.producer(node.input[0]!)
  if (producer?.opType === 'RotaryEmbedding') return true
  return producer !== undefined && layoutOperators.has(producer.opType) && leadsToRotation(producer, index)
}

function rotationTables(rotation: NodeProto): TableNames {
  for (const { name, i, f } of rotation.attribute) {
    if (name === 'scale' && f !== 1) refuseNode(rotation, `its attribute scale is ${f}`)
    if (name === 'is_packed_batching' && i !== 0n) refuseNode(rotation, 'it takes packed batches')
    if (!['interleaved', 'num_heads', 'rotary_embedding_dim', 'scale', 'is_packed_batching'].includes(name)) {
      refuseNode(rotation, `this version of couplet does not know its attribute ${name}`)
    }
  }
  const first = rotation.domain === 'com.microsoft' ? 2 : 1 // where the operator of ONNX itself has them
  return { cos: rotation.input[first] ?? '', sin: rotation.input[first + 1] ?? '', interleaved: Number(attribute(rotation, 'interleaved')?.i ?? 0) === 1 }
}

/** One cache serves all layers, so their shapes have to agree. */
function checkUniform(layers: AttentionLayer[]): void {
  const shape = ({ queryHeads, kvHeads, headDim }: AttentionLayer) => `${queryHeads} query heads, ${kvHeads} kv heads of ${headDim} channels`
  const odd = layers.find((layer) => shape(layer) !== shape(layers[0]!))
  if (odd) refuse(`node "${odd.name}" has ${shape(odd)}, node "${layers[0]!.name}" ${shape(layers[0]!)}`)
  const unrotated = layers.find(({ rotary, headDim }) => rotary && rotary.dim > headDim)
  if (unrotated) refuse(`node "${unrotated.name}" rotates ${unrotated.rotary!.dim} of ${unrotated.headDim} channels`)
}

/** The nodes that take the place of a GroupQueryAttention node. The operator computes in float32. */
function replace({ node, layer, elementType }: Site, number: number): NodeProto[] {
  const inputs = [slot.query, slot.key, slot.value].map((input) => node.input[input] ?? '').filter((value) => value !== '')
  const integers = { layer: number, num_heads: layer.queryHeads, kv_num_heads: layer.kvHeads, head_dim: layer.headDim }
  const attention = createNode({
    name: layer.name,
    opType: 'Attention',
    domain: 'couplet',
    input: [runInput, ...inputs],
    output: [node.output[0]!],
    attribute: Object.entries(integers).map(([name, i]) => ({ name, i: BigInt(i), type: AttributeType.int })),
  })
  if (elementType === DataType.float) return [attention]

  const cast = (input: string, output: string, to: number) =>
    createNode({ name: `${output}/cast`, opType: 'Cast', input: [input], output: [output], attribute: [{ name: 'to', i: BigInt(to), type: AttributeType.int }] })
  const floats = inputs.map((_, i) => `couplet.${number}.input.${i}`)
  const output = `couplet.${number}.output`
  attention.input = [runInput, ...floats]
  attention.output = [output]
  return [...inputs.map((input, i) => cast(input, floats[i]!, DataType.float)), attention, cast(output, node.output[0]!, elementType)]
}

function refuse(reason: string): never {
  throw new CoupletError('ERR_COUPLET_UNSUPPORTED_MODEL', `Cannot run this model's attention on coded keys and values: ${reason}; ${advice}`)
}

function refuseNode(node: NodeProto, reason: string): never {
  refuse(`node "${node.name || node.output[0]!}" (${node.opType}) cannot be replaced because ${reason}`)
}

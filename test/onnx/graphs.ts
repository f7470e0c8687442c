/** Small decoder graphs, built here, in the forms that exporters write. */
import { create } from '@bufbuild/protobuf'
import type { MessageInitShape } from '@bufbuild/protobuf'

import { float16FromFloat32 } from '../../lib/float16'
import type { Model, NodeSchema } from '../../lib/onnx/proto'
import { AttributeType, createNode, DataType, encodeTensor, GraphSchema, ModelSchema, OperatorSetSchema } from '../../lib/onnx/proto'

export interface DecoderShape {
  layers?: number
  queryHeads?: number
  kvHeads?: number
  headDim?: number
  hidden?: number
  vocabulary?: number
  positions?: number
  seed?: number
  packed?: boolean
  /** `own`: do_rotary=1; `nodes`: RotaryEmbedding nodes on [batch, tokens, width]; `nodes4d`: on [batch, heads, tokens, headDim]. */
  rotary?: 'own' | 'nodes' | 'nodes4d' | 'onnx' | 'none'
  interleaved?: boolean
  rotaryDim?: number
  theta?: number
  /** Divides all angles, as linear scaling does. */
  linearScaling?: number
  scale?: number
  softcap?: number
  localWindow?: number
  headSinks?: Float32Array
  smoothSoftmax?: boolean
  type?: 'float32' | 'float16'
  /** total_sequence_length as an input of the graph. */
  totalInput?: boolean
  /** Adds a learned embedding of positions, and of the length of the text that the mask tells. */
  learnedPositions?: boolean
  /** Adds a learned embedding of positions that are counted from the shape of a past key, as older exports do. */
  measuredPast?: boolean
  /** An input num_logits_to_keep: logits of that many last columns, 0 for all. */
  keepInput?: boolean
  /** Ends with a softcap of the logits. */
  finalSoftcap?: boolean
}

/** A decoder: embedding, `layers` of attention with a residual, logits. Queries, keys and values are about standard normal. */
export function decoder(shape: DecoderShape = {}): Model {
  const {
    layers = 2, queryHeads = 4, kvHeads = 2, headDim = 32, hidden = 48, vocabulary = 64, positions = 256, packed = false, rotary = 'own',
    interleaved = false, rotaryDim = headDim, theta = 10000, linearScaling = 1, seed = 1, type = 'float32', totalInput = false,
  } = shape
  const random = normals(seed)
  const model: Model = { head: create(ModelSchema, { irVersion: 9n }), graph: create(GraphSchema, { name: 'decoder' }), initializers: new Map() }
  const { graph } = model
  const floatType = DataType[type === 'float32' ? 'float' : 'float16']
  model.head.opsetImport = [{ domain: '', version: rotary === 'onnx' ? 23n : 17n }, { domain: 'com.microsoft', version: 1n }]
    .map((set) => create(OperatorSetSchema, set))

  const add = (opType: string, input: string[], output: string[] | string, attributes: Record<string, Attribute> = {}, domain = '') => {
    const outputs = typeof output === 'string' ? [output] : output
    graph.node.push(createNode({ name: `/${outputs[0]}`, opType, domain, input, output: outputs, attribute: Object.entries(attributes).map(toAttribute) }))
    return outputs[0]!
  }
  const floats = (name: string, dims: number[], values: Float32Array) => {
    const rawData = type === 'float32' ? new Uint8Array(values.buffer) : new Uint8Array(float16FromFloat32(values).buffer)
    model.initializers.set(name, encodeTensor({ name, dims: dims.map(BigInt), dataType: floatType, rawData }))
    return name
  }
  const weights = (name: string, rows: number, columns: number, deviation = 1 / Math.sqrt(rows)) =>
    floats(name, [rows, columns], Float32Array.from({ length: rows * columns }, () => random() * deviation))
  const integers = (name: string, dims: number[], values: number[]) => {
    const rawData = new Uint8Array(BigInt64Array.from(values, BigInt).buffer)
    model.initializers.set(name, encodeTensor({ name, dims: dims.map(BigInt), dataType: DataType.int64, rawData }))
    return name
  }
  const value = (name: string, elemType: number, dims: (string | number)[]) =>
    ({ name, type: { tensorType: { elemType, shape: { dim: dims.map((dim) => (typeof dim === 'string' ? { dimParam: dim } : { dimValue: BigInt(dim) })) } } } })

  const inputs = [value('input_ids', DataType.int64, ['batch', 'tokens']), value('attention_mask', DataType.int64, ['batch', 'total'])]
  const outputs = [value('logits', floatType, ['batch', 'tokens', vocabulary])]

  // seqlens_k and total_sequence_length, as onnxruntime-genai writes them
  integers('one', [1], [1])
  add('ReduceSum', ['attention_mask', 'one'], 'mask_sum', { keepdims: 0 })
  add('Sub', ['mask_sum', 'one'], 'seqlens_int64')
  add('Cast', ['seqlens_int64'], 'seqlens', { to: DataType.int32 })
  if (totalInput) {
    inputs.push(value('total', DataType.int32, []))
  } else {
    integers('axis', [], [1])
    add('Shape', ['attention_mask'], 'mask_shape')
    add('Gather', ['mask_shape', 'axis'], 'total_int64')
    add('Cast', ['total_int64'], 'total', { to: DataType.int32 })
  }
  if (rotary !== 'none') {
    const pairs = rotaryDim / 2
    const table = (f: (angle: number) => number) =>
      Float32Array.from({ length: positions * pairs }, (_, i) => f((Math.floor(i / pairs) / linearScaling) * theta ** (-(i % pairs) / pairs)))
    floats('cos_cache', [positions, pairs], table(Math.cos))
    floats('sin_cache', [positions, pairs], table(Math.sin))
  }
  if (rotary !== 'none' && rotary !== 'own') inputs.push(value('position_ids', DataType.int64, ['batch', 'tokens']))
  if (shape.headSinks) floats('head_sinks', [queryHeads], shape.headSinks)

  const rotate = (input: string, heads: number, output: string) => {
    const attributes = { interleaved: Number(interleaved), ...(rotaryDim === headDim ? {} : { rotary_embedding_dim: rotaryDim, num_heads: heads }) }
    if (rotary === 'nodes') return add('RotaryEmbedding', [input, 'position_ids', 'cos_cache', 'sin_cache'], output, attributes, 'com.microsoft')
    if (rotary === 'onnx') return add('RotaryEmbedding', [input, 'cos_cache', 'sin_cache', 'position_ids'], output, { ...attributes, num_heads: heads })
    integers(`${output}.split`, [4], [0, 0, heads, headDim])
    integers(`${output}.join`, [3], [0, 0, heads * headDim])
    add('Reshape', [input, `${output}.split`], `${output}.heads`)
    add('Transpose', [`${output}.heads`], `${output}.unrotated`, { perm: [0, 2, 1, 3] })
    add('RotaryEmbedding', [`${output}.unrotated`, 'position_ids', 'cos_cache', 'sin_cache'], `${output}.rotated`, attributes, 'com.microsoft')
    add('Transpose', [`${output}.rotated`], `${output}.tokens`, { perm: [0, 2, 1, 3] })
    return add('Reshape', [`${output}.tokens`, `${output}.join`], output)
  }

  weights('embedding', vocabulary, hidden, 1)
  let stream = add('Gather', ['embedding', 'input_ids'], 'embedded', { axis: 0 })
  if (shape.learnedPositions) {
    inputs.push(value('position_ids', DataType.int64, ['batch', 'tokens']))
    const place = add('Gather', [weights('positions', positions, hidden, 1), 'position_ids'], 'placed', { axis: 0 })
    const length = add('Gather', ['positions', add('Unsqueeze', ['seqlens_int64', 'one'], 'lengths')], 'measured', { axis: 0 })
    stream = add('Add', [add('Add', [stream, place], 'stream.placed'), length], 'stream.measured')
  }
  if (shape.measuredPast) {
    const sizeOf = (value: string, axis: number) =>
      add('Gather', [add('Shape', [value], `${value}.shape`), integers(`${value}.axis`, [], [axis])], `${value}.size`)
    const past = sizeOf('past_key_values.0.key', 2)
    add('Add', [past, sizeOf('input_ids', 1)], 'positions.end')
    add('Range', [past, 'positions.end', integers('positions.step', [], [1])], 'positions.range')
    add('Unsqueeze', ['positions.range', integers('positions.axes', [1], [0])], 'positions.row')
    const place = add('Gather', [weights('positions', positions, hidden, 1), 'positions.row'], 'placed', { axis: 0 })
    stream = add('Add', [stream, place], 'stream.placed')
  }
  for (let layer = 0; layer < layers; layer++) {
    const project = (name: string, width: number) => add('MatMul', [stream, weights(`layers.${layer}.${name}.weight`, hidden, width)], `layers.${layer}.${name}`)
    let qkv: string[]
    if (packed) {
      qkv = [project('qkv', (queryHeads + 2 * kvHeads) * headDim), '', '']
    } else {
      qkv = [project('query', queryHeads * headDim), project('key', kvHeads * headDim), project('value', kvHeads * headDim)]
      if (rotary !== 'own' && rotary !== 'none') {
        qkv[0] = rotate(qkv[0]!, queryHeads, `layers.${layer}.query.rotated`)
        qkv[1] = rotate(qkv[1]!, kvHeads, `layers.${layer}.key.rotated`)
      }
    }
    const tables = rotary === 'own' ? ['cos_cache', 'sin_cache'] : ['', '']
    const sinks = shape.headSinks ? ['', '', 'head_sinks'] : []
    const attended = add(
      'GroupQueryAttention',
      [...qkv, `past_key_values.${layer}.key`, `past_key_values.${layer}.value`, 'seqlens', 'total', ...tables, ...sinks],
      [`layers.${layer}.attended`, `present.${layer}.key`, `present.${layer}.value`],
      {
        num_heads: queryHeads, kv_num_heads: kvHeads, do_rotary: Number(rotary === 'own'), rotary_interleaved: Number(interleaved),
        ...(shape.scale === undefined ? {} : { scale: { float: shape.scale } }),
        ...(shape.softcap === undefined ? {} : { softcap: { float: shape.softcap } }),
        ...(shape.localWindow === undefined ? {} : { local_window_size: shape.localWindow }),
        ...(shape.smoothSoftmax ? { smooth_softmax: 1 } : {}),
      },
      'com.microsoft',
    )
    const projected = add('MatMul', [attended, weights(`layers.${layer}.output.weight`, queryHeads * headDim, hidden)], `layers.${layer}.projected`)
    stream = add('Add', [stream, projected], `layers.${layer}.stream`)
    for (const side of ['key', 'value']) {
      inputs.push(value(`past_key_values.${layer}.${side}`, floatType, ['batch', kvHeads, 'past', headDim]))
      outputs.push(value(`present.${layer}.${side}`, floatType, ['batch', kvHeads, 'total', headDim]))
    }
  }
  if (shape.keepInput) {
    inputs.push(value('num_logits_to_keep', DataType.int64, []))
    add('Neg', ['num_logits_to_keep'], 'keep.negative')
    add('Reshape', ['keep.negative', 'one'], 'keep.start')
    stream = add('Slice', [stream, 'keep.start', integers('keep.end', [1], [2 ** 40]), 'one'], 'kept')
  }
  const head = weights('logits.weight', hidden, vocabulary)
  if (shape.finalSoftcap) {
    const cap = floats('cap', [1], Float32Array.of(3))
    add('MatMul', [stream, head], 'uncapped')
    add('Div', ['uncapped', cap], 'uncapped.scaled')
    add('Tanh', ['uncapped.scaled'], 'capped.scaled')
    add('Mul', ['capped.scaled', cap], 'logits')
  } else {
    add('MatMul', [stream, head], 'logits')
  }
  const typed = create(GraphSchema, { input: inputs, output: outputs })
  graph.input = typed.input
  graph.output = typed.output
  return model
}

/** A whole number, a float, or whole numbers. */
type Attribute = number | { float: number } | number[]

function toAttribute([name, value]: [string, Attribute]): NonNullable<MessageInitShape<typeof NodeSchema>['attribute']>[number] {
  if (Array.isArray(value)) return { name, ints: value.map(BigInt), type: AttributeType.ints }
  if (typeof value === 'number') return { name, i: BigInt(value), type: AttributeType.int }
  return { name, f: value.float, type: AttributeType.float }
}

/** Standard normal numbers, the same for a seed. */
export function normals(seed: number): () => number {
  let state = seed >>> 0
  const uniform = () => {
    state = (state + 0x9e3779b9) >>> 0
    let z = state
    z = Math.imul(z ^ (z >>> 16), 0x85ebca6b)
    z = Math.imul(z ^ (z >>> 13), 0xc2b2ae35)
    return (((z ^ (z >>> 16)) >>> 0) + 0.5) / 2 ** 32
  }
  return () => Math.sqrt(-2 * Math.log(uniform())) * Math.cos(2 * Math.PI * uniform())
}

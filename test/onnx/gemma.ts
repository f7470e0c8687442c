/**
 * A second decoder, of another family than models/tiny-llama-bytes: built from a seed, with what Gemma, Qwen and Phi do and Llama does not.
 * Scaled embeddings that are the logits' weights too, norms of queries and keys, norms behind attention and feed-forward, 4-bit matrices,
 * heads of 80 channels of which 32 are rotated (interleaved), three query heads for each kv head, a softcap in attention and on the
 * logits, and every other layer with a window.
 */
import { create } from '@bufbuild/protobuf'
import type { MessageInitShape } from '@bufbuild/protobuf'

import type { Model, NodeSchema } from '../../lib/onnx/proto'
import { AttributeType, createNode, DataType, encodeTensor, GraphSchema, ModelSchema, OperatorSetSchema } from '../../lib/onnx/proto'
import { normals } from './graphs'

export const gemmaShape = {
  layers: 3, queryHeads: 6, kvHeads: 2, headDim: 80, hidden: 96, feedForward: 160, vocabulary: 197, positions: 320, rotaryDim: 32, window: 48,
}

type Attribute = number | { float: number }

/** The graph; weights and so everything else are functions of `seed`. */
export function gemma(seed = 1): Model {
  const { layers, queryHeads, kvHeads, headDim, hidden, feedForward, vocabulary, positions, rotaryDim, window } = gemmaShape
  const random = normals(seed)
  const model: Model = { head: create(ModelSchema, { irVersion: 9n }), graph: create(GraphSchema, { name: 'gemma' }), initializers: new Map() }
  model.head.opsetImport = [{ domain: '', version: 17n }, { domain: 'com.microsoft', version: 1n }].map((set) => create(OperatorSetSchema, set))

  const add = (opType: string, input: string[], output: string | string[], attributes: Record<string, Attribute> = {}, domain = ''): string => {
    const outputs = typeof output === 'string' ? [output] : output
    const attribute = Object.entries(attributes).map(toAttribute)
    model.graph.node.push(createNode({ name: `/${outputs[0]}`, opType, domain, input, output: outputs, attribute }))
    return outputs[0]!
  }
  const microsoft = 'com.microsoft'
  const tensor = (name: string, dims: number[], dataType: number, data: Float32Array | Uint8Array | BigInt64Array): string => {
    const rawData = new Uint8Array(data.buffer, data.byteOffset, data.byteLength)
    model.initializers.set(name, encodeTensor({ name, dims: dims.map(BigInt), dataType, rawData }))
    return name
  }
  const floats = (name: string, dims: number[], values: (i: number) => number) =>
    tensor(name, dims, DataType.float, Float32Array.from({ length: dims.reduce((product, count) => product * count, 1) }, (_, i) => values(i)))
  const integers = (name: string, values: number[]) => tensor(name, [values.length], DataType.int64, BigInt64Array.from(values, BigInt))
  /** A row-wise norm; its weight is near 1. */
  const norm = (input: string, width: number, name: string) =>
    add('SimplifiedLayerNormalization', [input, floats(`${name}.weight`, [width], () => 1 + 0.2 * random())], name, { axis: -1, epsilon: { float: 1e-6 } })
  /** 4 bits in blocks of 32 rows, (code - 8) * scale. */
  const project = (input: string, rows: number, columns: number, name: string, gain = 1) => {
    const blocks = Math.ceil(rows / 32)
    const codes = tensor(`${name}.codes`, [columns, blocks, 16], DataType.uint8, Uint8Array.from({ length: columns * blocks * 16 }, () => {
      const code = () => Math.min(15, Math.max(0, Math.round(8 + 2.5 * random())))
      return code() | (code() << 4)
    }))
    const scales = floats(`${name}.scales`, [columns * blocks], () => gain * (1 + 0.1 * random()) / 2.5 / Math.sqrt(rows))
    return add('MatMulNBits', [input, codes, scales], name, { K: rows, N: columns, bits: 4, block_size: 32 }, microsoft)
  }
  const rotate = (input: string, heads: number, name: string) => {
    const attributes = { interleaved: 1, rotary_embedding_dim: rotaryDim, num_heads: heads }
    return add('RotaryEmbedding', [input, 'position_ids', 'cos_cache', 'sin_cache'], name, attributes, microsoft)
  }
  const ofHeads = (input: string, heads: number, name: string) => {
    add('Reshape', [input, integers(`${name}.split`, [0, -1, headDim])], `${name}.split.out`)
    norm(`${name}.split.out`, headDim, `${name}.norm`)
    return add('Reshape', [`${name}.norm`, integers(`${name}.join`, [0, -1, heads * headDim])], name)
  }

  integers('one', [1])
  add('ReduceSum', ['attention_mask', 'one'], 'mask_sum', { keepdims: 0 })
  add('Cast', [add('Sub', ['mask_sum', 'one'], 'seqlens_int64')], 'seqlens', { to: DataType.int32 })
  add('Gather', [add('Shape', ['attention_mask'], 'mask_shape'), tensor('axis', [], DataType.int64, BigInt64Array.of(1n))], 'total_int64')
  add('Cast', ['total_int64'], 'total', { to: DataType.int32 })
  const pairs = rotaryDim / 2
  const angle = (i: number) => Math.floor(i / pairs) * 10000 ** (-(i % pairs) / pairs)
  floats('cos_cache', [positions, pairs], (i) => Math.cos(angle(i)))
  floats('sin_cache', [positions, pairs], (i) => Math.sin(angle(i)))

  floats('embedding', [vocabulary, hidden], () => random() / Math.sqrt(hidden))
  floats('embedding.scale', [1], () => Math.sqrt(hidden))
  let stream = add('Mul', [add('Gather', ['embedding', 'input_ids'], 'gathered', { axis: 0 }), 'embedding.scale'], 'embedded')
  for (let layer = 0; layer < layers; layer++) {
    const at = (name: string) => `layers.${layer}.${name}`
    const before = norm(stream, hidden, at('input.norm'))
    const query = rotate(ofHeads(project(before, hidden, queryHeads * headDim, at('query')), queryHeads, at('query.normed')), queryHeads, at('query.rotated'))
    const key = rotate(ofHeads(project(before, hidden, kvHeads * headDim, at('key')), kvHeads, at('key.normed')), kvHeads, at('key.rotated'))
    const value = project(before, hidden, kvHeads * headDim, at('value'))
    const attended = add(
      'GroupQueryAttention', [query, key, value, `past_key_values.${layer}.key`, `past_key_values.${layer}.value`, 'seqlens', 'total'],
      [at('attended'), `present.${layer}.key`, `present.${layer}.value`],
      {
        num_heads: queryHeads, kv_num_heads: kvHeads, do_rotary: 0, scale: { float: 0.2 }, softcap: { float: 20 },
        ...(layer % 2 === 0 && { local_window_size: window }),
      }, microsoft)
    stream = add('Add', [stream, norm(project(attended, queryHeads * headDim, hidden, at('output')), hidden, at('output.norm'))], at('attended.stream'))
    const fed = norm(stream, hidden, at('feed.norm'))
    const gate = add('FastGelu', [project(fed, hidden, feedForward, at('gate'), 2)], at('gate.gelu'), {}, microsoft)
    const inner = add('Mul', [gate, project(fed, hidden, feedForward, at('up'))], at('inner'))
    stream = add('Add', [stream, norm(project(inner, feedForward, hidden, at('down')), hidden, at('down.norm'))], at('stream'))
  }
  add('Transpose', ['embedding'], 'embedding.transposed')
  add('MatMul', [norm(stream, hidden, 'final.norm'), 'embedding.transposed'], 'uncapped')
  floats('cap', [1], () => 12)
  add('Mul', [add('Tanh', [add('Div', ['uncapped', 'cap'], 'uncapped.scaled')], 'capped.scaled'), 'cap'], 'logits')

  const value = (name: string, elemType: number, dims: (string | number)[]) =>
    ({ name, type: { tensorType: { elemType, shape: { dim: dims.map((dim) => (typeof dim === 'string' ? { dimParam: dim } : { dimValue: BigInt(dim) })) } } } })
  const cache = (name: string, tokens: string) => Array.from({ length: layers }, (_, layer) =>
    ['key', 'value'].map((side) => value(`${name}.${layer}.${side}`, DataType.float, ['batch', kvHeads, tokens, headDim]))).flat()
  const ids = (name: string, axis: string) => value(name, DataType.int64, ['batch', axis])
  const typed = create(GraphSchema, {
    input: [ids('input_ids', 'tokens'), ids('attention_mask', 'total'), ids('position_ids', 'tokens'), ...cache('past_key_values', 'past')],
    output: [value('logits', DataType.float, ['batch', 'tokens', vocabulary]), ...cache('present', 'total')],
  })
  model.graph.input = typed.input
  model.graph.output = typed.output
  return model
}

function toAttribute([name, value]: [string, Attribute]): NonNullable<MessageInitShape<typeof NodeSchema>['attribute']>[number] {
  return typeof value === 'number' ? { name, i: BigInt(value), type: AttributeType.int } : { name, f: value.float, type: AttributeType.float }
}

/** Token ids of a text in which each token decides much of the next. */
export function gemmaText(length: number, seed = 1): number[] {
  const random = normals(seed)
  const text: number[] = []
  const { vocabulary } = gemmaShape
  for (let token = 7; text.length < length; text.push(token)) {
    token = Math.abs(random()) < 0.6 ? (token * 7 + 3) % vocabulary : Math.floor(Math.abs(random() * vocabulary / 2)) % vocabulary
  }
  return text
}

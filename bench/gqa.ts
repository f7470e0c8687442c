/**
 * onnxruntime's own GroupQueryAttention, one decode step over a full cache: float32, int8 and int4. Its past and present
 * share one buffer, as in a loop that owns its cache, so the operator appends a row and copies nothing.
 */
import { create } from '@bufbuild/protobuf'
import { AttributeType, createNode, DataType, encodeModel, GraphSchema, ModelSchema, OperatorSetSchema, ValueInfoSchema } from '../lib/onnx/proto'

export type Precision = 'float32' | 'int8' | 'int4'

export interface GqaShape { queryHeads: number; kvHeads: number; headDim: number; tokens: number }

/** name, ONNX element type, dims, data: what peers.node binds. */
export type Binding = [string, number, number[], Float32Array | Int8Array | Uint8Array | Int32Array]

const elementTypes = { float32: DataType.float, int8: 3, int4: 2 } as const
const bits = { float32: 0, int8: 8, int4: 4 } as const

export interface Gqa { model: Uint8Array; inputs: Binding[]; outputs: Binding[]; out: Float32Array }

/** keys, values: [kvHeads][tokens][headDim], rotated already; the last token comes in as the new one. */
export function gqa(precision: Precision, shape: GqaShape, queries: Float32Array, keys: Float32Array, values: Float32Array): Gqa {
  const { queryHeads, kvHeads, headDim, tokens } = shape
  const type = elementTypes[precision]
  const width = precision === 'int4' ? headDim / 2 : headDim
  const float = (name: string, dims: number[]) => valueInfo(name, DataType.float, dims)
  const cacheDims = [1, kvHeads, tokens, width]
  const quantized = precision !== 'float32'
  const attribute = (name: string, i: number) => ({ name, i: BigInt(i), type: AttributeType.int })
  const text = (name: string, s: string) => ({ name, s: Buffer.from(s), type: 3 })
  const graph = create(GraphSchema, {
    name: 'gqa',
    node: [createNode({
      name: 'attention',
      opType: 'GroupQueryAttention',
      domain: 'com.microsoft',
      input: ['query', 'key', 'value', 'past_key', 'past_value', 'seqlens_k', 'total', ...(quantized ? ['', '', '', '', '', 'k_scale', 'v_scale'] : [])],
      output: ['out', 'present_key', 'present_value'],
      attribute: [
        attribute('num_heads', queryHeads), attribute('kv_num_heads', kvHeads),
        ...(quantized ? [text('k_quant_type', 'PER_TENSOR'), text('v_quant_type', 'PER_TENSOR'), attribute('kv_cache_bit_width', bits[precision])] : []),
      ],
    })],
    input: [
      float('query', [1, 1, queryHeads * headDim]), float('key', [1, 1, kvHeads * headDim]), float('value', [1, 1, kvHeads * headDim]),
      valueInfo('past_key', type, cacheDims), valueInfo('past_value', type, cacheDims),
      valueInfo('seqlens_k', DataType.int32, [1]), valueInfo('total', DataType.int32, []),
      ...(quantized ? [float('k_scale', [1]), float('v_scale', [1])] : []),
    ],
    output: [float('out', [1, 1, queryHeads * headDim]), valueInfo('present_key', type, cacheDims), valueInfo('present_value', type, cacheDims)],
  })
  const opsetImport = [{ domain: '', version: 17n }, { domain: 'com.microsoft', version: 1n }].map((set) => create(OperatorSetSchema, set))
  const model = encodeModel({ head: create(ModelSchema, { irVersion: 9n, opsetImport }), graph, initializers: new Map() })

  const newest = (from: Float32Array) => {
    const row = new Float32Array(kvHeads * headDim)
    for (let h = 0; h < kvHeads; h++) row.set(from.subarray(((h + 1) * tokens - 1) * headDim, (h + 1) * tokens * headDim), h * headDim)
    return row
  }
  const [keyCache, keyScale] = quantize(precision, keys)
  const [valueCache, valueScale] = quantize(precision, values)
  const out = new Float32Array(queryHeads * headDim)
  return {
    model,
    out,
    inputs: [
      ['query', DataType.float, [1, 1, queryHeads * headDim], queries],
      ['key', DataType.float, [1, 1, kvHeads * headDim], newest(keys)],
      ['value', DataType.float, [1, 1, kvHeads * headDim], newest(values)],
      ['past_key', type, cacheDims, keyCache],
      ['past_value', type, cacheDims, valueCache],
      ['seqlens_k', DataType.int32, [1], Int32Array.of(tokens - 1)],
      ['total', DataType.int32, [], Int32Array.of(tokens)],
      ...(quantized ? [bindScale('k_scale', keyScale), bindScale('v_scale', valueScale)] : []),
    ],
    outputs: [
      ['out', DataType.float, [1, 1, queryHeads * headDim], out],
      ['present_key', type, cacheDims, keyCache],
      ['present_value', type, cacheDims, valueCache],
    ],
  }
}

function bindScale(name: string, scale: number): Binding {
  return [name, DataType.float, [1], Float32Array.of(scale)]
}

// Symmetric, one scale a tensor: int8 as it is, int4 two to a byte, the low half first, both offset by 8.
function quantize(precision: Precision, from: Float32Array): [Float32Array | Int8Array | Uint8Array, number] {
  if (precision === 'float32') return [from.slice(), 1]
  const most = precision === 'int8' ? 127 : 7
  const scale = from.reduce((highest, x) => Math.max(highest, Math.abs(x)), 0) / most
  const level = (x: number) => Math.max(-most, Math.min(most, Math.round(x / scale)))
  if (precision === 'int8') return [Int8Array.from(from, level), scale]
  const packed = new Uint8Array(from.length / 2)
  for (let i = 0; i < packed.length; i++) packed[i] = (level(from[2 * i] as number) + 8) | ((level(from[2 * i + 1] as number) + 8) << 4)
  return [packed, scale]
}

function valueInfo(name: string, elemType: number, dims: number[]) {
  return create(ValueInfoSchema, { name, type: { tensorType: { elemType, shape: { dim: dims.map((size) => ({ dimValue: BigInt(size) })) } } } })
}

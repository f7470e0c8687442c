/**
 * The part of the ONNX file format that couplet reads and writes: messages declared at run time by field number. Fields that
 * are not declared here are unknown to the codec, which carries them from decoding to encoding as they are.
 *
 * Weights can be gigabytes, so initializers stay encoded: decoding makes views of the file, encoding copies each once.
 */
import { clearField, create, createFileRegistry, fromBinary, isFieldSet, toBinary } from '@bufbuild/protobuf'
import type { Message, MessageInitShape } from '@bufbuild/protobuf'
import type { GenMessage } from '@bufbuild/protobuf/codegenv2'
import { BinaryReader, BinaryWriter, WireType } from '@bufbuild/protobuf/wire'
import { FieldDescriptorProto_Label as Label, FieldDescriptorProto_Type as Type, FileDescriptorProtoSchema } from '@bufbuild/protobuf/wkt'

/** Element types of tensors that couplet meets (TensorProto.DataType). */
export const DataType = { float: 1, uint8: 2, int32: 6, int64: 7, bool: 9, float16: 10, bfloat16: 16 } as const

/** Kinds of attribute values (AttributeProto.AttributeType). */
export const AttributeType = { float: 1, int: 2, string: 3, ints: 7 } as const

export type AttributeProto = Message<'onnx.AttributeProto'> & {
  name: string
  f: number
  i: bigint
  s: Uint8Array
  t?: TensorProto
  g?: GraphProto
  ints: bigint[]
  graphs: GraphProto[]
  type: number
}

export type NodeProto = Message<'onnx.NodeProto'> & {
  input: string[]
  output: string[]
  name: string
  opType: string
  domain: string
  attribute: AttributeProto[]
}

export type TensorProto = Message<'onnx.TensorProto'> & {
  dims: bigint[]
  dataType: number
  name: string
  /** Packed little-endian elements, the usual place of the data. */
  rawData: Uint8Array
  /** The packed encoding of `repeated float`. */
  floatData: Uint8Array
  /** The packed encoding of `repeated int32`; float16 elements are the low 16 bits of each. */
  int32Data: Uint8Array
  externalData: StringPair[]
  /** 0: in this message; 1: in the file that `externalData` names. */
  dataLocation: number
}

export type StringPair = Message<'onnx.StringStringEntryProto'> & { key: string; value: string }
export type Dimension = Message<'onnx.Dimension'> & { dimValue: bigint; dimParam: string }
export type TensorShape = Message<'onnx.TensorShapeProto'> & { dim: Dimension[] }
export type TensorTypeProto = Message<'onnx.TensorTypeProto'> & { elemType: number; shape?: TensorShape }
export type TypeProto = Message<'onnx.TypeProto'> & { tensorType?: TensorTypeProto }
export type ValueInfoProto = Message<'onnx.ValueInfoProto'> & { name: string; type?: TypeProto }
export type OperatorSet = Message<'onnx.OperatorSetIdProto'> & { domain: string; version: bigint }

export type GraphProto = Message<'onnx.GraphProto'> & {
  node: NodeProto[]
  name: string
  /** Encoded TensorProto messages. */
  initializer: Uint8Array[]
  input: ValueInfoProto[]
  output: ValueInfoProto[]
  valueInfo: ValueInfoProto[]
}

export type FunctionProto = Message<'onnx.FunctionProto'> & { name: string; node: NodeProto[]; domain: string }

export type ModelProto = Message<'onnx.ModelProto'> & {
  irVersion: bigint
  /** An encoded GraphProto; unset in a decoded Model, which holds the graph beside. */
  graph: Uint8Array
  opsetImport: OperatorSet[]
  functions: FunctionProto[]
}

/** A decoded file. `initializers` maps the name of each to its encoded TensorProto, in the order of the file. */
export interface Model {
  head: ModelProto
  graph: GraphProto
  initializers: Map<string, Uint8Array>
}

type Fields = Record<string, readonly [number: number, kind: string, repeated?: 'repeated']>

/** Every declared field: its number on the wire and its type. */
const messages = {
  AttributeProto: {
    name: [1, 'string'], f: [2, 'float'], i: [3, 'int64'], s: [4, 'bytes'], t: [5, 'TensorProto'], g: [6, 'GraphProto'],
    ints: [8, 'int64', 'repeated'], graphs: [11, 'GraphProto', 'repeated'], type: [20, 'int32'],
  },
  NodeProto: {
    input: [1, 'string', 'repeated'], output: [2, 'string', 'repeated'], name: [3, 'string'], op_type: [4, 'string'],
    attribute: [5, 'AttributeProto', 'repeated'], domain: [7, 'string'],
  },
  TensorProto: {
    dims: [1, 'int64', 'repeated'], data_type: [2, 'int32'], float_data: [4, 'bytes'], int32_data: [5, 'bytes'], name: [8, 'string'],
    raw_data: [9, 'bytes'], external_data: [13, 'StringStringEntryProto', 'repeated'], data_location: [14, 'int32'],
  },
  StringStringEntryProto: { key: [1, 'string'], value: [2, 'string'] },
  Dimension: { dim_value: [1, 'int64'], dim_param: [2, 'string'] },
  TensorShapeProto: { dim: [1, 'Dimension', 'repeated'] },
  TensorTypeProto: { elem_type: [1, 'int32'], shape: [2, 'TensorShapeProto'] },
  TypeProto: { tensor_type: [1, 'TensorTypeProto'] },
  ValueInfoProto: { name: [1, 'string'], type: [2, 'TypeProto'] },
  OperatorSetIdProto: { domain: [1, 'string'], version: [2, 'int64'] },
  GraphProto: {
    node: [1, 'NodeProto', 'repeated'], name: [2, 'string'], initializer: [5, 'bytes', 'repeated'], input: [11, 'ValueInfoProto', 'repeated'],
    output: [12, 'ValueInfoProto', 'repeated'], value_info: [13, 'ValueInfoProto', 'repeated'],
  },
  FunctionProto: { name: [1, 'string'], node: [7, 'NodeProto', 'repeated'], domain: [10, 'string'] },
  ModelProto: {
    ir_version: [1, 'int64'], graph: [7, 'bytes'], opset_import: [8, 'OperatorSetIdProto', 'repeated'],
    functions: [25, 'FunctionProto', 'repeated'],
  },
} as const satisfies Record<string, Fields>

const scalars: Record<string, Type> = { string: Type.STRING, int32: Type.INT32, int64: Type.INT64, float: Type.FLOAT, bytes: Type.BYTES }

const registry = createFileRegistry(
  create(FileDescriptorProtoSchema, {
    name: 'couplet/onnx.proto',
    package: 'onnx',
    syntax: 'proto2',
    messageType: Object.entries<Fields>(messages).map(([name, fields]) => ({
      name,
      field: Object.entries(fields).map(([fieldName, [number, kind, repeated]]) => ({
        name: fieldName,
        number,
        label: repeated ? Label.REPEATED : Label.OPTIONAL,
        type: scalars[kind] ?? Type.MESSAGE,
        ...(kind in scalars ? {} : { typeName: `.onnx.${kind}` }),
      })),
    })),
  }),
  () => undefined,
)

function schema<Shape extends Message>(name: keyof typeof messages): GenMessage<Shape> {
  return registry.getMessage(`onnx.${name}`) as unknown as GenMessage<Shape>
}

export const ModelSchema = schema<ModelProto>('ModelProto')
export const GraphSchema = schema<GraphProto>('GraphProto')
export const NodeSchema = schema<NodeProto>('NodeProto')
export const TensorSchema = schema<TensorProto>('TensorProto')
export const DimensionSchema = schema<Dimension>('Dimension')
export const ValueInfoSchema = schema<ValueInfoProto>('ValueInfoProto')
export const OperatorSetSchema = schema<OperatorSet>('OperatorSetIdProto')

/** Field numbers that `encodeModel` writes by hand. */
const graphField = messages.ModelProto.graph[0]
const initializerField = messages.GraphProto.initializer[0]

/**
 * Decodes a file. Bytes of weights are views of `file`, which must not change while the model is in use.
 * @throws Error when `file` is not an ONNX model.
 */
export function decodeModel(file: Uint8Array): Model {
  const head = fromBinary(ModelSchema, new Uint8Array(file.buffer, file.byteOffset, file.byteLength))
  if (!isFieldSet(head, ModelSchema.field.graph)) throw new Error('it holds no graph')
  const graph = fromBinary(GraphSchema, head.graph)
  clearField(head, ModelSchema.field.graph)
  const initializers = new Map(graph.initializer.map((bytes) => [decodeTensor(bytes).name, bytes]))
  graph.initializer = []
  return { head, graph, initializers }
}

/** Encodes a model: the graph without its weights first, then each initializer copied once into the result. */
export function encodeModel({ head, graph, initializers }: Model): Uint8Array {
  const headBytes = toBinary(ModelSchema, head)
  const graphBytes = toBinary(GraphSchema, graph)
  const prefixes = Array.from(initializers.values(), (bytes) => lengthPrefix(initializerField, bytes.length))
  let graphLength = graphBytes.length
  let index = 0
  for (const bytes of initializers.values()) graphLength += bytes.length + prefixes[index++]!.length
  const graphPrefix = lengthPrefix(graphField, graphLength)

  const file = new Uint8Array(headBytes.length + graphPrefix.length + graphLength)
  let position = 0
  const append = (bytes: Uint8Array) => {
    file.set(bytes, position)
    position += bytes.length
  }
  append(headBytes)
  append(graphPrefix)
  append(graphBytes)
  index = 0
  for (const bytes of initializers.values()) {
    append(prefixes[index++]!)
    append(bytes)
  }
  return file
}

/** Decodes a TensorProto; its data fields are views of `bytes`. */
export function decodeTensor(bytes: Uint8Array): TensorProto {
  return fromBinary(TensorSchema, bytes)
}

export function encodeTensor(tensor: MessageInitShape<typeof TensorSchema>): Uint8Array {
  return toBinary(TensorSchema, create(TensorSchema, tensor))
}

export function createNode(node: MessageInitShape<typeof NodeSchema>): NodeProto {
  return create(NodeSchema, node)
}

/** Declares an int64 value of one element. */
export function oneInteger(name: string): ValueInfoProto {
  return create(ValueInfoSchema, { name, type: { tensorType: { elemType: DataType.int64, shape: { dim: [{ dimValue: 1n }] } } } })
}

/** The values of the packed encoding of a `repeated int32` field. */
export function unpackInt32(packed: Uint8Array): number[] {
  const reader = new BinaryReader(packed)
  const values: number[] = []
  while (reader.pos < reader.len) values.push(reader.int32())
  return values
}

function lengthPrefix(field: number, length: number): Uint8Array {
  return new BinaryWriter().tag(field, WireType.LengthDelimited).uint32(length).finish()
}

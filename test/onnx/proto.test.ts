import { BinaryReader, BinaryWriter, WireType } from '@bufbuild/protobuf/wire'
import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'

import { decodeModel, decodeTensor, encodeModel } from '../../lib/onnx/proto'
import { decoder } from './graphs'

const modelPath = join(__dirname, '../../models/tiny-llama-bytes/onnx/model.onnx')

describe('onnx proto', () => {
  it('keeps every field of a real model', () => {
    const file = readFileSync(modelPath)
    assert.deepEqual(canonical(encodeModel(decodeModel(file)), 'ModelProto'), canonical(file, 'ModelProto'))
  })

  it('keeps fields that it does not know, on every level', () => {
    const file = withUnknownFields(encodeModel(decoder()), 'ModelProto')
    const again = encodeModel(decodeModel(file))
    assert.deepEqual(canonical(again, 'ModelProto'), canonical(file, 'ModelProto'))
    assert.equal(again.length, file.length)
  })

  it('makes views of weights, not copies', () => {
    const file = readFileSync(modelPath)
    const { initializers } = decodeModel(file)
    for (const bytes of initializers.values()) {
      assert.equal(bytes.buffer, file.buffer)
      assert.equal(decodeTensor(bytes).rawData.buffer, file.buffer)
    }
  })

  it('refuses what is no model', () => {
    assert.throws(() => decodeModel(new Uint8Array(0)), /no graph/)
    assert.throws(() => decodeModel(Buffer.from('this is not a model')))
    assert.throws(() => decodeModel(readFileSync(modelPath).subarray(0, 100_000)))
  })
})

/** Fields that hold messages, by number: enough of the format to look into every level. */
const nested: Record<string, Record<number, string>> = {
  ModelProto: { 7: 'GraphProto', 8: 'OperatorSetIdProto' },
  GraphProto: { 1: 'NodeProto', 5: 'TensorProto', 11: 'ValueInfoProto', 12: 'ValueInfoProto', 13: 'ValueInfoProto' },
  NodeProto: { 5: 'AttributeProto' },
  AttributeProto: { 5: 'TensorProto', 6: 'GraphProto' },
  ValueInfoProto: { 2: 'TypeProto' },
  TypeProto: { 1: 'Tensor' },
  Tensor: { 2: 'TensorShapeProto' },
  TensorShapeProto: { 1: 'Dimension' },
}

interface Field { number: number; wireType: WireType; data: Uint8Array }

function fields(bytes: Uint8Array): Field[] {
  const reader = new BinaryReader(bytes)
  const found: Field[] = []
  while (reader.pos < reader.len) {
    const [number, wireType] = reader.tag()
    found.push({ number, wireType, data: reader.skip(wireType, number) })
  }
  return found
}

/** The content of a length-delimited field. */
const content = (data: Uint8Array) => new BinaryReader(data).bytes()

/** A message as nested lists that do not depend on the order of different fields. */
function canonical(bytes: Uint8Array, type: string): unknown[] {
  return fields(bytes)
    .map((field, place) => ({ ...field, place }))
    .sort((a, b) => a.number - b.number || a.place - b.place)
    .map(({ number, wireType, data }) => {
      const inner = wireType === WireType.LengthDelimited ? nested[type]?.[number] : undefined
      return [number, wireType, inner ? canonical(content(data), inner) : Buffer.from(data).toString('base64')]
    })
}

/** The message with four more fields, of every wire type, in itself and in every message inside. */
function withUnknownFields(bytes: Uint8Array, type: string): Uint8Array {
  const writer = new BinaryWriter().tag(90, WireType.Varint).int64(-7).tag(900, WireType.Bit32).float(1.5)
  for (const { number, wireType, data } of fields(bytes)) {
    const inner = wireType === WireType.LengthDelimited ? nested[type]?.[number] : undefined
    writer.tag(number, wireType)
    if (inner) writer.bytes(withUnknownFields(content(data), inner))
    else writer.raw(data)
  }
  return writer.tag(91, WireType.Bit64).fixed64(1n << 60n).tag(901, WireType.LengthDelimited).string(`unknown in ${type}`).finish()
}

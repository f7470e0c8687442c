// Transforms in codebook files: what comes back, which version says them, and what is refused.
import assert from 'node:assert/strict'

import { Codebook } from '../../lib'
import { headerOf, noise, withHeader } from '../codebook/samples'
import { randomTransforms } from './samples'

const [kvHeads, headDim] = [3, 16]
const codecs = [
  [{ keyCodec: '4c3b', valueCodec: '8c2b' }],
  [{ heads: 1, keyCodec: '2c2b', valueCodec: '8c2b' }, { heads: 2, keyCodec: '16c4b', valueCodec: '4c3b' }],
]
const tables = {
  keyTables: [noise(3 * 16 * 8, 1), noise(16 * 4 + 2 * 16 * 16, 2)],
  valueTables: [noise(3 * 16 * 4, 3), noise(16 * 4 + 2 * 16 * 8, 4)],
  codecs, kvHeads, headDim,
}
const plain = Codebook.fromTables(tables)
const transforms = randomTransforms(plain.codecs, headDim)
const full = Codebook.fromTables({ ...tables, transforms })
const sound = full.toBuffer()

describe('transforms of a codebook', () => {
  it('come back from a file, in float32 whatever the tables are', () => {
    for (const dtype of ['F32', 'F16'] as const) {
      const read = Codebook.fromBuffer(full.toBuffer({ dtype }))
      assert.deepEqual(read.transforms, ['key.group', 'key.metric', 'value.metric', 'value.mix', 'value.unmix'])
      assert.equal(read.metadata.formatVersion, 4)
      for (const name of read.transforms) for (const layer of [0, 1]) assert.deepEqual(read.transform(name, layer), transforms[name][layer])
      const [, second] = read.parts(1)
      assert.deepEqual(second!.keyMetric, transforms['key.metric'][1]!.subarray(16 * 2))
      assert.deepEqual(second!.valueMetric, transforms['value.metric'][1]!.subarray(16 * 8))
    }
  })

  it('are said by versions 3 and 4 alone, and a codebook without any is the file it was', () => {
    assert.equal(plain.metadata.formatVersion, 2)
    assert.deepEqual(plain.transforms, [])
    assert.deepEqual(Codebook.fromTables({ ...tables, transforms: {} }).toBuffer(), plain.toBuffer())
    assert.match(headerOf(sound), /\\"formatVersion\\":4/)
    assert.equal(Codebook.fromTables({ ...tables, transforms: { ...transforms, 'key.group': undefined } }).metadata.formatVersion, 3)
    assert.equal(plain.transform('value.mix', 0), undefined)
    const some = Codebook.fromBuffer(Codebook.fromTables({ ...tables, transforms: { 'key.metric': transforms['key.metric'] } }).toBuffer())
    assert.deepEqual(some.transforms, ['key.metric'])
    assert.deepEqual([some.parts(0)[0]!.keyMetric!.length, some.parts(0)[0]!.valueMetric], [3 * 16 * 4, undefined])
  })

  const refused = (bytes: Uint8Array, reason: RegExp) => {
    assert.throws(() => Codebook.fromBuffer(bytes), { code: 'ERR_COUPLET_CODEBOOK_INVALID', message: reason })
  }
  const edit = (from: string, to: string) => withHeader(sound, (header) => {
    assert.ok(header.includes(from), header)
    return header.replace(from, to)
  })

  it('are refused in files that do not fit together', () => {
    refused(edit('\\"value.unmix\\"]', '\\"value.twist\\"]'), /"value.unmix" for `transforms` but received "value.twist"/)
    refused(edit(',\\"value.unmix\\"]', ']'), /"value.mix" and "value.unmix" or none/)
    refused(edit('\\"value.metric\\",', '\\"key.metric\\",'), /every name once/)
    refused(edit('\\"value.metric\\",', ''), /tensors, not/)
    refused(edit('[\\"key.group\\"', '[7,\\"key.group\\"'), /transforms/)
    refused(edit('layers.0.key.metric"', 'layers.0.key.mettic"'), /no tensor "layers.0.key.metric"/)
    refused(edit('"shape":[3,16,16]', '"shape":[3,8,32]'), /has shape/)
    refused(edit('\\"formatVersion\\":4', '\\"formatVersion\\":2'), /tensors, not/)
    refused(edit('\\"formatVersion\\":4', '\\"formatVersion\\":3'), /formatVersion of 4 with "key.group"/)
  })

  it('are refused with a NaN, and where unmixing does not undo mixing', () => {
    const at = (name: string) => {
      const header = JSON.parse(headerOf(sound)) as Record<string, { data_offsets: [number, number] }>
      return sound.length - Math.max(...Object.values(header).flatMap(({ data_offsets: offsets }) => offsets ?? [0])) + header[name]!.data_offsets[0]
    }
    const changed = (name: string, value: number) => {
      const bytes = sound.slice()
      new DataView(bytes.buffer).setFloat32(at(name) + 4 * 5, value, true)
      return bytes
    }
    refused(changed('layers.0.key.metric', NaN), /"layers.0.key.metric" has a NaN/)
    refused(changed('layers.0.value.mix', Infinity), /"layers.0.value.mix" has a NaN or an infinity/)
    refused(changed('layers.1.heads.1.value.unmix', 3), /value.unmix of layer 1 does not undo value.mix/)
    refused(changed('layers.0.value.mix', 3e38), /does not undo/)
  })

  it('are refused by name from a program', () => {
    const attempt = (given: object) => () => Codebook.fromTables({ ...tables, transforms: given })
    assert.throws(attempt({ 'value.mix': transforms['value.mix'] }), /"value.unmix" or none/)
    assert.throws(attempt({ 'key.mix': [] }), /for `transforms`/)
    assert.throws(attempt({ 'key.metric': [transforms['key.metric'][0]] }), /arrays of 2 layers/)
    assert.throws(attempt({ 'key.metric': transforms['value.metric'] }), /elements/)
    assert.throws(attempt({ 'key.metric': transforms['key.metric'].map((array) => array.map(() => NaN)) }), { code: 'ERR_COUPLET_NOT_FINITE', layer: 0 })
    assert.throws(attempt({ ...transforms, 'value.unmix': transforms['value.mix'] }), /inverses of value.mix/)
  })
})

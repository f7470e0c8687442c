// Codebooks whose codecs differ by layer and head: their files, and what is refused.
import assert from 'node:assert/strict'

import fc from 'fast-check'

import { Codebook } from '../../lib'
import type { CodebookTables, HeadCodecsLike } from '../../lib'
import { headerOf, noise, sampleCodebook, withHeader } from './samples'

/** 2 layers of 3 kv heads of 16 channels. */
const codecs: HeadCodecsLike[][] = [
  [{ keyCodec: '4c3b', valueCodec: '8c2b' }],
  [{ heads: 1, keyCodec: '2c2b', valueCodec: '8c2b' }, { heads: 2, keyCodec: '16c4b', valueCodec: '4c3b' }],
]

function mixedTables(): CodebookTables {
  const keyTables = [noise(3 * 16 * 8, 1), noise(16 * 4 + 2 * 16 * 16, 2)]
  const valueTables = [noise(3 * 16 * 4, 3), noise(16 * 4 + 2 * 16 * 8, 4)]
  return { keyTables, valueTables, codecs, kvHeads: 3, headDim: 16 }
}

const sound = Codebook.fromTables(mixedTables()).toBuffer()
const edit = (from: string, to: string): Uint8Array => withHeader(sound, (header) => {
  assert.ok(header.includes(from), header)
  return header.replace(from, to)
})

const firstPart = '{\\"heads\\":3,\\"key\\":\\"cq-4c3b\\",\\"value\\":\\"cq-8c2b\\"}'

describe('a codebook of mixed codecs', () => {
  it('says what it is made of, part by part', () => {
    const tables = mixedTables()
    const codebook = Codebook.fromTables(tables)
    assert.deepEqual([codebook.keyCodec, codebook.valueCodec, codebook.metadata.formatVersion], [undefined, undefined, 2])
    assert.deepEqual(codebook.codecs.map((parts) => parts.map(({ firstHead, heads }) => [firstHead, heads])), [[[0, 3]], [[0, 1], [1, 2]]])
    const [first, second] = codebook.parts(1)
    assert.deepEqual([first!.keyCodec.name, second!.keyCodec.name, second!.valueCodec.name], ['cq-2c2b', 'cq-16c4b', 'cq-4c3b'])
    assert.deepEqual(second!.keyTable, tables.keyTables[1]!.subarray(16 * 4))
    assert.deepEqual(second!.valueTable, tables.valueTables[1]!.subarray(16 * 4))
    assert.deepEqual(codebook.parts(0)[0]!.keyTable, tables.keyTables[0])
  })

  it('has a codec where one side has the same everywhere', () => {
    const one = Codebook.fromTables({
      keyTables: [noise(16 * 8, 1), noise(16 * 8, 2)], valueTables: [noise(16 * 4, 3), noise(16 * 8, 4)], kvHeads: 1, headDim: 16,
      codecs: [[{ keyCodec: '4c3b', valueCodec: '8c2b' }], [{ keyCodec: '4c3b', valueCodec: '8c3b' }]],
    })
    assert.deepEqual([one.keyCodec?.name, one.valueCodec], ['cq-4c3b', undefined])
  })

  it('is a file of version 1 where version 1 says everything', () => {
    const plain = sampleCodebook()
    const [keyTables, valueTables] = [[0, 1].map((layer) => plain.keyTable(layer)), [0, 1].map((layer) => plain.valueTable(layer))]
    const codecs = [0, 1].map(() => [{ keyCodec: '4c3b', valueCodec: '8c2b' }])
    const same = Codebook.fromTables({ kvHeads: 2, headDim: 16, keyTables, valueTables, codecs, metadata: plain.metadata })
    assert.deepEqual(same.toBuffer(), plain.toBuffer())
    assert.match(headerOf(plain.toBuffer()), /\\"formatVersion\\":1,\\"keyCodec\\":\\"cq-4c3b\\"/)
  })

  it('has a tensor for each part of a layer', () => {
    const { __metadata__: metadata, ...tensors } = JSON.parse(headerOf(sound)) as Record<string, { shape: number[]; couplet: string }>
    assert.deepEqual(Object.entries(tensors).map(([name, { shape }]) => `${name} ${shape.join('x')}`), [
      'layers.0.key 3x4x8x4', 'layers.0.value 3x2x4x8',
      'layers.1.heads.0.key 1x8x4x2', 'layers.1.heads.1.key 2x1x16x16', 'layers.1.heads.0.value 1x2x4x8', 'layers.1.heads.1.value 2x4x8x4',
    ])
    assert.deepEqual((JSON.parse(metadata!.couplet) as { codecs: unknown }).codecs, [
      [{ heads: 3, key: 'cq-4c3b', value: 'cq-8c2b' }],
      [{ heads: 1, key: 'cq-2c2b', value: 'cq-8c2b' }, { heads: 2, key: 'cq-16c4b', value: 'cq-4c3b' }],
    ])
  })

  it('comes back from a file whatever its parts', () => {
    const name = fc.constantFrom('1c1b', '2c2b', '4c3b', '8c2b', '16c4b')
    const part = fc.record({ heads: fc.integer({ min: 1, max: 3 }), keyCodec: name, valueCodec: name })
    const layer = fc.array(part, { minLength: 1, maxLength: 3 })
    fc.assert(fc.property(fc.array(layer, { minLength: 1, maxLength: 3 }), fc.constantFrom('F16' as const, 'F32' as const), (given, dtype) => {
      const kvHeads = Math.max(...given.map((parts) => parts.reduce((sum, { heads }) => sum + heads, 0)))
      for (const parts of given) parts[0]!.heads += kvHeads - parts.reduce((sum, { heads }) => sum + heads, 0)
      const elements = (parts: typeof given[0], side: 'keyCodec' | 'valueCodec') =>
        parts.reduce((sum, { heads, [side]: codec }) => sum + heads * 16 * 2 ** Number(/c(\d+)b/.exec(codec)![1]), 0)
      const tables = (side: 'keyCodec' | 'valueCodec') => given.map((parts, index) => noise(elements(parts, side), index + side.length))
      const made = Codebook.fromTables({ keyTables: tables('keyCodec'), valueTables: tables('valueCodec'), codecs: given, kvHeads, headDim: 16 })
      const read = Codebook.fromBuffer(made.toBuffer({ dtype }))
      assert.deepEqual(read.codecs, made.codecs)
      assert.deepEqual(read.metadata, made.metadata)
      for (let index = 0; index < given.length; index++) assert.deepEqual(read.parts(index), made.parts(index))
    }), { numRuns: 60 })
  })

  const hostile: [string, Uint8Array, RegExp][] = [
    ['parts of too few heads', edit('\\"heads\\":2', '\\"heads\\":1'), /parts of 3 heads/],
    ['parts of too many heads', edit('\\"heads\\":1', '\\"heads\\":2'), /parts of 3 heads/],
    ['a part without heads', edit('\\"heads\\":1', '\\"heads\\":0'), /heads/],
    ['a part of half a head', edit('\\"heads\\":1', '\\"heads\\":0.5'), /heads/],
    ['a part of a thousand million heads', edit('\\"heads\\":1', '\\"heads\\":1000000000'), /heads/],
    ['heads of less than nothing', edit('\\"heads\\":1', '\\"heads\\":-1'), /heads/],
    ['a layer without parts', edit(`[${firstPart}]`, '[]'), /parts of 3 heads/],
    ['a layer that is no list', edit(`[${firstPart}]`, '3'), /array/],
    ['a part that is no object', edit(firstPart, '3'), /object/],
    ['codecs of fewer layers', edit(`[${firstPart}],`, ''), /2 layers/],
    ['a codec that is no text', edit('\\"key\\":\\"cq-2c2b\\"', '\\"key\\":2'), /codecs\[1\].key/],
    ['a codec of too many channels', edit('cq-16c4b', 'cq-32c4b'), /headDim 16/],
    ['a codec of 13 bits', edit('cq-16c4b', 'cq-16c13b'), /codeBits/],
    ['another codec than the tensors have', edit('cq-16c4b', 'cq-8c4b'), /shape/],
    ['a tensor of other heads', edit('layers.1.heads.1.key', 'layers.1.heads.2.key'), /no tensor "layers.1.heads.1.key"/],
    ['more parts than tensors', edit(firstPart, `${firstPart.replace('3', '1')},${firstPart.replace('3', '2')}`), /6 tensors, not 8/],
    ['version 1 with codecs by part', edit('\\"formatVersion\\":2', '\\"formatVersion\\":1'), /keyCodec/],
  ]
  for (const [what, file, message] of hostile) {
    it(`refuses a file with ${what}`, () => {
      assert.throws(() => Codebook.fromBuffer(file), { name: 'CoupletError', code: 'ERR_COUPLET_CODEBOOK_INVALID', message })
    })
  }

  it('keeps how its codecs were chosen, and refuses what that cannot be', () => {
    const chosen = { budget: 1.5, bits: 1.25, loss: 0.01, measure: 'divergence', sinks: 4, window: 32, candidates: ['cq-8c8b'] } as const
    const learned = { weights: 'attention', iterations: 3, seed: '1', tokens: 9, chosen } as const
    const made = Codebook.fromTables({ ...mixedTables(), metadata: { learned } })
    assert.deepEqual(Codebook.fromBuffer(made.toBuffer()).metadata.learned, learned)
    const wrong: [object, RegExp][] = [
      [{ budget: '1' }, /chosen.budget/], [{ bits: null }, /chosen.bits/], [{ loss: undefined }, /chosen.loss/], [{ measure: 'guess' }, /chosen.measure/],
      [{ sinks: -1 }, /chosen.sinks/], [{ window: 0.5 }, /chosen.window/], [{ candidates: 'cq-8c8b' }, /chosen.candidates/],
      [{ candidates: [8] }, /chosen.candidates/],
    ]
    for (const [change, message] of wrong) {
      const metadata = { learned: { ...learned, chosen: { ...chosen, ...change } as never } }
      assert.throws(() => Codebook.fromTables({ ...mixedTables(), metadata }), { code: 'ERR_COUPLET_INVALID_ARGUMENT', message })
    }
  })

  const misused: [string, Partial<CodebookTables>, RegExp][] = [
    ['codecs for all and by part', { keyCodec: '4c3b' }, /either/],
    ['codecs that are no list', { codecs: {} as never }, /`codecs`/],
    ['codecs of another number of layers', { codecs: codecs.slice(1) }, /2 layers/],
    ['a part that is null', { codecs: [codecs[0]!, [null as never]] }, /`codecs\[1\]`/],
    ['no codecs at all', { codecs: undefined }, /codec/],
    ['a table of too few elements', { keyTables: [noise(3 * 16 * 8, 1), noise(16 * 4, 2)] }, /keyTables\[1\]/],
  ]
  for (const [what, change, message] of misused) {
    it(`refuses ${what}`, () => {
      assert.throws(() => Codebook.fromTables({ ...mixedTables(), ...change }), { code: 'ERR_COUPLET_INVALID_ARGUMENT', message })
    })
  }
})

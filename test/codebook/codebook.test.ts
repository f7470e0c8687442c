import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync, readdirSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import fc from 'fast-check'

import { Codebook, CoupletError, codec } from '../../lib'
import { headerOf, learned, noise, sampleCodebook, sampleTables } from './samples'

describe('Codebook', () => {
  let folder: string
  before(() => {
    folder = mkdtempSync(join(tmpdir(), 'couplet-codebook-'))
  })
  after(() => rmSync(folder, { recursive: true }))

  it('says what it is made of', () => {
    const tables = sampleTables()
    const codebook = sampleCodebook()
    assert.equal(codebook.keyCodec?.name, 'cq-4c3b')
    assert.equal(codebook.valueCodec?.name, 'cq-8c2b')
    assert.deepEqual([codebook.layers, codebook.kvHeads, codebook.headDim], [2, 2, 16])
    assert.deepEqual(codebook.metadata, learned)
    assert.deepEqual(codebook.keyTable(1), tables.keyTables[1])
    assert.deepEqual(codebook.valueTable(0), tables.valueTables[0])
  })

  it('keeps its own copy of the tables', () => {
    const tables = sampleTables()
    const codebook = Codebook.fromTables(tables)
    tables.keyTables[0]?.fill(7)
    assert.deepEqual(codebook.keyTable(0), sampleTables().keyTables[0])
  })

  for (const dtype of ['F32', 'F16'] as const) {
    it(`comes back from a ${dtype} file as it was`, async () => {
      const codebook = sampleCodebook()
      const path = join(folder, `${dtype}.safetensors`)
      await codebook.save(path, { dtype })
      for (const other of [await Codebook.load(path), Codebook.loadSync(path), Codebook.fromBuffer(codebook.toBuffer({ dtype }))]) {
        assert.deepEqual(other.metadata, codebook.metadata)
        for (const layer of [0, 1]) {
          assert.deepEqual(other.keyTable(layer), codebook.keyTable(layer))
          assert.deepEqual(other.valueTable(layer), codebook.valueTable(layer))
        }
      }
      codebook.saveSync(`${path}.sync`, { dtype })
      assert.deepEqual(readFileSync(`${path}.sync`), readFileSync(path))
      assert.deepEqual(Uint8Array.from(readFileSync(path)), Uint8Array.from(codebook.toBuffer({ dtype })))
    })
  }

  it('comes back whatever its shape', () => {
    fc.assert(
      fc.property(
        fc.record({
          layers: fc.integer({ min: 1, max: 4 }),
          kvHeads: fc.integer({ min: 1, max: 3 }),
          groups: fc.integer({ min: 1, max: 4 }),
          groupChannels: fc.constantFrom(1, 2, 4, 8),
          keyBits: fc.integer({ min: 1, max: 6 }),
          valueBits: fc.integer({ min: 1, max: 6 }),
          dtype: fc.constantFrom('F16' as const, 'F32' as const),
        }),
        ({ layers, kvHeads, groups, groupChannels, keyBits, valueBits, dtype }) => {
          const headDim = groups * 8
          const table = (bits: number) => (_: unknown, layer: number) => noise(kvHeads * headDim * 2 ** bits, layer * 13 + bits)
          const keyTables = Array.from({ length: layers }, table(keyBits))
          const valueTables = Array.from({ length: layers }, table(valueBits))
          const made = Codebook.fromTables({
            ...{ kvHeads, headDim, keyTables, valueTables },
            keyCodec: { groupChannels, codeBits: keyBits },
            valueCodec: { groupChannels, codeBits: valueBits },
          })
          const read = Codebook.fromBuffer(made.toBuffer({ dtype }))
          assert.deepEqual(read.metadata, { formatVersion: 1, rotary: null, model: null, learned: null })
          for (let layer = 0; layer < layers; layer++) {
            assert.deepEqual(read.keyTable(layer), keyTables[layer])
            assert.deepEqual(read.valueTable(layer), valueTables[layer])
          }
        },
      ),
      { numRuns: 60 },
    )
  })

  it('writes what the format asks for: aligned data, a string map, tensors without a gap', () => {
    const file = sampleCodebook().toBuffer({ dtype: 'F16' })
    const header = headerOf(file)
    assert.equal((8 + header.length) % 8, 0)
    const { __metadata__: metadata, ...tensors } = JSON.parse(header) as Record<string, Record<string, unknown>>
    assert.ok(Object.values(metadata ?? {}).every((text) => typeof text === 'string'))
    assert.deepEqual(Object.keys(tensors), ['layers.0.key', 'layers.0.value', 'layers.1.key', 'layers.1.value'])
    assert.deepEqual(tensors['layers.0.key'], { dtype: 'F16', shape: [2, 4, 8, 4], data_offsets: [0, 512] })
    assert.deepEqual(tensors['layers.0.value'], { dtype: 'F16', shape: [2, 2, 4, 8], data_offsets: [512, 768] })
    assert.equal(file.length, 8 + header.length + 2 * 768)
  })

  it("opens in Python's safetensors", function () {
    if (spawnSync('python3', ['-c', 'import safetensors, numpy']).status !== 0) this.skip()
    const path = join(folder, 'python.safetensors')
    sampleCodebook().saveSync(path)
    const script = [
      'import sys, json; from safetensors import safe_open',
      'f = safe_open(sys.argv[1], "numpy")',
      't = f.get_tensor("layers.1.value")',
      'print(json.dumps([f.metadata()["format"], list(t.shape), str(t.dtype), float(t.reshape(-1)[5])]))',
    ].join('\n')
    const { stdout, stderr } = spawnSync('python3', ['-c', script, path], { encoding: 'utf8' })
    const value = sampleTables().valueTables[1]?.[5]
    assert.deepEqual(JSON.parse(stdout || JSON.stringify(stderr)), ['couplet.codebook', [2, 2, 4, 8], 'float32', value])
  })

  it('replaces a file in one step and leaves nothing else behind', async () => {
    const path = join(folder, 'replaced.safetensors')
    writeFileSync(path, 'something else')
    await sampleCodebook().save(path)
    assert.equal(Codebook.loadSync(path).layers, 2)
    const before = readFileSync(path)
    const tables = sampleTables()
    tables.keyTables[1]?.fill(1e5) // the first layer is written before the second one is found to be too large
    const tooLarge = Codebook.fromTables(tables)
    await assert.rejects(tooLarge.save(path, { dtype: 'F16' }), { name: 'RangeError', code: 'ERR_COUPLET_INVALID_ARGUMENT', message: /layer 1/ })
    assert.throws(() => tooLarge.saveSync(path, { dtype: 'F16' }), { name: 'RangeError' })
    assert.deepEqual(readFileSync(path), before)
    await assert.rejects(sampleCodebook().save(join(folder, 'no', 'such', 'folder')), { code: 'ENOENT' })
    assert.deepEqual(readdirSync(folder).filter((name) => name.includes('partial')), [])
  })

  describe('check', () => {
    it('accepts what it is for, and what is not stated', () => {
      const codebook = sampleCodebook()
      codebook.check({})
      codebook.check({ layers: 2, kvHeads: 2, headDim: 16, model: 'sha256:0123', rotary: { kind: 'half', dim: 16, theta: 10000 } })
      codebook.check({ rotary: null })
      codebook.check({ rotary: { kind: 'half', dim: 16 } })
      Codebook.fromTables({ ...sampleTables(), metadata: undefined }).check({ model: 'another', rotary: { kind: 'interleaved', dim: 8 } })
    })

    it('names both sides of every difference', () => {
      assert.throws(
        () => sampleCodebook().check({ layers: 3, kvHeads: 2, headDim: 64, model: 'sha256:4567' }),
        (error: CoupletError) => {
          assert.ok(error instanceof CoupletError)
          assert.equal(error.code, 'ERR_COUPLET_CODEBOOK_MISMATCH')
          assert.equal(
            error.message,
            'Expected a codebook for layers 3, headDim 64, model "sha256:4567" but received one for layers 2, headDim 16, model "sha256:0123"',
          )
          return true
        },
      )
      for (const rotary of [{ kind: 'interleaved', dim: 16 } as const, { kind: 'half', dim: 8 } as const, { kind: 'half', dim: 16, theta: 5e5 } as const])
        assert.throws(() => sampleCodebook().check({ rotary }), { code: 'ERR_COUPLET_CODEBOOK_MISMATCH' })
    })
  })

  it('throws ERR_COUPLET_DISPOSED after dispose, which may be called twice', async () => {
    const codebook = sampleCodebook()
    codebook.dispose()
    codebook[Symbol.dispose]()
    assert.equal(codebook.layers, 2)
    assert.throws(() => codebook.keyTable(0), { code: 'ERR_COUPLET_DISPOSED' })
    assert.throws(() => codebook.toBuffer(), { code: 'ERR_COUPLET_DISPOSED' })
    await assert.rejects(codebook.save(join(folder, 'never')), { code: 'ERR_COUPLET_DISPOSED' })
  })

  it('stops loading for an AbortSignal', async () => {
    const path = join(folder, 'signal.safetensors')
    sampleCodebook().saveSync(path)
    const reason = new Error('enough')
    await assert.rejects(Codebook.load(path, { signal: AbortSignal.abort(reason) }), reason)
  })

  const misuse: [string, (tables: ReturnType<typeof sampleTables>) => unknown, object][] = [
    ['no tables', () => undefined, { name: 'TypeError', message: 'Expected an object for `tables` but received undefined' }],
    ['an unknown codec', (tables) => ({ ...tables, keyCodec: '8x8' }), { name: 'RangeError', message: /"8x8"/ }],
    ['a codec that does not divide headDim', (tables) => ({ ...tables, keyCodec: '5c2b' }), { name: 'RangeError', message: /headDim 16/ }],
    ['13 bits', (tables) => ({ ...tables, keyCodec: { groupChannels: 4, codeBits: 13 } }), { name: 'RangeError', message: /codeBits/ }],
    ['no layers', (tables) => ({ ...tables, keyTables: [], valueTables: [] }), { name: 'RangeError', message: /layers/ }],
    ['fewer value tables', (tables) => ({ ...tables, valueTables: tables.valueTables.slice(1) }), { name: 'RangeError', message: /2 tables/ }],
    ['a short table', (tables) => ({ ...tables, keyTables: [new Float32Array(3), tables.keyTables[1]] }), { name: 'RangeError', message: /keyTables\[0\]/ }],
    ['plain arrays', (tables) => ({ ...tables, keyTables: [[], []] }), { name: 'TypeError', message: /keyTables/ }],
    ['metadata that are null', (tables) => ({ ...tables, metadata: null }), { name: 'TypeError', message: /`metadata`/ }],
    ['an odd rotary', (tables) => ({ ...tables, metadata: { rotary: { kind: 'half', dim: 3 } } }), { name: 'RangeError', message: /rotary\.dim/ }],
    ['a strange weighting', (tables) => ({ ...tables, metadata: { learned: { ...learned.learned, weights: 'none' } } }), { message: /learned\.weights/ }],
    ['a seed that is no number', (tables) => ({ ...tables, metadata: { learned: { ...learned.learned, seed: '-1' } } }), { message: /learned\.seed/ }],
  ]
  for (const [what, change, error] of misuse)
    it(`refuses ${what}`, () => {
      assert.throws(() => Codebook.fromTables(change(sampleTables()) as never), { code: 'ERR_COUPLET_INVALID_ARGUMENT', ...error })
    })

  it('refuses metadata that JSON cannot hold', () => {
    const given = { ...sampleTables(), metadata: { learned: 5n as never } }
    assert.throws(() => Codebook.fromTables(given), { code: 'ERR_COUPLET_INVALID_ARGUMENT', message: /`metadata`.*BigInt/ })
  })

  it('refuses a NaN and names the layer', () => {
    const tables = sampleTables()
    tables.valueTables[1]?.fill(NaN, 9, 10)
    assert.throws(() => Codebook.fromTables(tables), { code: 'ERR_COUPLET_NOT_FINITE', layer: 1, message: /valueTables\[1\]/ })
  })

  it('refuses a layer it does not have, and a dtype it does not know', () => {
    const codebook = sampleCodebook()
    assert.throws(() => codebook.keyTable(2), { name: 'RangeError', message: 'Expected an integer from 0 to 1 for `layer` but received 2' })
    assert.throws(() => codebook.keyTable(0.5), { name: 'RangeError' })
    for (const layer of ['0', 'length', [0], {}]) assert.throws(() => codebook.parts(layer as never), { name: 'TypeError', message: /`layer`/ })
    assert.throws(() => codebook.toBuffer(null as never), { name: 'TypeError', message: /`options`/ })
    assert.throws(() => codebook.toBuffer({ dtype: 'BF16' as 'F16' }), { name: 'RangeError', message: /"BF16"/ })
    assert.throws(() => Codebook.fromBuffer('abc' as never), { name: 'TypeError' })
  })
})

describe('codec', () => {
  it('reads names and numbers', () => {
    assert.deepEqual(codec('cq-8c10b'), { name: 'cq-8c10b', groupChannels: 8, codeBits: 10, centroids: 1024, bitsPerChannel: 1.25 })
    assert.deepEqual(codec('8c10b'), codec({ groupChannels: 8, codeBits: 10 }))
    assert.deepEqual(codec(codec('16c12b')), codec('16c12b'))
  })

  it('refuses everything else', () => {
    const names = ['', 'cq', '8c', '8c0b', '0c8b', '8c13b', '257c8b', 'cq-8c8', ' 8c8b', '8C8B']
    for (const bad of [...names, null, undefined, 8, {}, { groupChannels: 1.5, codeBits: 2 }])
      assert.throws(() => codec(bad as never), { code: 'ERR_COUPLET_INVALID_ARGUMENT' }, JSON.stringify(bad))
  })
})

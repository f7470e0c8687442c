// plan() says beforehand what statistics() says afterwards.
import assert from 'node:assert/strict'
import { Cache, Codebook, codec, type Sequence } from '../../lib'
import { plan, type PlannedCache } from '../../lib/plan'

const shape = { layers: 2, kvHeads: 2, headDim: 32 }

function codebookOf(name: string): Codebook {
  const { centroids } = codec(name)
  const table = new Float32Array(shape.kvHeads * shape.headDim * centroids)
  return Codebook.fromTables({ keyTables: [table, table], valueTables: [table, table], keyCodec: name, valueCodec: name, ...shape })
}

function append(cache: Cache, sequences: Sequence[], tokens: number): void {
  const rows = sequences.map((sequence) => ({ sequence, tokens }))
  const data = new Float32Array(tokens * shape.kvHeads * shape.headDim)
  using step = cache.begin(rows)
  for (let layer = 0; layer < shape.layers; layer++) step.appendSync(layer, rows.map(() => ({ keys: data, values: data })))
  step.commit()
}

function only(caches: PlannedCache[]): PlannedCache {
  return caches.at(-1) ?? assert.fail()
}

describe('plan', () => {
  for (const name of ['cq-8c8b', 'cq-8c10b', 'cq-2c3b', 'cq-16c5b']) {
    it(`${name}: pages, full-precision tokens and codebook are those of a cache`, () => {
      using codebook = codebookOf(name)
      for (const sinks of [0, 4, 20, 70]) {
        for (const window of [0, 1, 32, 33]) {
          using cache = new Cache({ codebook, queryHeads: 2, sinks, window, threads: 1 })
          const sequences = [cache.sequence(), cache.sequence()]
          let length = 0
          for (const next of [1, 3, 4, 5, 20, 36, 37, 64, 69, 100, 117, 197, 198]) {
            append(cache, sequences, next - length)
            length = next
            const { pageBytes, rawBytes, codebookBytes, bitsPerChannel } = cache.statistics()
            const planned = only(plan({ ...shape, context: length, sequences: 2, sinks, window, codecs: [name] }))
            assert.deepEqual({ ...planned, name: undefined, longestContext: undefined, totalBytes: undefined },
              { pageBytes, rawBytes, codebookBytes, bitsPerChannel, name: undefined, longestContext: undefined, totalBytes: undefined })
            assert.equal(planned.totalBytes, pageBytes + rawBytes + codebookBytes)
          }
        }
      }
    })
  }

  it('mixed codecs: likewise, by the codebook', () => {
    const layers = [
      { keyTable: new Float32Array(2 * 32 * 256), valueTable: new Float32Array(2 * 32 * 8), codecs: [{ keyCodec: '8c8b', valueCodec: '4c3b' }] },
      {
        keyTable: new Float32Array(32 * (4 + 1024)), valueTable: new Float32Array(2 * 32 * 256),
        codecs: [{ heads: 1, keyCodec: '2c2b', valueCodec: '16c8b' }, { heads: 1, keyCodec: '32c10b', valueCodec: '16c8b' }],
      },
    ]
    using codebook = Codebook.fromTables({
      keyTables: layers.map(({ keyTable }) => keyTable), valueTables: layers.map(({ valueTable }) => valueTable),
      codecs: layers.map(({ codecs }) => codecs), kvHeads: 2, headDim: 32,
    })
    using cache = new Cache({ codebook, queryHeads: 2, sinks: 4, window: 32, threads: 1 })
    append(cache, [cache.sequence()], 1000)
    const { pageBytes, rawBytes, codebookBytes, bitsPerChannel } = cache.statistics()
    const { name, ...planned } = only(plan({ ...shape, context: 1000, sequences: 1, codecs: [], codebooks: [codebook] }))
    // 2 heads of 1 and of 3/4 bits; heads of 1 and of 10/32 bits, with values of 1/2.
    assert.equal(name, 'mixed-0.727')
    const totalBytes = pageBytes + rawBytes + codebookBytes
    assert.deepEqual(planned, { pageBytes, rawBytes, codebookBytes, bitsPerChannel, totalBytes, longestContext: undefined })
    using other = codebookOf('cq-8c8b')
    assert.equal(only(plan({ ...shape, context: 1, codebooks: [other] })).name, 'cq-8c8b')
    assert.throws(() => plan({ ...shape, kvHeads: 4, context: 1, codebooks: [other] }), { code: 'ERR_COUPLET_CODEBOOK_MISMATCH' })
    assert.throws(() => plan({ ...shape, context: 1, codebooks: ['file' as never] }), { code: 'ERR_COUPLET_INVALID_ARGUMENT' })
  })

  it('the longest context is what a cache with that memory reaches, token by token', () => {
    using codebook = codebookOf('cq-8c8b')
    const { codebookBytes } = only(plan({ ...shape, context: 1, codecs: ['cq-8c8b'] }))
    const cases = [[100_000, 1, 4, 32], [61_000, 1, 0, 0], [250_000, 2, 4, 32], [90_000, 1, 70, 3], [33_000, 1, 4, 1], [5, 1, 4, 32]] as const
    for (const [memory, sequences, sinks, window] of cases) {
      const { longestContext } = only(plan({ ...shape, context: 1, sequences, sinks, window, codecs: ['cq-8c8b'], budget: codebookBytes + memory }))
      using cache = new Cache({ codebook, queryHeads: 2, sinks, window, memory, threads: 1 })
      const all = Array.from({ length: sequences }, () => cache.sequence())
      let reached = 0
      assert.throws(() => {
        for (; reached < 5000; reached++) append(cache, all, 1)
      }, { code: 'ERR_COUPLET_CACHE_FULL' })
      assert.equal(longestContext, reached, `${memory} bytes, ${sequences} sequences, sinks ${sinks}, window ${window}`)
    }
    assert.equal(only(plan({ ...shape, context: 1, codecs: ['cq-8c8b'], budget: codebookBytes - 1 })).longestContext, 0)
  })

  it('float16 and integers by their formulas; the usual codecs that fit', () => {
    const caches = plan({ layers: 32, kvHeads: 8, headDim: 128, context: 32768, budget: 4.3e9 })
    assert.deepEqual(caches.map(({ name }) => name), ['float16', 'int8', 'int4', 'cq-2c8b', 'cq-4c8b', 'cq-8c10b', 'cq-8c8b', 'cq-16c12b'])
    const [float16, int8, int4] = caches
    assert.equal(float16?.totalBytes, 32 * 2 * 8 * 128 * 2 * 32768)
    assert.equal(float16.longestContext, Math.floor(4.3e9 / (32 * 2 * 8 * 128 * 2)))
    assert.equal(int8?.bitsPerChannel, 8.5)
    assert.equal(int4?.bitsPerChannel, 4.5)
    assert.equal(caches[6]?.pageBytes, 32 * 2 * 8 * 128 / 8 * Math.ceil((32768 - 32) / 64) * 64)
    assert.deepEqual(plan({ layers: 1, kvHeads: 1, headDim: 40, context: 1 }).map(({ name }) => name).slice(3), ['cq-2c8b', 'cq-4c8b', 'cq-8c10b', 'cq-8c8b'])
  })

  it('refuses what no cache could have', () => {
    const refused = { code: 'ERR_COUPLET_INVALID_ARGUMENT' }
    const counts = [{ context: 0 }, { sequences: 0 }, { headDim: 33 }, { budget: 0 }, { sinks: -1 }, { window: 1.5 }]
    for (const change of [...counts, { codecs: ['cq-3c8b'] }, { codecs: 'cq-8c8b' }, { codebooks: {} }]) {
      assert.throws(() => plan({ ...shape, context: 10, ...change } as never), refused, JSON.stringify(change))
    }
    assert.throws(() => plan(undefined as never), refused)
  })
})

// Codecs that differ by layer and head: every layer and head computes what a cache of its codecs alone computes.
import assert from 'node:assert/strict'

import type { CacheOptions, CoupletError, DeviceName, HeadCodecsLike, Sequence } from '../../lib'
import { Cache, Codebook, codec, codesBytes } from '../../lib'
import { describeOn } from '../device/devices'
import { pageTokens, random, rotary, rows } from './model'

const [layers, queryHeads, kvHeads, headDim] = [3, 4, 2, 64]
const next = random(31)
const pairs = {
  wide: { keyCodec: '4c8b', valueCodec: '8c8b' },
  narrow: { keyCodec: '16c12b', valueCodec: '16c8b' },
}
type Pair = keyof typeof pairs

/** Tables of one layer and head. */
const tablesOf = (pair: Pair): { key: Float32Array; value: Float32Array } => {
  const { keyCodec, valueCodec } = pairs[pair]
  const table = (name: string) => rows(headDim * codec(name).centroids, next)
  return { key: table(keyCodec), value: table(valueCodec) }
}
const everyLayer = Array.from({ length: layers }, (_, layer) => layer)
const heads = Array.from({ length: kvHeads }, (_, head) => head)
const known = { wide: everyLayer.map(() => heads.map(() => tablesOf('wide'))), narrow: everyLayer.map(() => heads.map(() => tablesOf('narrow'))) }

const joined = (parts: readonly Float32Array[]): Float32Array => {
  const all = new Float32Array(parts.reduce((length, part) => length + part.length, 0))
  parts.reduce((at, part) => (all.set(part, at), at + part.length), 0)
  return all
}

/** The codebook whose heads have these pairs, [layers][kvHeads]; neighbours that are alike share a part. */
function bookOf(pairOf: readonly (readonly Pair[])[]): Codebook {
  const side = (name: 'key' | 'value') => pairOf.map((own, layer) => joined(own.map((pair, head) => known[pair][layer]![head]![name])))
  const codecs = pairOf.map((own) => own.reduce<(HeadCodecsLike & { heads: number })[]>((parts, pair, head) => {
    const last = parts.at(-1)
    if (last && own[head - 1] === pair) last.heads++
    else parts.push({ heads: 1, ...pairs[pair] })
    return parts
  }, []))
  return Codebook.fromTables({ keyTables: side('key'), valueTables: side('value'), codecs, kvHeads, headDim })
}

const layout: Pair[][] = [['wide', 'wide'], ['narrow', 'narrow'], ['narrow', 'wide']]
const mixed = bookOf(layout)
const alone = { wide: bookOf(everyLayer.map(() => ['wide', 'wide'])), narrow: bookOf(everyLayer.map(() => ['narrow', 'narrow'])) }

interface Input { queries: Float32Array; keys: Float32Array; values: Float32Array }

function inputs(tokens: number): Input[] {
  const kv = () => rows(tokens * kvHeads * headDim, next)
  return everyLayer.map(() => ({ queries: rows(tokens * queryHeads * headDim, next), keys: kv(), values: kv() }))
}

function attend(sequence: Sequence, given: readonly Input[]): Float32Array[] {
  const step = sequence.cache.begin([{ sequence, tokens: given[0]!.keys.length / kvHeads / headDim }], { prefill: 'coded' })
  const outs = given.map((input, layer) => step.attendSync(layer, [input])[0]!)
  step.commit()
  return outs
}

/** Rows of the query heads that read a kv head. */
function ofHead(out: Float32Array, head: number): Float32Array {
  const width = queryHeads * headDim
  const own = width / kvHeads
  return joined(Array.from({ length: out.length / width }, (_, token) => out.subarray(token * width + head * own, token * width + (head + 1) * own)))
}

const worst = (one: Float32Array, other: Float32Array): number => one.reduce((most, value, index) => Math.max(most, Math.abs(value - other[index]!)), 0)

describeOn('all', 'a cache of mixed codecs', (device: DeviceName) => {
  const options = (codebook: Codebook): CacheOptions => ({ codebook, queryHeads, rotary, sinks: 2, window: 6, threads: 1, device })

  it('computes in every layer and head what a cache of its codecs computes', () => {
    using both = new Cache(options(mixed))
    const single = { wide: new Cache(options(alone.wide)), narrow: new Cache(options(alone.narrow)) }
    const sequences = { both: both.sequence(), wide: single.wide.sequence(), narrow: single.narrow.sequence() }
    for (const tokens of [21, 1, 3, 1]) {
      const given = inputs(tokens)
      const outs = { both: attend(sequences.both, given), wide: attend(sequences.wide, given), narrow: attend(sequences.narrow, given) }
      layout.forEach((own, layer) => own.forEach((pair, head) => {
        const [received, expected] = [outs.both, outs[pair]].map((all) => ofHead(all[layer]!, head)) as [Float32Array, Float32Array]
        // A GPU shares its work out by the heads of a call, so that sums of a layer in two parts have another order.
        if (device === 'cpu' || new Set(own).size === 1) assert.deepEqual(received, expected, `layer ${layer}, head ${head}`)
        else assert.ok(worst(received, expected) < 1e-4, `layer ${layer}, head ${head}: ${worst(received, expected)}`)
      }))
    }
    for (const cache of Object.values(single)) cache.dispose()
  })

  it('counts the bytes of every part', () => {
    using cache = new Cache(options(mixed))
    const sequence = cache.sequence()
    attend(sequence, inputs(2 + 6 + 9))
    const { pageBytes, codedTokens } = cache.statistics()
    assert.equal(codedTokens, 9)
    const page = (name: string) => codesBytes({ codec: name, tokens: pageTokens, kvHeads: 1, headDim })
    const expected = layout.flat().reduce((bytes, pair) => bytes + page(pairs[pair].keyCodec) + page(pairs[pair].valueCodec), 0)
    assert.equal(pageBytes, expected)
  })

  it('copies sequences from and to the CPU, and forks them', async () => {
    using here = new Cache(options(mixed))
    using there = new Cache({ ...options(mixed), device: 'cpu' })
    const sequence = here.sequence()
    attend(sequence, inputs(20))
    const moved = await sequence.copyTo(there)
    const back = await moved.copyTo(here)
    const fork = sequence.fork()
    const given = inputs(1)
    const [own, ...others] = [sequence, moved, back, fork].map((one) => attend(one, given)) as [Float32Array[], ...Float32Array[][]]
    // Kernels look centroids up in float16, and are allowed 4e-3 of a row's length.
    const bound = device === 'cpu' ? 1e-4 : 4e-3
    const length = (row: Float32Array): number => Math.hypot(...row)
    for (const other of others) {
      own.forEach((out, layer) => {
        const error = length(out.map((value, index) => value - other[layer]![index]!))
        assert.ok(error <= bound * length(out), `layer ${layer}: ${error} of ${length(out)}`)
      })
    }
    own.forEach((out, layer) => { assert.deepEqual(others[1]![layer], out) })
  })

  it('refuses to copy to a cache of other codecs', async () => {
    using here = new Cache(options(mixed))
    using there = new Cache(options(bookOf([layout[1]!, layout[0]!, layout[2]!])))
    const sequence = here.sequence()
    attend(sequence, inputs(1))
    await assert.rejects(sequence.copyTo(there), { code: 'ERR_COUPLET_CODEBOOK_MISMATCH' })
  })

  it('names the head of a NaN, also in the second part of a layer', () => {
    using cache = new Cache(options(mixed))
    const given = inputs(20)
    given[2]!.values[4 * kvHeads * headDim + headDim + 7] = NaN
    const step = cache.begin([{ sequence: cache.sequence(), tokens: 20 }])
    assert.throws(() => step.appendSync(2, [given[2]!]), (error: CoupletError) => {
      assert.equal(error.code, 'ERR_COUPLET_NOT_FINITE')
      const { layer, kvHead, token, channel } = error
      assert.deepEqual({ layer, kvHead, token, channel }, { layer: 2, kvHead: 1, token: 4, channel: 7 })
      return true
    })
    step.abort()
  })
})

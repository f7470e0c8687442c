import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { join } from 'node:path'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'

import type { CacheOptions, CacheStatistics, Sequence } from '../../lib/cache'
import { Cache } from '../../lib/cache'
import { Codebook } from '../../lib/codebook'
import { CoupletError, codeOf } from '../../lib/errors'
import { addon } from '../../lib/native/addon'
import { codebook, keyCodec, newTokens, random, rotary, rows, shape, valueCodec } from './model'

const next = random(2)
const options: CacheOptions = { ...shape, codebook, rotary, sinks: 4, window: 8, threads: 1 }

function append(sequence: Sequence, tokens: number): void {
  const step = sequence.cache.begin([{ sequence, tokens }])
  newTokens(tokens, next).forEach((input, layer) => step.appendSync(layer, [input]))
  step.commit()
}

async function collectGarbage(): Promise<void> {
  setFlagsFromString('--expose-gc')
  for (let i = 0; i < 3; i++) {
    ;(runInNewContext('gc') as () => void)()
    await new Promise(setImmediate) // finalizers
  }
}

const big = { layers: 4, queryHeads: 8, kvHeads: 8, headDim: 128 }
const bigTokenBytes = big.layers * 2 * big.kvHeads * big.headDim * 4

/** What a process of its own prints, as JSON; its fill() makes a cache with 1024 tokens in full precision. */
function child(body: string): unknown {
  const prelude = `
    require('tsx/cjs')
    const { Cache } = require(${JSON.stringify(join(__dirname, '../../lib/cache.ts'))})
    const big = ${JSON.stringify(big)}
    const rows = new Float32Array(1024 * big.kvHeads * big.headDim).fill(1)
    const fill = () => {
      const cache = new Cache({ ...big, sinks: 0, threads: 1 })
      const step = cache.begin([{ sequence: cache.sequence(), tokens: 1024 }])
      for (let layer = 0; layer < big.layers; layer++) step.appendSync(layer, [{ keys: rows, values: rows }])
      step.commit()
      return cache
    }
  `
  const { stdout, stderr } = spawnSync(process.execPath, ['-e', prelude + body], { encoding: 'utf8', timeout: 60_000 })
  assert.equal(stderr, '')
  return JSON.parse(stdout)
}

describe('Cache', () => {
  it('takes shapes from the codebook', () => {
    const cache = new Cache({ codebook, queryHeads: 4 })
    const { layers, queryHeads, kvHeads, headDim, sinks, window } = cache
    assert.deepEqual({ layers, queryHeads, kvHeads, headDim, sinks, window }, { ...shape, sinks: 4, window: 32 })
    assert.equal(new Cache(shape).window, Infinity)
  })

  const refused: [string, object, RegExp][] = [
    ['no options', undefined as never, /`options`/],
    ['layers beyond all sense', { queryHeads: 4, kvHeads: 2, layers: 2 ** 31 - 1, headDim: 32 }, /from 1 to 65536 for `layers`/],
    ['a rotary that is a string', { queryHeads: 4, kvHeads: 2, layers: 1, headDim: 32, rotary: 'half' }, /an object for `rotary`/],
    ['no shape', { queryHeads: 4 }, /`layers`/],
    ['heads that do not divide', { ...options, queryHeads: 3 }, /queryHeads a multiple of kvHeads/],
    ['a headDim of 36', { queryHeads: 2, kvHeads: 2, layers: 1, headDim: 36 }, /multiple of 8.*36/],
    ['a window without a codebook', { ...shape, window: 32 }, /Expected a codebook.*Infinity/],
    ['a negative window', { ...options, window: -1 }, /`window`/],
    ['half a sink', { ...options, sinks: 0.5 }, /`sinks`/],
    ['no memory', { ...options, memory: 0 }, /`memory`/],
    ['a codebook of another kind', { ...options, codebook: {} }, /`codebook`/],
    ['an unknown device', { ...options, device: 'tpu' }, /tpu/],
    ['an odd rotary dim', { ...options, rotary: { kind: 'half', dim: 7, theta: 1e4 } }, /`dim`/],
    ['an unknown rotary kind', { ...options, rotary: { kind: 'full', theta: 1e4 } }, /`kind`/],
    ['a negative theta', { ...options, rotary: { kind: 'half', theta: -1 } }, /`theta`/],
    ['one rotary table', { ...options, rotary: { kind: 'half', cos: new Float32Array(16) } }, /`sin`/],
    ['rotary tables of two lengths', { ...options, rotary: { kind: 'half', cos: new Float32Array(16), sin: new Float32Array(32) } }, /`sin`/],
    ['a rotary table of half a row', { ...options, rotary: { kind: 'half', cos: new Float32Array(24), sin: new Float32Array(24) } }, /`cos`/],
    ['options of one layer of two', { ...options, layerOptions: [{}] }, /2 entries for `layerOptions`/],
    ['a negative softcap', { ...options, layerOptions: { softcap: -1 } }, /`softcap`/],
    ['a scale of NaN', { ...options, layerOptions: { scale: NaN } }, /`scale`/],
    ['short head sinks', { ...options, layerOptions: { headSinks: new Float32Array(3) } }, /4 queryHeads.*`headSinks`/],
  ]
  for (const [what, given, message] of refused)
    it(`refuses ${what}`, async () => {
      const isRefused = (error: CoupletError): boolean => {
        assert.ok(error instanceof CoupletError)
        assert.match(error.message, message)
        return error.code === 'ERR_COUPLET_INVALID_ARGUMENT'
      }
      assert.throws(() => new Cache(given as CacheOptions), isRefused)
      await assert.rejects(Cache.create(given as CacheOptions), isRefused)
    })

  it('refuses a codebook of another shape and of another rotary kind, naming both sides', () => {
    assert.throws(() => new Cache({ ...options, layers: 3 }), { code: 'ERR_COUPLET_CODEBOOK_MISMATCH', message: /layers 3.*layers 2/ })
    const tables = [rows(64 * 8, next), rows(64 * 32, next)] as const
    const other = Codebook.fromTables({
      keyTables: [tables[0]], valueTables: [tables[1]], keyCodec, valueCodec, kvHeads: 2, headDim: 32,
      metadata: { rotary: { kind: 'interleaved', dim: 32 } },
    })
    assert.throws(() => new Cache({ codebook: other, queryHeads: 2, rotary: { kind: 'half', theta: 1e4 } }), { code: 'ERR_COUPLET_CODEBOOK_MISMATCH' })
    other.dispose()
    assert.throws(() => new Cache({ codebook: other, queryHeads: 2 }), { code: 'ERR_COUPLET_DISPOSED' })
  })

  it('is made off the JavaScript thread when a promise is asked for', async () => {
    const fresh = Codebook.fromBuffer(codebook.toBuffer())
    let isMade = false
    const made = Cache.create({ ...options, codebook: fresh }).then((cache) => {
      isMade = true
      return cache
    })
    for (let i = 0; i < 100; i++) await Promise.resolve() // what was made on this thread would be there; another thread's word needs a turn of the event loop
    assert.equal(isMade, false)
    ;(await made).dispose()
  })

  it('is the same by a promise and by the constructor, several at once', async () => {
    const fresh = Codebook.fromBuffer(codebook.toBuffer())
    const caches = await Promise.all([1, 2, 3].map(() => Cache.create({ ...options, codebook: fresh })))
    const inputs = newTokens(20, random(5))
    const outputs = []
    for (const cache of [...caches, new Cache(options)]) {
      const step = cache.begin([{ sequence: cache.sequence(), tokens: 20 }])
      outputs.push(inputs.map((input, layer) => step.attendSync(layer, [input])))
      step.commit()
    }
    for (const output of outputs) assert.deepEqual(output, outputs[0])
    fresh.dispose()
    await assert.rejects(Cache.create({ ...options, codebook: fresh }), { code: 'ERR_COUPLET_DISPOSED' })
  })

  it('is as it was when the budget is spent, and goes on when there is room again', async () => {
    const cache = new Cache({ ...options, memory: 60_000 })
    const [first, second] = [cache.sequence(), cache.sequence()]
    append(first, 40)
    append(second, 10)
    const before = cache.statistics()
    assert.throws(() => cache.begin([{ sequence: second, tokens: 1 }, { sequence: first, tokens: 2000 }]), {
      code: 'ERR_COUPLET_CACHE_FULL', message: /needs \d+ bytes and \d+ of the cache's 60000 are free; truncate, reset or dispose/,
    })
    assert.deepEqual(cache.statistics(), before)
    let held = 40
    assert.throws(() => {
      for (; held < 1000; held++) append(first, 1)
    }, { code: 'ERR_COUPLET_CACHE_FULL' })
    assert.equal(first.length, held)
    second.dispose()
    append(first, 1)
    const step = cache.begin([{ sequence: first, tokens: 1 }])
    const outputs = await Promise.all(newTokens(1, next).slice(0, 1).map((input, layer) => step.attend(layer, [input])))
    assert.equal(outputs[0]![0]!.length, 128)
    step.abort()
    assert.equal(first.length, held + 1)
  })

  it('counts what the process has more of', () => {
    const { before, after, statistics } = child(`
      new Cache(big).dispose() // the addon is loaded on first use, and is nothing that a cache counts
      const before = process.memoryUsage().rss
      const cache = fill()
      console.log(JSON.stringify({ before, after: process.memoryUsage().rss, statistics: cache.statistics() }))
    `) as { before: number; after: number; statistics: CacheStatistics }
    const { rawBytes, pageBytes, bookkeepingBytes } = statistics
    assert.equal(rawBytes, 1024 * bigTokenBytes)
    const counted = rawBytes + pageBytes + bookkeepingBytes
    assert.ok(Math.abs(after - before - counted) < 0.1 * counted, `the process grew by ${after - before} bytes, the cache counts ${counted}`)
  })

  it('tells V8 of its memory, so that caches which are garbage go before there are many', () => {
    const { before, after } = child(`
      const run = async () => {
        fill()
        const before = process.memoryUsage().rss
        for (let i = 0; i < 20; i++) {
          fill()
          await new Promise(setImmediate)
        }
        console.log(JSON.stringify({ before, after: process.memoryUsage().rss }))
      }
      run()
    `) as { before: number; after: number }
    assert.ok(after - before < 6 * 1024 * bigTokenBytes, `the process grew by ${after - before} bytes over 20 caches of ${1024 * bigTokenBytes}`)
  })

  it('drops a sequence that is garbage, and keeps those of an open step', async () => {
    const cache = new Cache(options)
    const begin = () => {
      append(cache.sequence(), 5)
      return cache.begin([{ sequence: cache.sequence(), tokens: 3 }])
    }
    const step = begin()
    await collectGarbage()
    assert.equal(cache.statistics().sequences, 1)
    newTokens(3, next).forEach((input, layer) => step.appendSync(layer, [input]))
    step.commit()
    assert.equal(step.rows[0]!.sequence.length, 3)
  })

  it('is gone after dispose, which may be called twice', async () => {
    const cache = new Cache(options)
    const sequence = cache.sequence()
    append(sequence, 20)
    const step = cache.begin([{ sequence, tokens: 1 }])
    cache.dispose()
    cache[Symbol.dispose]()
    const disposed = { code: 'ERR_COUPLET_DISPOSED' }
    assert.throws(() => cache.sequence(), disposed)
    assert.throws(() => cache.begin([{ sequence, tokens: 1 }]), disposed)
    assert.throws(() => sequence.length, disposed)
    assert.throws(() => sequence.fork(), disposed)
    assert.throws(() => step.commit(), disposed)
    await assert.rejects(step.attend(0, newTokens(1, next).slice(0, 1)), disposed)
    step.abort()
    sequence.dispose()
    const { pageBytes, rawBytes, tokens } = cache.statistics()
    assert.deepEqual({ pageBytes, rawBytes, tokens }, { pageBytes: 0, rawBytes: 0, tokens: 0 })
  })
})

describe('handles of the cache', () => {
  it('are taken for nothing else', () => {
    const native = addon()
    const cache = native.createCache({ layers: [{}], rotaries: [], config: { layers: 1, queryHeads: 1, kvHeads: 1, headDim: 32, sinks: 0, window: -1 } })
    const sequence = native.createSequence(cache)
    for (const other of [sequence, {}, undefined, 1, null]) {
      assert.throws(() => native.cacheStatistics(other as never), { name: 'TypeError', message: /Expected a cache for `cache`/ })
      assert.throws(() => native.commitStep(other as never), { name: 'TypeError', message: /Expected a step for `step`/ })
    }
    assert.throws(() => native.sequenceLength(cache as never), { message: /Expected a sequence for `sequence`/ })
    assert.throws(() => native.createCache({ codebook: cache } as never))
  })
})

describe('Sequence', () => {
  it('is gone after dispose, which may be called twice', () => {
    const sequence = new Cache(options).sequence()
    sequence.dispose()
    sequence[Symbol.dispose]()
    for (const use of [() => sequence.length, () => sequence.fork(), () => sequence.truncate(0), () => sequence.reset()])
      assert.throws(use, { code: 'ERR_COUPLET_DISPOSED' })
  })

  it('is busy inside a step', () => {
    const cache = new Cache(options)
    const sequence = cache.sequence()
    append(sequence, 3)
    const step = cache.begin([{ sequence, tokens: 1 }])
    const busy = { code: 'ERR_COUPLET_BUSY', message: /commit or abort/ }
    const uses = [() => sequence.fork(), () => sequence.truncate(1), () => sequence.reset(), () => sequence.dispose()]
    for (const use of [...uses, () => cache.begin([{ sequence, tokens: 1 }])]) assert.throws(use, busy)
    assert.equal(sequence.length, 3)
    step.abort()
    sequence.truncate(1)
    assert.equal(sequence.length, 1)
  })

  it('refuses to be cut where it is not', () => {
    const sequence = new Cache(options).sequence()
    append(sequence, 3)
    for (const tokens of [4, -1, 1.5, NaN, '1']) assert.throws(() => sequence.truncate(tokens as number), { code: 'ERR_COUPLET_INVALID_ARGUMENT' })
    assert.equal(sequence.length, 3)
  })
})

describe('Step', () => {
  const input = newTokens(2, next)[0]!
  const begin = (tokens = 2) => {
    const cache = new Cache(options)
    return cache.begin([{ sequence: cache.sequence(), tokens }])
  }

  it('refuses at once more tokens than the machine has memory for', function () {
    if (process.env.ASAN_OPTIONS !== undefined) this.skip() // its allocator ends the process where malloc returns null
    using cache = new Cache(shape)
    const sequence = cache.sequence()
    assert.throws(() => cache.begin([{ sequence, tokens: 2 ** 31 - 1 }]), { code: 'ERR_COUPLET_OUT_OF_MEMORY', message: /\d+ bytes/ })
    cache.begin([{ sequence, tokens: 1 }]).abort()
  })

  it('refuses rows that make no step', () => {
    const [cache, other] = [new Cache(options), new Cache(options)]
    const sequence = cache.sequence()
    const invalid = { code: 'ERR_COUPLET_INVALID_ARGUMENT' }
    assert.throws(() => cache.begin([]), invalid)
    assert.throws(() => cache.begin([{ sequence, tokens: 1 }, { sequence, tokens: 1 }]), invalid)
    assert.throws(() => cache.begin([{ sequence, tokens: -1 }]), invalid)
    assert.throws(() => cache.begin([{ sequence: {} as Sequence, tokens: 1 }]), invalid)
    assert.throws(() => cache.begin([{ sequence: other.sequence(), tokens: 1 }]), { ...invalid, message: /another cache/ })
    assert.throws(() => cache.begin([{ sequence, tokens: 1 }], { prefill: 'fast' as never }), invalid)
    append(sequence, 5)
    assert.throws(() => cache.begin([{ sequence, tokens: 2 ** 31 - 2 }]), invalid)
  })

  const wrong: [string, object, RegExp][] = [
    ['short queries', { ...input, queries: new Float32Array(255) }, /256 elements \(2 tokens x 4 queryHeads x 32 headDim\) for `queries`/],
    ['long keys', { ...input, keys: new Float32Array(129) }, /128 elements \(2 tokens x 2 kvHeads x 32 headDim\) for `keys`/],
    ['values of doubles', { ...input, values: new Float64Array(128) }, /`values`/],
    ['no keys', { queries: input.queries, values: input.values }, /`keys` but received undefined/],
    ['a short out', { ...input, out: new Float32Array(3) }, /`out`/],
    ['an out over the queries', { ...input, out: input.queries }, /shares no memory/],
    ['a plain array', { ...input, queries: Array.from(input.queries) }, /`queries` but received an array/],
  ]
  for (const [what, row, message] of wrong)
    it(`refuses ${what}`, async () => {
      const step = begin()
      await assert.rejects(step.attend(0, [row as never]), { code: 'ERR_COUPLET_INVALID_ARGUMENT', message })
      assert.throws(() => step.attendSync(0, [row as never]), { code: 'ERR_COUPLET_INVALID_ARGUMENT', message })
      assert.equal(step.attendSync(0, [input]).length, 1) // nothing was lost
    })

  it('refuses another number of rows, a layer that is not there, and a layer twice', async () => {
    const step = begin()
    const invalid = { code: 'ERR_COUPLET_INVALID_ARGUMENT' }
    await assert.rejects(step.attend(0, []), invalid)
    await assert.rejects(step.attend(0, [input, input]), invalid)
    await assert.rejects(step.attend(2, [input]), invalid)
    await assert.rejects(step.attend(-1, [input]), invalid)
    await step.attend(1, [input])
    await assert.rejects(step.attend(1, [input]), { ...invalid, layer: 1, message: /layer 1 again/ })
    assert.throws(() => step.commit(), { ...invalid, layer: 0, message: /layer 0 is missing/ })
    await step.append(0, [input])
    step.commit()
    assert.equal(step.rows[0]!.sequence.length, 2)
  })

  it('writes into the arrays it is given', async () => {
    const step = begin()
    const out = new Float32Array(256)
    const [same] = await step.attend(0, [{ ...input, out }])
    assert.equal(same, out)
    assert.ok(out.some((value) => value !== 0))
    const shared = new Float32Array(new SharedArrayBuffer(256 * 4))
    step.attendSync(1, [{ ...input, out: shared }])
    assert.ok(shared.some((value) => value !== 0))
  })

  for (const side of ['keys', 'values'] as const)
    it(`refuses a NaN in ${side}, and leaves the sequence as it was`, async () => {
      const cache = new Cache(options)
      const sequence = cache.sequence()
      append(sequence, 3)
      const held = cache.statistics()
      for (const token of [0, 20, 39]) { // a sink, one that is coded, one in the window
        const step = cache.begin([{ sequence, tokens: 40 }])
        const bad = newTokens(40, next)[1]!
        bad[side][token * 64 + 32 + 5] = token === 20 ? Infinity : NaN
        await assert.rejects(step.attend(1, [bad]), {
          code: 'ERR_COUPLET_NOT_FINITE', layer: 1, kvHead: 1, token: 3 + token, channel: 5, message: new RegExp(`finite ${side}.*layer 1, kv head 1, token ${3 + token}`),
        })
        await assert.rejects(step.attend(0, [bad]), { code: 'ERR_COUPLET_INVALID_ARGUMENT', message: /abort the step/ })
        assert.throws(() => step.commit(), { code: 'ERR_COUPLET_INVALID_ARGUMENT', message: /abort the step/ })
        step.abort()
        const { tokens, pageBytes, rawBytes } = cache.statistics()
        assert.deepEqual({ tokens, pageBytes, rawBytes }, { tokens: held.tokens, pageBytes: held.pageBytes, rawBytes: held.rawBytes })
      }
      append(sequence, 1)
      assert.equal(sequence.length, 4)
    })

  it('computes one layer at a time', async () => {
    const step = begin(4000)
    const inputs = newTokens(4000, next)
    const attend = (layer: number) => step.attend(layer, [inputs[layer]!])
    const results = await Promise.allSettled([attend(0), attend(1)])
    const refused = results.findIndex(({ status }) => status === 'rejected')
    assert.equal(codeOf((results[refused] as PromiseRejectedResult).reason), 'ERR_COUPLET_BUSY')
    await attend(refused)
    step.commit()
  })

  it('does not block the event loop', async () => {
    const step = begin(3000)
    let turns = 0
    const timer = setInterval(() => turns++, 1)
    await step.attend(0, [newTokens(3000, next)[0]!])
    clearInterval(timer)
    assert.ok(turns > 2, `${turns} turns of the event loop`)
  })

  it('aborts when the layer that is computed has ended', async () => {
    const cache = new Cache(options)
    const sequence = cache.sequence()
    const step = cache.begin([{ sequence, tokens: 3000 }])
    const attending = assert.rejects(step.attend(0, [newTokens(3000, next)[0]!]), (error: Error) => error.name === 'AbortError' || 'code' in error)
    await new Promise(setImmediate)
    step.abort()
    await attending
    assert.equal(sequence.length, 0)
    assert.equal(cache.statistics().rawBytes, 0)
    append(sequence, 1)
  })

  it('stops for an AbortSignal', async () => {
    const reason = new Error('enough')
    const early = begin()
    await assert.rejects(early.attend(0, [input], { signal: AbortSignal.abort(reason) }), reason)
    await early.attend(0, [input], { signal: new AbortController().signal })
    const step = begin(6000)
    const inputs = newTokens(6000, next)
    const controller = new AbortController()
    const attending = assert.rejects(step.attend(0, [inputs[0]!], { signal: controller.signal }), reason)
    setTimeout(() => controller.abort(reason), 5)
    await attending
    step.abort()
    assert.equal(step.rows[0]!.sequence.length, 0)
    assert.throws(() => begin().attendSync(0, [input], { signal: controller.signal } as never), { code: 'ERR_COUPLET_INVALID_ARGUMENT' })
  })

  it('attends with a softcap, a scale, a local window and head sinks of each layer', () => {
    const layerOptions = [{ scale: 0.5, softcap: 2, localWindow: 3, headSinks: new Float32Array([0, 1, 2, 3]) }, { rotary: null }]
    const cache = new Cache({ ...shape, rotary, layerOptions })
    const step = cache.begin([{ sequence: cache.sequence(), tokens: 5 }])
    const inputs = newTokens(5, next)
    const plain = inputs.map((given, layer) => step.attendSync(layer, [given])[0]!)
    // Head 3 of token 4 by hand: keys 2 to 4 of kv head 1, rotated by position in layer 0 and not at all in layer 1.
    const at = (array: Float32Array, token: number, head: number, heads: number) => Array.from(array.slice((token * heads + head) * 32).slice(0, 32))
    const turn = (row: number[], position: number) => row.map((x, c) => {
      const [pair, angle] = [c % 8, position * 100 ** (-(c % 8) / 8)]
      if (c >= 16) return x
      return c < 8 ? x * Math.cos(angle) - row[pair + 8]! * Math.sin(angle) : x * Math.cos(angle) + row[pair]! * Math.sin(angle)
    })
    for (const layer of [0, 1]) {
      const { queries, keys, values } = inputs[layer]!
      const tokens = layer === 0 ? [2, 3, 4] : [0, 1, 2, 3, 4]
      const rotate = layer === 0 ? turn : (row: number[]) => row
      const query = rotate(at(queries, 4, 3, 4), 4)
      const logits = tokens.map((token) => rotate(at(keys, token, 1, 2), token).reduce((sum, x, c) => sum + x * query[c]!, 0))
      const weights = logits.map((logit) => Math.exp(layer === 0 ? 2 * Math.tanh((0.5 * logit) / 2) : logit / Math.sqrt(32)))
      const total = weights.reduce((sum, weight) => sum + weight, layer === 0 ? Math.exp(3) : 0)
      for (let c = 0; c < 32; c++) {
        const expected = tokens.reduce((sum, token, i) => sum + (weights[i]! / total) * at(values, token, 1, 2)[c]!, 0)
        const output = plain[layer]![(4 * 4 + 3) * 32 + c]!
        assert.ok(Math.abs(expected - output) < 1e-5, `layer ${layer}, channel ${c}: ${output}, not ${expected}`)
      }
    }
  })
})

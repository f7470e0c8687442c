import assert from 'node:assert/strict'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { DynamicCache, Tensor, type PreTrainedTokenizer } from '@huggingface/transformers'
import { Codebook } from '../../lib/codebook'
import { codec } from '../../lib/codec'
import { float32FromFloat16, float16FromFloat32 } from '../../lib/float16'
import { CoupledCache, type CoupledCacheOptions } from '../../lib/transformers'
import { randomOrder } from '../transform/samples'
import { codebooks, forward, loadModel, loadTokenizer, nextPast, predictions, text, tokenRows, type Inputs, type Model } from './setup'

setFlagsFromString('--expose-gc')
const collectGarbage = runInNewContext('gc') as () => void

describe('CoupledCache', function () {
  this.timeout(60_000)

  describe('in generate()', () => {
    let model: Model
    let tokenizer: PreTrainedTokenizer

    before(async () => {
      model = await loadModel()
      tokenizer = await loadTokenizer()
    })
    after(() => model.dispose())

    const greedy = (prompt: string, tokens: number, cache?: unknown) => {
      const past = cache ? { past_key_values: cache } : {}
      return model.generate({ ...(tokenizer(prompt) as Inputs), max_new_tokens: tokens, do_sample: false, ...past } as never).then(tokenRows)
    }

    it('gives the same tokens while everything is inside the window', async () => {
      const cache = new CoupledCache({ codebook: await codebooks('cq-2c8b'), window: 512 })
      assert.deepEqual(await greedy(text(300), 40, cache), await greedy(text(300), 40))
      const { tokens, codedTokens } = cache.statistics()
      assert.deepEqual([tokens, codedTokens], [339, 0])
    })

    it('stays close to full precision at 4 bits', async () => {
      const { input_ids, attention_mask } = tokenizer(text(400)) as Inputs
      const predict = async (cache: DynamicCache | CoupledCache) => {
        const best: number[] = []
        for (let at = 0; at < 400; at += 20) {
          const columns = { input_ids: input_ids.slice(null, [at, at + 20]), attention_mask: attention_mask.slice(null, [0, at + 20]) }
          const outputs = await forward(model, { ...columns, past_key_values: cache })
          cache.update(nextPast(outputs))
          best.push(...predictions(outputs))
        }
        return best
      }
      const cache = new CoupledCache({ codebook: await codebooks('cq-2c8b'), window: 16 })
      const [mine, expected] = [await predict(cache), await predict(new DynamicCache())]
      const agree = mine.filter((token, index) => token === expected[index]).length
      assert.ok(agree > 360, `${agree} of 400 predictions agree`)
      assert.equal(cache.statistics().codedTokens, 320)
    })

    it('continues in a second call, from the codes alone', async () => {
      const cache = new CoupledCache({ codebook: await codebooks('cq-8c8b') })
      const [first] = await greedy(text(300), 20, cache)
      collectGarbage()
      const { bytes, codedTokens, bitsPerChannel } = cache.statistics()
      assert.equal(codedTokens, 256)
      assert.ok(bitsPerChannel < 16 && bytes < 4 * 2 * 2 * 64 * 319 * 2, `${bitsPerChannel} bits per channel`)
      const [second] = await greedy(String.fromCharCode(...first!), 10, cache)
      assert.equal(second!.length, 330)
      assert.equal(cache.get_seq_length(), 329)
    })
  })

  describe('by itself', () => {
    const shape = { layers: 2, kvHeads: 2, headDim: 16 }
    const coding = codec('cq-4c2b')
    const random = generator(5)
    const tables = () => Array.from({ length: shape.layers }, () => Float32Array.from({ length: 2 * 16 * coding.centroids }, () => random() * 4 - 2))
    const book = Codebook.fromTables({
      keyTables: tables(), valueTables: tables(), keyCodec: coding, valueCodec: coding, kvHeads: 2, headDim: 16,
      metadata: { formatVersion: 1, rotary: { kind: 'half', dim: 12, theta: 10000 }, model: null, learned: null },
    })
    const open = (options: Partial<CoupledCacheOptions> = {}) => new CoupledCache({ codebook: book, window: 8, sinks: 3, ...options })
    type Entries = Record<string, Tensor>

    interface Making { batch?: number; type?: string; padding?: number[]; orders?: Int32Array[] }
    interface Made { given: Entries; exact: Map<string, Float32Array> }

    /** Rows [batch][kvHeads][tokens][headDim] that the tables can express exactly, keys rotated as a graph would do. */
    function entries(tokens: number, { batch = 1, type = 'float32', padding = [0], orders }: Making = {}): Made {
      const given: Entries = {}
      const exact = new Map<string, Float32Array>()
      for (let layer = 0; layer < shape.layers; layer += 1) {
        for (const side of ['key', 'value'] as const) {
          const table = side === 'key' ? book.keyTable(layer) : book.valueTable(layer)
          const data = new Float32Array(batch * 2 * tokens * 16)
          for (let row = 0; row < batch * 2 * tokens; row += 1) {
            const head = Math.floor(row / tokens) % 2
            for (let group = 0; group < 4; group += 1) {
              const code = ((row % tokens) * 7 + head + group * 3 + layer) % coding.centroids
              const from = ((head * 4 + group) * coding.centroids + code) * 4
              data.set(table.subarray(from, from + 4), row * 16 + group * 4)
            }
            const own = data.slice(row * 16, row * 16 + 16)
            if (side === 'key') orders?.[layer]!.forEach((channel, place) => { data[row * 16 + channel] = own[place]! })
            if (side === 'key') rotate(data.subarray(row * 16, row * 16 + 16), Math.max(0, row % tokens - (padding[Math.floor(row / tokens / 2)] ?? 0)))
          }
          const name = `past_key_values.${layer * 3}.${side}`
          given[name] = new Tensor(type as 'float32', type === 'float16' ? float16FromFloat32(data) as never : data.slice(), [batch, 2, tokens, 16])
          exact.set(name, data)
        }
      }
      return { given, exact }
    }

    function check(cache: CoupledCache, exact: Map<string, Float32Array>, tolerance: number) {
      const found = cache as unknown as Entries
      for (const [name, expected] of exact) {
        const { data, type } = found[name]! as { data: unknown; type: string }
        const values = type === 'float16' ? float32FromFloat16(data as Uint16Array) : data as Float32Array
        for (const [index, value] of expected.entries()) {
          assert.ok(Math.abs(value - values[index]!) <= tolerance, `${name}[${index}]: ${values[index]}, not ${value}`)
        }
      }
    }

    it('undoes the rotation of keys before it codes them, and redoes it', () => {
      const cache = open()
      const { given, exact } = entries(300)
      cache.update(given)
      assert.equal(cache.statistics().codedTokens, 256)
      check(cache, exact, 2e-6)
    })

    it('codes keys in the order of the codebook, and gives them back as they were', () => {
      const orders = tables().map(() => randomOrder(16, { kind: 'half', dim: 12 }, random))
      const grouped = Codebook.fromTables({
        keyTables: [0, 1].map((layer) => book.keyTable(layer)), valueTables: [0, 1].map((layer) => book.valueTable(layer)), transforms: { 'key.group': orders },
        keyCodec: coding, valueCodec: coding, kvHeads: 2, headDim: 16, metadata: { rotary: book.metadata.rotary },
      })
      const cache = open({ codebook: grouped })
      const { given, exact } = entries(300, { orders })
      cache.update(given)
      assert.equal(cache.statistics().codedTokens, 256)
      check(cache, exact, 2e-6)
      assert.throws(() => {
        const plain = open()
        const again = entries(300, { orders })
        plain.update(again.given)
        check(plain, again.exact, 0.1)
      }, /not/)
    })

    it('gives the same numbers from codes as in the tensor that it went on with', () => {
      const cache = open()
      let { given } = entries(0)
      for (const tokens of [0, 1, 2, 40, 41, 80, 200, 201, 330]) {
        const next = entries(tokens)
        // A graph returns the past that it was fed and new rows behind it.
        for (const [name, tensor] of Object.entries(next.given)) {
          const past = given[name]!.dims[2]!
          for (let head = 0; head < 2; head += 1) {
            (tensor.data as Float32Array).set((given[name]!.data as Float32Array).subarray(head * past * 16, (head + 1) * past * 16), head * tokens * 16)
          }
        }
        given = next.given
        cache.update(given)
        check(cache, next.exact, 2e-6)
      }
      const kept = Object.fromEntries(Object.entries(given).map(([name, tensor]) => [name, (tensor.data as Float32Array).slice()]))
      const found = cache as unknown as Entries
      assert.equal(found['past_key_values.0.key'], given['past_key_values.0.key'], 'nothing is decoded while the tensor is alive')
      given = {}
      // Weak references are cleared between jobs.
      return new Promise<void>((resolve) => setImmediate(resolve)).then(() => {
        collectGarbage()
        for (const [name, data] of Object.entries(kept)) assert.deepEqual(found[name]!.data, data)
      })
    })

    it('codes each head by its own codecs', () => {
      const pairs = [{ keyCodec: '4c2b', valueCodec: '16c3b' }, { keyCodec: '8c4b', valueCodec: '2c1b' }]
      const table = (name: string) => Float32Array.from({ length: 16 * codec(name).centroids }, () => random() * 4 - 2)
      const own = pairs.map(({ keyCodec, valueCodec }) => ({ key: table(keyCodec), value: table(valueCodec) }))
      const bookOf = (parts: readonly number[]) => Codebook.fromTables({
        keyTables: tables().map(() => Float32Array.from(parts.flatMap((part) => [...own[part]!.key]))),
        valueTables: tables().map(() => Float32Array.from(parts.flatMap((part) => [...own[part]!.value]))),
        codecs: tables().map(() => parts.map((part) => ({ heads: 1, ...pairs[part]! }))), kvHeads: 2, headDim: 16,
        metadata: { rotary: { kind: 'half', dim: 12, theta: 10000 } },
      })
      const read = (parts: readonly number[]): Entries => {
        const { given } = entries(200)
        const cache = open({ codebook: bookOf(parts) })
        cache.update(given)
        assert.equal(cache.statistics().codedTokens, 128)
        return given // codes have been put in their place
      }
      const [mixed, first, second] = [[0, 1], [0, 0], [1, 1]].map(read) as [Entries, Entries, Entries]
      for (const [name, { data }] of Object.entries(mixed)) {
        const half = (data as Float32Array).length / 2
        assert.deepEqual((data as Float32Array).subarray(0, half), (first[name]!.data as Float32Array).subarray(0, half))
        assert.deepEqual((data as Float32Array).subarray(half), (second[name]!.data as Float32Array).subarray(half))
      }
    })

    it('takes float16 as well', () => {
      const cache = open()
      const { given, exact } = entries(140, { type: 'float16' })
      cache.update(given)
      assert.equal(cache.statistics().codedTokens, 128)
      check(cache, exact, 4e-3)
    })

    it('counts positions from the end of the padding', () => {
      const { given, exact } = entries(100, { batch: 2, padding: [0, 20] })
      const cache = open({ padding: [0, 20], sinks: 0 })
      cache.update(given)
      check(cache, exact, 2e-6)
      assert.equal(cache.statistics().codedTokens, 64)
    })

    it('passes other entries through untouched', () => {
      const cache = open()
      const state = new Tensor('float32', new Float32Array(6), [1, 2, 3])
      cache.update({ ...entries(5).given, 'past_conv.1': state })
      assert.equal((cache as unknown as Entries)['past_conv.1'], state)
      const names = ['past_key_values.0.key', 'past_key_values.0.value', 'past_key_values.3.key', 'past_key_values.3.value']
      assert.deepEqual(Object.keys(cache).sort(), ['past_conv.1', ...names])
    })

    it('is empty after dispose(), and can be used again', async () => {
      const cache = open()
      cache.update(entries(100).given)
      await cache.dispose()
      assert.deepEqual([cache.get_seq_length(), Object.keys(cache)], [0, []])
      cache.update(entries(10).given)
      assert.equal(cache.get_seq_length(), 10)
    })

    it('refuses what does not fit, with a sentence', () => {
      const cache = open()
      const wrong = { 'past_key_values.0.key': new Tensor('float32', new Float32Array(32), [1, 2, 1, 16]) }
      assert.throws(() => { cache.update(wrong) }, { code: 'ERR_COUPLET_CODEBOOK_MISMATCH' })
      cache.update(entries(10).given)
      assert.throws(() => { cache.update(entries(9).given) }, /float32 \[1, 2, at least 10, 16\]/)
      assert.throws(() => { cache.update(entries(12, { batch: 2 }).given) }, /for `past_key_values.0.key`/)
      assert.throws(() => open({ window: -1 }), /`window`/)
      assert.throws(() => open({ sinks: 0.5 }), /`sinks`/)
      const scaled = Codebook.fromTables({
        keyTables: tables(), valueTables: tables(), keyCodec: coding, valueCodec: coding, kvHeads: 2, headDim: 16,
        metadata: { formatVersion: 1, rotary: { kind: 'half', dim: 16, scaled: true }, model: null, learned: null },
      })
      assert.throws(() => new CoupledCache({ codebook: scaled }), /pass their tables/)
    })
  })
})

/** Half-split rotation of the first 12 channels at base 10000, in double. */
function rotate(row: Float32Array, position: number): void {
  for (let pair = 0; pair < 6; pair += 1) {
    const angle = position * 10000 ** (-pair / 6)
    const [x, y] = [row[pair]!, row[pair + 6]!]
    row[pair] = x * Math.cos(angle) - y * Math.sin(angle)
    row[pair + 6] = y * Math.cos(angle) + x * Math.sin(angle)
  }
}

function generator(seed: number): () => number {
  let state = seed
  return () => (state = (state * 48271) % 2147483647) / 2147483647
}

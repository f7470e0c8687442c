// The rivals of bench/quality against computations of their own: written another way, on few numbers.
import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import path from 'node:path'
import { TwoVersionAttention } from '../../bench/quality/attention'
import { Calibration } from '../../bench/quality/calibration'
import { LayeredModel, type Rows } from '../../bench/quality/layers'
import { methods } from '../../bench/quality/methods'
import { fourierSigns, threeLevels } from '../../bench/quality/methods/vidkv'
import { hadamard, half, type Method, nearest, normalQuantiles, type Place } from '../../bench/quality/methods/method'
import { toQuantiles } from '../../bench/quality/methods/calibquant'
import { normalizeShiftNormalize } from '../../bench/quality/methods/nsnquant'
import { normalFloatLevels } from '../../bench/quality/methods/scalar'
import { normalLevels, randomRotation } from '../../bench/quality/methods/turboquant'
import { mix, smoothing, unmix } from '../../bench/quality/methods/vecinfer'
import { float16FromFloat32, float32FromFloat16 } from '../../lib/float16'

const root = path.join(__dirname, '..', '..')
const directory = path.join(root, 'models', 'tiny-llama-bytes')
const text = readFileSync(path.join(root, 'docs', 'algorithm.md')).subarray(0, 1024)
const places: Place[] = [{ layer: 1, side: 'key' }, { layer: 1, side: 'value' }]

let calibration: Calibration
let model: LayeredModel
let attention: TwoVersionAttention

before(async () => {
  model = await LayeredModel.load(directory)
  attention = new TwoVersionAttention()
  calibration = await Calibration.of(directory, text, { model, attention, length: 512, threads: 1 })
})
after(async () => {
  calibration.dispose()
  await model.release()
  await attention.release()
})

const find = (name: string): Method => methods.find((method) => method.name === name) ?? assert.fail(name)

/** The first `tokens` tokens of real activations, as a method sees them. */
function sample(place: Place, rotated: boolean, tokens = 256): Rows {
  const rows = calibration.rows(place, rotated)
  const data = new Float32Array(rows.heads * tokens * rows.channels)
  for (let head = 0; head < rows.heads; head++) {
    const from = head * rows.tokens * rows.channels
    data.set(rows.data.subarray(from, from + tokens * rows.channels), head * tokens * rows.channels)
  }
  return { ...rows, data, tokens }
}

function squaredError(a: Float32Array, b: Float32Array): number {
  return a.reduce((sum, value, i) => sum + (value - b[i]!) ** 2, 0) / a.reduce((sum, value) => sum + value ** 2, 0)
}

/** Relative squared error of keys and values, the rows as coded, and the bits they took. */
async function run(name: string, tokens = 256) {
  const method = find(name)
  const quantizer = await method.fit(calibration)
  return places.map((place) => {
    const rows = sample(place, method.rotated, tokens)
    const coded = { ...rows, data: rows.data.slice() }
    const bits = quantizer.quantize(coded, place)
    return { place, rows, coded, quantizer, bits: bits / rows.data.length, error: squaredError(rows.data, coded.data) }
  })
}

const at = ({ tokens, channels }: Rows, head: number, token: number, channel: number) => (head * tokens + token) * channels + channel
const close = (actual: number, expected: number, tolerance = 1e-5) => {
  assert.ok(Math.abs(actual - expected) <= tolerance * Math.max(1, Math.abs(expected)), `${actual}, expected ${expected}`)
}

/** b-bit integers of some numbers, by trying every level. */
function integersOf(values: number[], bits: number): number[] {
  const [low, high] = [half(Math.min(...values)), Math.max(...values)]
  const step = half((high - Math.min(...values)) / (2 ** bits - 1))
  const levels = Array.from({ length: 2 ** bits }, (_, code) => low + code * step)
  return values.map((value) => levels.reduce((best, level) => Math.abs(level - value) < Math.abs(best - value) ? level : best))
}

describe('rivals of bench/quality', function () {
  this.timeout(60_000)

  describe('what they share', () => {
    it('half() rounds as float16 does', () => {
      for (const value of [1, -3.14159, 0.001234, 1234.5678, 65504]) {
        assert.equal(half(Math.fround(value)), float32FromFloat16(float16FromFloat32(Float32Array.of(value)))[0])
      }
    })

    it('normal quantiles: 1.959964 at 97.5 %, symmetric', () => {
      const quantiles = normalQuantiles(2000)
      close((quantiles[1949]! + quantiles[1950]!) / 2, 1.959964, 1e-4)
      for (let i = 0; i < 1000; i++) close(quantiles[i]!, -quantiles[1999 - i]!, 1e-6)
    })

    it('nearest() picks the nearest of sorted levels', () => {
      const levels = [-2, -0.5, 0, 0.25, 3]
      for (let value = -3; value < 4; value += 0.01) {
        const distance = Math.min(...levels.map((level) => Math.abs(level - value)))
        close(Math.abs(nearest(levels, value) - value), distance)
      }
    })

    it('the Hadamard transform has entries of one size and undoes itself', () => {
      const row = Float32Array.from({ length: 8 }, (_, i) => i === 5 ? 1 : 0)
      hadamard(row, 0, 8)
      assert.ok(row.every((value) => Math.abs(Math.abs(value) - Math.sqrt(1 / 8)) < 1e-6))
      hadamard(row, 0, 8)
      row.forEach((value, i) => { close(value, i === 5 ? 1 : 0, 1e-6) })
    })
  })

  describe('formulas', () => {
    it('int2-mixed: keys by channel, values by token of all heads', async () => {
      const [key, value] = await run('int2-mixed')
      const { rows, coded } = key!
      const channel = Array.from({ length: rows.tokens }, (_, token) => at(rows, 1, token, 7))
      integersOf(channel.map((i) => rows.data[i]!), 2).forEach((expected, i) => { close(coded.data[channel[i]!]!, expected) })
      const token = Array.from({ length: rows.heads * rows.channels }, (_, i) => at(value!.rows, Math.floor(i / rows.channels), 9, i % rows.channels))
      integersOf(token.map((i) => value!.rows.data[i]!), 2).forEach((expected, i) => { close(value!.coded.data[token[i]!]!, expected) })
      close(key!.bits, 2 + 32 / 256)
      close(value!.bits, 2 + 32 / (rows.heads * rows.channels))
    })

    it('nf4: the sixteen published levels', () => {
      const published = [-1, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1]
      normalFloatLevels(4).forEach((level, i) => { close(level, published[i]!, 2e-4) })
    })

    it('kivi-2b: 32 tokens of a channel of keys, 32 channels of a token of values', async () => {
      const [key, value] = await run('kivi-2b')
      const tokens = Array.from({ length: 32 }, (_, i) => at(key!.rows, 1, 64 + i, 3))
      integersOf(tokens.map((i) => key!.rows.data[i]!), 2).forEach((expected, i) => { close(key!.coded.data[tokens[i]!]!, expected) })
      const channels = Array.from({ length: 32 }, (_, i) => at(value!.rows, 0, 5, 32 + i))
      integersOf(channels.map((i) => value!.rows.data[i]!), 2).forEach((expected, i) => { close(value!.coded.data[channels[i]!]!, expected) })
      close(key!.bits, 3)
      close(value!.bits, 3)
    })

    it('kitty: eight channels of a page of a head have more than four levels', async () => {
      const [key, value] = await run('kitty')
      const { rows, coded } = key!
      const page = (data: Float32Array, channel: number) => Array.from({ length: 128 }, (_, token) => data[at(rows, 0, 128 + token, channel)]!)
      const levels = Array.from({ length: rows.channels }, (_, channel) => new Set(page(coded.data, channel)).size)
      const raised = levels.flatMap((count, channel) => count > 4 ? [channel] : [])
      assert.equal(raised.length, rows.channels / 8)
      const magnitude = (channel: number) => page(rows.data, channel).reduce((sum, value) => sum + Math.abs(value), 0)
      const order = Array.from({ length: rows.channels }, (_, channel) => channel).sort((a, b) => magnitude(b) - magnitude(a))
      assert.deepEqual(raised, order.slice(0, raised.length).sort((a, b) => a - b))
      close(key!.bits, 2 + 2 / 8 + 32 / 128 + 1 / 128)
      close(value!.bits, 2 + 32 / rows.channels)
    })

    it('vidkv: three levels, and signs of a Fourier transform', () => {
      const values = [3, -1, 0.2, -0.4, 2, -5, 0.1, 0.3]
      const mean = half(values.reduce((sum, value) => sum + Math.abs(value), 0) / 8)
      const data = Float32Array.from(values)
      threeLevels(data, { first: 0, step: 1, count: 8 })
      assert.deepEqual([...data], values.map((value) => Math.abs(value) <= mean / 2 ? 0 : Math.sign(value) * mean).map(Math.fround))

      // The whole complex transform, all 8 frequencies, in place of the independent parts.
      const angle = (k: number, n: number) => 2 * Math.PI * k * n / 8
      const spectrum = values.map((_, k) => [
        values.reduce((sum, value, n) => sum + value * Math.cos(angle(k, n)), 0), values.reduce((sum, value, n) => sum - value * Math.sin(angle(k, n)), 0),
      ] as const)
      const average = (parts: number[]) => half(parts.reduce((sum, part) => sum + Math.abs(part), 0) / parts.length)
      const real = average([0, 1, 2, 3, 4].map((k) => spectrum[k]![0]))
      const imaginary = average([1, 2, 3].map((k) => spectrum[k]![1]))
      const coded = spectrum.map(([re, im], k) => [re >= 0 ? real : -real, k % 4 === 0 ? 0 : im >= 0 ? imaginary : -imaginary] as const)
      const expected = values.map((_, n) => coded.reduce((sum, [re, im], k) => sum + re * Math.cos(angle(k, n)) - im * Math.sin(angle(k, n)), 0) / 8)
      const signs = Float32Array.from(values)
      fourierSigns(signs, { first: 0, step: 1, count: 8 })
      signs.forEach((value, i) => { close(value, expected[i]!, 1e-4) })
    })

    it('vidkv-1.5/1.58: half of the channels at 2 bits; five levels in a byte', async () => {
      const [key, value] = await run('vidkv-1.5/1.58-g128')
      close(key!.bits, 1.5 + 32 / 128 + 1 / 128)
      close(value!.bits, 8 * 26 / 128 + 16 / 128) // 26 bytes for 128 tokens
    })

    it('calibquant: two levels, at the quantiles', () => {
      const data = Float32Array.from({ length: 64 }, (_, i) => (i * 37) % 64)
      assert.equal(toQuantiles({ data, heads: 1, tokens: 1, channels: 64 }, { layer: 0, side: 'value' }, 0.1), 64 + 32)
      assert.deepEqual([...new Set(data)].sort((a, b) => a - b), [6, 57])
    })

    it('kvquant: levels of a layer scaled by channel; about 1 % of keys and one value of a token kept', async () => {
      const [key, value] = await run('kvquant-2b-1%')
      for (const { rows, coded } of [key!, value!]) {
        let kept = 0
        for (let i = 0; i < rows.data.length; i++) if (coded.data[i] === Math.fround(half(rows.data[i]!))) kept += 1
        assert.ok(kept / rows.data.length > 0.005 && kept / rows.data.length < 0.03, `${kept}`)
      }
      const share = 1 / (value!.rows.heads * value!.rows.channels)
      close(value!.bits, 2 + 32 * share + 32 * share) // two ends and one outlier
      const [plain] = await run('kvquant-2b')
      const { rows, coded } = plain!
      const levels = new Set(Array.from({ length: rows.tokens }, (_, token) => coded.data[at(rows, 0, token, 11)]!))
      assert.ok(levels.size <= 4)
      for (let token = 0; token < rows.tokens; token++) { // each element became the nearest of the levels that its channel uses
        const value = rows.data[at(rows, 0, token, 11)]!
        const distance = Math.min(...[...levels].map((level) => Math.abs(level - value)))
        close(Math.abs(coded.data[at(rows, 0, token, 11)]! - value), distance, 1e-4)
      }
      assert.equal(plain!.bits, 2)
    })

    it('turboquant: levels of Lloyd and Max, an orthogonal rotation, products kept on average', async () => {
      const published = { 1: [0.7979], 2: [0.4528, 1.51], 3: [0.2451, 0.756, 1.344, 2.152] }
      for (const [bits, positive] of Object.entries(published)) {
        const levels = normalLevels(Number(bits))
        positive.forEach((level, i) => { close(levels[2 ** Number(bits) / 2 + i]!, level, 5e-3) })
      }
      const rotation = randomRotation(16, 4)
      for (let i = 0; i < 16; i++) {
        for (let j = 0; j < 16; j++) {
          close(rotation.subarray(i * 16, i * 16 + 16).reduce((sum, value, k) => sum + value * rotation[j * 16 + k]!, 0), i === j ? 1 : 0, 1e-9)
        }
      }
      const [mse] = await run('turboquant-mse-2b')
      const [prod] = await run('turboquant-prod-2b')
      close(mse!.bits, 2 + 16 / 64)
      close(prod!.bits, 2 + 32 / 64)
      close(mse!.error, 0.1175, 0.15) // of a normal number at 2 bits
      // The sketch is unbiased: along the row itself what was lost comes back on average.
      const product = (a: Float32Array, b: Float32Array) => a.reduce((sum, value, i) => sum + value * b[i]!, 0)
      const gain = ({ rows, coded }: { rows: Rows; coded: Rows }) => product(rows.data, coded.data) / product(rows.data, rows.data)
      close(gain(prod!), 1, 0.03)
      assert.ok(gain(mse!) < 0.95)
    })

    it('vecinfer: smoothing and mixing are undone, and keep products with queries treated inversely', () => {
      const keys = sample(places[0]!, true, 32)
      const scales = smoothing(keys)
      const mixed = { ...keys, data: keys.data.slice() }
      mix(mixed, scales)
      const query = { ...keys, data: keys.data.map((_, i) => Math.sin(i)) }
      const mixedQuery = { ...query, data: query.data.slice() }
      mix(mixedQuery, scales.map((scale) => 1 / scale))
      for (let row = 0; row < keys.heads * keys.tokens; row++) {
        const product = (a: Rows, b: Rows) => a.data.subarray(row * 64, row * 64 + 64).reduce((sum, value, i) => sum + value * b.data[row * 64 + i]!, 0)
        close(product(mixed, mixedQuery), product(keys, query), 1e-3)
      }
      unmix(mixed, scales)
      assert.ok(squaredError(keys.data, mixed.data) < 1e-10)
    })

    it('nsnquant: rows of mean square 1 and channels near mean 0 in between; nothing is lost without quantization', async () => {
      const rows = sample(places[0]!, false)
      const before = rows.data.slice()
      const bits = normalizeShiftNormalize(rows, (normal) => {
        for (let row = 0; row < normal.heads * normal.tokens; row++) {
          close(normal.data.subarray(row * 64, row * 64 + 64).reduce((sum, value) => sum + value ** 2, 0) / 64, 1, 0.1)
        }
        const all = normal.data
        close(all.reduce((sum, value) => sum + value, 0) / all.length, 0, 0.05)
      })
      assert.ok(squaredError(before, rows.data) < 1e-9)
      close(bits / rows.data.length, 16 / 64 + 16 / 128)
      assert.ok((await run('nsnquant-2b'))[0]!.error < (await run('nsnquant-1b'))[0]!.error)
    })

    it('cq and vecinfer take b / c bits', async () => {
      for (const name of ['cq-8c8b:uniform', 'vecinfer-8d8b']) for (const { bits } of await run(name)) assert.equal(bits, 1)
    })
  })

  describe('all of them', () => {
    it('have names and files of their own, and a width of the table', () => {
      assert.equal(new Set(methods.map(({ name }) => name)).size, methods.length)
      for (const { file } of methods) assert.ok(readFileSync(path.join(root, 'bench', 'quality', 'methods', file)).length > 0)
    })

    // Not of those whose levels are inside the ends that they scale by (kvquant), or that measure a row's length anew.
    for (const name of ['int4-group', 'int2-channel', 'nf4-token', 'kivi-2b', 'cq-8c8b:attention', 'cq-4c8b:uniform', 'vecinfer-4d8b']) {
      it(`${name}: a second time changes nothing`, async () => {
        for (const { place, coded, quantizer } of await run(name, 128)) {
          const once = coded.data.slice()
          quantizer.quantize(coded, place)
          assert.ok(squaredError(once, coded.data) < 2e-6, `${place.side} ${squaredError(once, coded.data)}`)
        }
      })
    }

    const families = [
      ...['token', 'channel', 'mixed', 'group'].map((axis) => [`int1-${axis}`, `int2-${axis}`, `int4-${axis}`]),
      ['nf2-mixed', 'nf4-mixed'], ['kvquant-1b', 'kvquant-2b', 'kvquant-4b'], ['kvquant-1b', 'kvquant-1b-1%'], ['kivi-1b', 'kivi-2b', 'kivi-4b'],
      ['kivi-2b', 'kivi-4b'], ['turboquant-mse-1b', 'turboquant-mse-2b', 'turboquant-mse-4b'], ['nsnquant-1b', 'nsnquant-2b'],
      ['vecinfer-8d8b', 'vecinfer-4d8b', 'vecinfer-2d8b'], ['cq-8c8b:uniform', 'cq-4c8b:uniform', 'cq-2c8b:uniform'],
    ]
    for (const family of families) {
      it(`error falls with bits: ${family.join(' > ')}`, async () => {
        const errors = await Promise.all(family.map(async (name) => (await run(name)).map(({ error }) => error)))
        for (let i = 1; i < errors.length; i++) {
          errors[i]!.forEach((error, side) => { assert.ok(error < errors[i - 1]![side]!, `${family[i]} ${places[side]!.side}: ${error}`) })
        }
      })
    }
    it('error falls with raised channels: kitty > kitty-pro (keys)', async () => {
      assert.ok((await run('kitty-pro'))[0]!.error < (await run('kitty'))[0]!.error)
    })
  })
})

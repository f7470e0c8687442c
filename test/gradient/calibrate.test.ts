import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'

import { calibrate, captureActivations, learnCodebook } from '../../lib/calibrate'
import { codeOf } from '../../lib/errors'
import { float16FromFloat32 } from '../../lib/float16'
import { GradientModel } from '../../lib/gradient/model'
import { DecoderModel } from '../../lib/onnx/model'
import { writeHeader } from '../../lib/safetensors'
import { prose, temporaryFolder, tinyLlama } from '../onnx/files'

const tokens = prose(0, 700)
const length = 256
const [layers, kvHeads, headDim] = [4, 2, 64]
const width = kvHeads * headDim

/** Gradients of the text, for each layer [tokens][kvHeads][headDim], chunk after chunk. */
async function gradientsOf(text: number[]): Promise<Record<'key' | 'value', Float32Array[]>> {
  using model = await GradientModel.load(tinyLlama, { threads: 1 })
  const all = { key: Array.from({ length: layers }, () => [] as number[]), value: Array.from({ length: layers }, () => [] as number[]) }
  for (let start = 0; start < text.length; start += length) {
    const { gradients } = await model.run(text.slice(start, start + length))
    for (const side of ['key', 'value'] as const) gradients[side].forEach((data, layer) => { for (const g of data) all[side][layer]!.push(g) })
  }
  return { key: all.key.map((data) => Float32Array.from(data)), value: all.value.map((data) => Float32Array.from(data)) }
}

describe('fisher weights', function () {
  this.timeout(60_000)
  const folder = temporaryFolder()
  let model: DecoderModel
  let gradients: Record<'key' | 'value', Float32Array[]>
  before(async () => {
    model = await DecoderModel.load(tinyLlama, { threads: 1 })
    gradients = await gradientsOf(tokens)
  })
  after(() => { model.dispose() })

  interface FileOptions { dtype?: 'F32' | 'F16'; metadata?: Record<string, string>; count?: number; spoil?: (data: Float32Array) => void }
  const save = (name: string, { dtype = 'F32', metadata = {}, count = tokens.length, spoil }: FileOptions = {}): string => {
    const tensors = gradients.key.flatMap((_, layer) => (['key', 'value'] as const).map((side) =>
      ({ name: `layers.${layer}.${side}`, data: gradients[side][layer]!.slice() })))
    spoil?.(tensors[3]!.data)
    const shapes = tensors.map((tensor) => ({ name: tensor.name, dtype, shape: [count, kvHeads, headDim] }))
    const header = writeHeader(shapes, { format: 'couplet.gradients', ...metadata })
    const bodies = tensors.map(({ data }) => {
      const rows = data.subarray(0, count * kvHeads * headDim)
      return dtype === 'F32' ? new Uint8Array(rows.buffer, 0, rows.byteLength) : new Uint8Array(float16FromFloat32(rows).buffer)
    })
    const path = join(folder.path, name)
    writeFileSync(path, Buffer.concat([header, ...bodies]))
    return path
  }
  const hash = createHash('sha256').update(Uint32Array.from(tokens)).digest('hex')

  it('are gradients of each channel, for the tokens that Capture keeps', async () => {
    using fisher = await captureActivations(model, { text: tokens, length, weights: 'fisher', points: 300, seed: 5, heldOut: 0 })
    using uniform = await captureActivations(model, { text: tokens, length, points: 300, seed: 5, heldOut: 0 })
    assert.deepEqual([fisher.tokens, fisher.sample.tokensKept, fisher.heldOut, fisher.text], [700, 300, undefined, uniform.text])
    using whole = await captureActivations(model, { text: tokens, length, weights: 'fisher', heldOut: 0 })
    for (let layer = 0; layer < layers; layer++) {
      for (const side of ['key', 'value'] as const) {
        const [a, b] = [await fisher.sample.side(layer, side), await uniform.sample.side(layer, side)]
        assert.deepEqual([a.rows.length, b.rows.length, b.weights], [300 * width, 300 * width, undefined])
        assert.ok(a.rows.every((x, i) => Math.abs(x - b.rows[i]!) < 1e-3))
        const weights = (await whole.sample.side(layer, side)).weights!
        assert.equal(weights.length, 700 * width)
        const expected = gradients[side][layer]!
        assert.ok(weights.every((weight, i) => Math.abs(weight - expected[i]!) <= 1e-5 * Math.abs(expected[i]!) + 1e-12))
      }
    }
  })

  it('are the same from a file, and the codebook too', async () => {
    const codec = { key: 'cq-8c4b', value: 'cq-4c4b' }
    const options = { model: tinyLlama, text: tokens, length, codec, weights: 'fisher', iterations: 5, threads: 1 } as const
    const { codebook: own } = await calibrate(options)
    assert.equal(own.metadata.learned?.weights, 'fisher')
    const path = save('own.safetensors', { metadata: { text: hash, length: String(length) } })
    const { codebook: read } = await calibrate({ ...options, gradients: path })
    const { codebook: uniform } = await calibrate({ ...options, weights: 'uniform' })
    const distance = (a: Float32Array, b: Float32Array) => Math.hypot(...a.map((x, i) => x - b[i]!)) / Math.hypot(...a)
    for (let layer = 0; layer < layers; layer++) {
      for (const table of ['keyTable', 'valueTable'] as const) {
        assert.ok(distance(own[table](layer), read[table](layer)) < 1e-2, `layer ${layer}`)
        assert.ok(distance(own[table](layer), uniform[table](layer)) > 0.05)
      }
    }
  })

  it('reads float16 and files that do not name their text', async () => {
    using captured = await captureActivations(model, { text: tokens, length, weights: 'fisher', gradients: save('half.safetensors', { dtype: 'F16' }) })
    const weights = (await captured.sample.side(0, 'key')).weights!
    const first = gradients.key[0]!
    for (let i = 0; i < kvHeads * headDim; i++) assert.ok(Math.abs(weights[i]! - first[i]!) <= 1e-3 * Math.abs(first[i]!) + 1e-7)
  })

  it('refuses a file of another text, model or kind, and gradients that are no numbers', async () => {
    const attempt = (gradients: string, weights: 'fisher' | 'uniform' = 'fisher') => captureActivations(model, { text: tokens, length, weights, gradients })
    const refused: [path: string, reason: RegExp][] = [
      [save('text', { metadata: { text: 'abc' } }), /it is of the text abc/],
      [save('length', { metadata: { length: '512' } }), /chunks of 512 tokens, and `length` is 256/],
      [save('short', { count: 699 }), /has shape \[699, 2, 64\], and the text and the model ask for \[700, 2, 64\]/],
      [save('kind', { metadata: { format: 'couplet.codebook' } }), /"format" that is "couplet\.gradients"/],
      [join(tinyLlama, 'config.json'), /its header claims/],
    ]
    for (const [path, reason] of refused) {
      await assert.rejects(attempt(path), (error: Error) => {
        assert.equal(codeOf(error), 'ERR_COUPLET_INVALID_ARGUMENT')
        assert.match(error.message, reason)
        return true
      })
    }
    await assert.rejects(attempt(save('nan', { spoil: (data) => { data[5 * kvHeads * headDim + 70] = NaN } })),
      { code: 'ERR_COUPLET_NOT_FINITE', layer: 1, kvHead: 1, token: 5, channel: 6 })
    await assert.rejects(attempt(save('fine'), 'uniform'), /"fisher" beside `gradients`/)
    await assert.rejects(captureActivations(model, { text: tokens, weights: 'fissure' as 'fisher' }), /"fisher" for `weights`/)
    await assert.rejects(attempt(join(folder.path, 'nowhere')), { code: 'ENOENT' })
  })

  it('stops when its signal fires', async () => {
    const controller = new AbortController()
    const onProgress = () => { controller.abort(new Error('enough')) }
    await assert.rejects(captureActivations(model, { text: tokens, length, weights: 'fisher', signal: controller.signal, onProgress }), /enough/)
  })

  it('learns the same codebook again', async () => {
    const learn = async () => {
      using captured = await captureActivations(model, { text: tokens.slice(0, 200), weights: 'fisher', threads: 1 })
      return await learnCodebook(captured, { codec: 'cq-8c2b', iterations: 3 })
    }
    const [first, second] = [await learn(), await learn()]
    assert.deepEqual(first.keyTable(2), second.keyTable(2))
  })
})

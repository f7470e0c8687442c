/** Models whose keys and values live on a GPU while onnxruntime runs the rest on the CPU. */
import assert from 'node:assert/strict'

import { evaluate, generate } from '../../lib'
import { Capture } from '../../lib/onnx/capture'
import { DecoderModel } from '../../lib/onnx/model'
import { attach } from '../../lib/transformers'
import { prose, tinyLlama } from '../onnx/files'
import { codebooks, loadModel, loadTokenizer, modelId, tokenRows, type Inputs } from '../transformers/setup'
import { describeOn } from './devices'

describeOn('gpus', 'a model', (device) => {
  const prompt = 'The pages of a cache hold the codes of a fixed number of tokens; '

  for (const coded of [false, true])
    it(`writes the same text as on the CPU, ${coded ? 'on codes' : 'in full precision'}`, async () => {
      const written: string[] = []
      for (const place of ['cpu', device] as const) {
        using model = await DecoderModel.load(tinyLlama, { device: place, ...(coded && { codebook: await codebooks('cq-8c6b'), window: 8 }) })
        assert.equal(model.cache.device, place)
        let text = ''
        for await (const piece of generate(model, { directory: tinyLlama, prompt, tokens: 12 })) text += piece
        written.push(text)
      }
      assert.equal(written[0]!.length > 4, true)
      assert.equal(written[1], written[0])
    }).timeout(60_000)

  it('predicts a text as well as on the CPU', async () => {
    const on = (place: typeof device) => evaluate({ model: tinyLlama, text: prose(0, 60), length: 30, device: place })
    const [there, here] = [await on(device), await on('cpu')]
    assert.ok(Math.abs(there.bitsPerToken - here.bitsPerToken) < 1e-2, `${there.bitsPerToken} and ${here.bitsPerToken} bits`)
    assert.equal(there.bytesPerToken, here.bytesPerToken)
  }).timeout(60_000)

  it('is attached to transformers.js', async () => {
    const [model, tokenizer] = [await loadModel(), await loadTokenizer()]
    try {
      const greedy = async () => tokenRows(await model.generate({ ...tokenizer(prompt) as Inputs, max_new_tokens: 8, do_sample: false }))
      const expected = await greedy()
      const attachment = await attach(model, { path: modelId, device })
      assert.equal(attachment.decoder.cache.device, device)
      assert.deepEqual(await greedy(), expected)
      assert.ok(attachment.statistics().cache.rawBytes > 0)
      attachment.detach()
    } finally {
      await model.dispose()
    }
  }).timeout(60_000)

  it('refuses a capture with attention weights, which are computed on the CPU', async () => {
    using model = await DecoderModel.load(tinyLlama, { device })
    const capture = new Capture({ model, points: 4, weights: 'attention' })
    await assert.rejects(model.run([{ sequence: model.sequence(), tokens: [1, 2, 3] }], { capture }), { code: 'ERR_COUPLET_UNSUPPORTED' })
  })
})

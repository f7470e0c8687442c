import assert from 'node:assert/strict'
import { cpSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

import type { GenerateOptions } from '../../lib'
import { generate, loadTokenizer } from '../../lib'
import { DecoderModel } from '../../lib/onnx'
import { temporaryFolder, tinyLlama } from '../onnx/files'

const folder = temporaryFolder()
const prompt = 'The cache of a language model '

describe('generate', () => {
  let model: DecoderModel
  before(async () => { model = await DecoderModel.load(tinyLlama, { threads: 2 }) })
  after(() => { model.dispose() })

  async function written(options: Partial<GenerateOptions> = {}): Promise<string> {
    let text = ''
    for await (const piece of generate(model, { directory: tinyLlama, prompt, tokens: 12, ...options })) text += piece
    return text
  }

  it('leaves a sequence that holds the prompt and all that was written', async () => {
    using sequence = model.sequence()
    const [first, second] = [await written({ sequence, tokens: 7 }), ' and so on']
    assert.equal(sequence.length, prompt.length + 7)
    const whole = await written({ prompt: prompt + first + second, tokens: 5 })
    assert.equal(await written({ sequence, prompt: second, tokens: 5 }), whole)
  })

  it('leaves the same when the text ends by itself', async () => {
    using sequence = model.sequence()
    const text = await written()
    const [stop] = (await loadTokenizer(tinyLlama)).encode(text.charAt(6))
    const short = await written({ sequence, stop: [stop!] })
    assert.equal(short, text.slice(0, text.indexOf(text.charAt(6))))
    assert.equal(sequence.length, prompt.length + short.length)
  })

  it('writes nothing when no tokens are asked for, and reads the prompt', async () => {
    using sequence = model.sequence()
    assert.equal(await written({ sequence, tokens: 0 }), '')
    assert.equal(sequence.length, prompt.length)
  })

  it('gives its own sequence back, whoever ends the text', async () => {
    for await (const piece of generate(model, { directory: tinyLlama, prompt })) if (piece) break
    assert.equal(model.cache.statistics().tokens, 0)
  })

  it('refuses what it cannot take', async () => {
    const numbers = [{ tokens: -1 }, { temperature: -1 }, { temperature: 1n }, { temperature: '1' }, { temperature: {} }, { seed: 0.5 }]
    const others = [{ prompt: '' }, { prompt: 5 }, { stop: 3 }, { sequence: null }, { sequence: {} }, { signal: {} }]
    for (const options of [...numbers, ...others] as object[])
      await assert.rejects(written(options), { code: 'ERR_COUPLET_INVALID_ARGUMENT' }, JSON.stringify(Object.keys(options)))
  })
})

describe('loadTokenizer', () => {
  const [tokenizer, config] = ['tokenizer.json', 'tokenizer_config.json']
  for (const [file, text] of [[tokenizer, '{}'], [tokenizer, 'no JSON'], [config, '{'], [config, 'null']] as const)
    it(`refuses ${text} for ${file}`, async () => {
      const directory = join(folder.path, `${file} ${text.length}`)
      cpSync(tinyLlama, directory, { recursive: true, filter: (source) => !source.endsWith('onnx') })
      writeFileSync(join(directory, file), text)
      await assert.rejects(loadTokenizer(directory), { code: 'ERR_COUPLET_UNSUPPORTED_MODEL', message: /Expected a tokenizer at .*tokenizer.json/ })
    })
})

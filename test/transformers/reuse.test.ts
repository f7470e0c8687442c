import assert from 'node:assert/strict'
import type { PreTrainedTokenizer } from '@huggingface/transformers'
import { attach, type Attachment, type AttachOptions } from '../../lib/transformers'
import { codebooks, loadModel, loadTokenizer, modelId, text, tokenRows, type Inputs, type Model } from './setup'

describe('sequences that outlive a call', function () {
  this.timeout(60_000)
  let model: Model
  let tokenizer: PreTrainedTokenizer
  let attachment: Attachment

  before(async () => {
    model = await loadModel()
    tokenizer = await loadTokenizer()
  })
  afterEach(() => { attachment.detach() })
  after(() => model.dispose())

  const open = async (options: AttachOptions = {}) => {
    attachment = await attach(model, { path: modelId, codebooks: await codebooks('cq-8c8b'), ...options })
  }
  /** The text after `tokens` more, and how many tokens went through the model for that. */
  const extend = async (prompt: string | string[], tokens: number) => {
    const before = attachment.statistics()
    const inputs = tokenizer(prompt, { padding: true }) as Inputs
    const rows = tokenRows(await model.generate({ ...inputs, max_new_tokens: tokens, do_sample: false }))
    const after = attachment.statistics()
    return {
      text: String.fromCharCode(...rows[0]!), rows,
      run: after.tokensRun - before.tokensRun, reused: after.tokensReused - before.tokensReused,
    }
  }

  it('runs only the new tokens of a text that goes on', async () => {
    await open()
    const first = await extend(text(200), 20)
    assert.deepEqual([first.run, first.reused], [219, 0])
    // The last token of the first call was sampled and never run.
    const second = await extend(first.text + ' And then', 20)
    assert.deepEqual([second.run, second.reused], [1 + 9 + 19, 219])
    const third = await extend(second.text, 5)
    assert.deepEqual([third.run, third.reused], [1 + 4, 248])
    assert.equal(attachment.statistics().sequences, 1)
  })

  it('runs only the last token of a text that it knows', async () => {
    await open()
    const first = await extend(text(100), 1)
    const again = await extend(text(100), 1)
    assert.deepEqual([again.run, again.reused], [1, 99])
    assert.deepEqual(again.rows, first.rows)
  })

  it('gives in full precision what a fresh run gives', async () => {
    await open({ codebooks: undefined as never })
    const first = await extend(text(150), 20)
    const prompt = first.text + '\n\nSee also'
    const second = await extend(prompt, 30)
    attachment.detach()
    assert.deepEqual(tokenRows(await model.generate({ ...(tokenizer(prompt) as Inputs), max_new_tokens: 30, do_sample: false })), second.rows)
    await open()
  })

  it('rolls back when the end of the text was changed', async () => {
    await open()
    const first = await extend(text(200), 10)
    const second = await extend(first.text.slice(0, 195) + 'so', 1)
    assert.deepEqual([second.run, second.reused], [2, 195])
    assert.deepEqual(pick(attachment.statistics()), { sequences: 1, rollbacks: 1, forks: 0, evictions: 0 })
  })

  it('forks when two conversations begin alike, and keeps both', async () => {
    await open()
    const system = text(150)
    const one = await extend(`${system} What is a shell? ${text(60, 500)}`, 5)
    const two = await extend(`${system} Tell me about ${text(60, 700)}`, 5)
    assert.ok(two.reused >= 150 && two.reused < 160)
    assert.deepEqual(pick(attachment.statistics()), { sequences: 2, rollbacks: 0, forks: 1, evictions: 0 })
    assert.equal((await extend(one.text, 1)).run, 1)
    assert.equal((await extend(two.text, 1)).run, 1)
  })

  it('finds the rows of a batch again, one by one', async () => {
    await open()
    const prompts = [text(120), text(90, 400)]
    const { rows } = await extend(prompts, 4)
    // Both rows are as long as the longer prompt; its padding is not part of a row's text.
    const texts = [rows[0]!, rows[1]!.slice(30)].map((row) => String.fromCharCode(...row))
    assert.equal((await extend(texts[1]!, 3)).run, 3)
    assert.equal((await extend(texts, 1)).run, 2)
  })

  it('keeps as many sequences as `sequences` says', async () => {
    await open({ sequences: 2 })
    for (const skip of [0, 300, 600]) await extend(text(40, skip), 1)
    assert.deepEqual(pick(attachment.statistics()), { sequences: 2, rollbacks: 0, forks: 0, evictions: 1 })
    assert.equal((await extend(text(40, 600), 1)).run, 1)
    assert.equal((await extend(text(40, 0), 1)).run, 40, 'the one that was used least recently is gone')
  })

  it('makes room under `memory` by dropping what was used least recently', async () => {
    await open()
    await extend(text(300), 1)
    const { pageBytes, rawBytes } = attachment.statistics().cache
    attachment.detach()
    await open({ memory: 2.5 * (pageBytes + rawBytes) })
    for (const skip of [0, 400, 800]) await extend(text(300, skip), 1)
    const { evictions, sequences, cache } = attachment.statistics()
    assert.deepEqual([evictions, sequences], [1, 2])
    assert.ok(cache.pageBytes + cache.rawBytes <= 2.5 * (pageBytes + rawBytes))
    assert.equal((await extend(text(300, 800), 1)).run, 1)
  })

  it('says so when one text alone does not fit, and stays usable', async () => {
    await open({ memory: 200_000 })
    const errors = silence()
    try {
      await assert.rejects(extend(text(3000), 1), { code: 'ERR_COUPLET_CACHE_FULL' })
    } finally {
      errors.restore()
    }
    assert.equal((await extend(text(20), 2)).run, 21)
  })
})

function pick({ sequences, rollbacks, forks, evictions }: ReturnType<Attachment['statistics']>) {
  return { sequences, rollbacks, forks, evictions }
}

/** transformers.js prints what run() rejects with. */
function silence() {
  const { error } = console
  console.error = () => undefined
  return { restore: () => { console.error = error } }
}

import assert from 'node:assert/strict'
import { cp, mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import {
  AutoModelForCausalLM, InterruptableStoppingCriteria, ones, StoppingCriteriaList, TextGenerationPipeline, TextStreamer, type PreTrainedTokenizer, type Tensor,
} from '@huggingface/transformers'
import { decodeModel, encodeModel } from '../../lib/onnx/proto'
import { attach, type Attachment } from '../../lib/transformers'
import {
  codebooks, floats, forward, loadModel, loadTokenizer, modelFolder, modelId, nextPast, predictions, text, tokenRows, type Inputs, type Model,
} from './setup'

type Output = { sequences: Tensor; past_key_values: { get_seq_length(): number } }

describe('attach', function () {
  this.timeout(60_000)
  let model: Model
  let tokenizer: PreTrainedTokenizer
  let attachment: Attachment | undefined

  before(async () => {
    model = await loadModel()
    tokenizer = await loadTokenizer()
  })
  afterEach(() => {
    attachment?.detach()
    attachment = undefined
  })
  after(() => model.dispose())

  const inputs = (prompt: string | string[]) => tokenizer(prompt, { padding: true }) as Inputs
  const greedy = (prompt: string | string[], tokens: number, options = {}) =>
    model.generate({ ...inputs(prompt), max_new_tokens: tokens, do_sample: false, ...options }).then(tokenRows)

  describe('without codebooks', () => {
    it('generates what the untouched model generates', async () => {
      const prompts = ['The quick brown fox', text(300), text(700, 900)]
      const expected = []
      for (const prompt of prompts) expected.push(await greedy(prompt, 60))
      attachment = await attach(model, { path: modelId })
      for (const [index, prompt] of prompts.entries()) assert.deepEqual(await greedy(prompt, 60), expected[index])
    })

    it('runs long prompts in chunks, to the same end', async () => {
      const prompts = [text(500), text(230, 400)]
      const expected = [await greedy(prompts[0]!, 30), await greedy(prompts[1]!, 30)]
      attachment = await attach(model, { path: modelId, chunk: 64, sequences: 0 })
      const rows = await greedy(prompts, 30)
      assert.deepEqual([rows[0], rows[1]!.slice(270)], [expected[0]![0], expected[1]![0]])
      assert.equal(attachment.statistics().tokensRun, 500 + 230 + 2 * 29)
    })

    it('computes the logits of every position when the model itself is called', async () => {
      const { logits: expected } = await forward(model, inputs(text(100)))
      attachment = await attach(model, { path: modelFolder })
      const { logits } = await forward(model, inputs(text(100)))
      assert.deepEqual(logits.dims, expected.dims)
      assert.ok(floats(logits).every((value, index) => Math.abs(value - floats(expected)[index]!) < 1e-3))
      // A second call of the same text runs all of it again: every logit is asked for.
      assert.deepEqual((await forward(model, inputs(text(100)))).logits.dims, expected.dims)
      assert.equal(attachment.statistics().tokensReused, 0)
    })

    it('finds the file by the name in config.json, and feeds a graph that takes positions', async () => {
      const folder = await mkdtemp(join(tmpdir(), 'couplet-'))
      try {
        await cp(modelFolder, folder, { recursive: true })
        const file = join(folder, 'onnx', 'model.onnx')
        const graph = decodeModel(await readFile(file))
        const [ids] = graph.graph.input
        graph.graph.input.push({ ...ids!, name: 'position_ids' })
        await writeFile(file, encodeModel(graph))
        const config = JSON.parse(await readFile(join(folder, 'config.json'), 'utf8')) as object
        await writeFile(join(folder, 'config.json'), JSON.stringify({ ...config, _name_or_path: folder }))
        const other = await AutoModelForCausalLM.from_pretrained(folder, { dtype: 'fp32', device: 'cpu' })
        const prompts = inputs([text(60), text(90, 200)])
        attachment = await attach(other)
        const rows = tokenRows(await other.generate({ ...prompts, max_new_tokens: 20, do_sample: false }))
        attachment.detach()
        attachment = await attach(model, { path: modelId })
        assert.deepEqual(rows, await greedy([text(60), text(90, 200)], 20))
        await other.dispose()
      } finally {
        await rm(folder, { recursive: true })
      }
    })

    it('samples, with the same processors as ever', async () => {
      attachment = await attach(model, { path: modelId })
      const rows = await greedy('Usage: ', 20, { do_sample: true, top_k: 5, temperature: 0.8, repetition_penalty: 1.1 })
      assert.equal(rows[0]!.length, 27)
    })

    it('goes on from the past_key_values of an earlier call', async () => {
      const whole = await greedy(text(200), 40)
      attachment = await attach(model, { path: modelId })
      const first = await model.generate({ ...inputs(text(200)), max_new_tokens: 15, do_sample: false, return_dict_in_generate: true }) as unknown as Output
      assert.equal(first.past_key_values.get_seq_length(), 214)
      const { tokensRun } = attachment.statistics()
      const second = tokenRows(await model.generate({
        inputs: first.sequences, attention_mask: ones(first.sequences.dims), past_key_values: first.past_key_values, max_new_tokens: 25, do_sample: false,
      } as never))
      assert.deepEqual(second, whole)
      assert.equal(attachment.statistics().tokensRun - tokensRun, 25)
    })
  })

  describe('on packed codes', () => {
    it('generates text, and says what it kept', async () => {
      attachment = await attach(model, { path: modelId, codebooks: await codebooks('cq-8c8b'), window: 16, sinks: 2 })
      const [row] = await greedy(text(400), 50)
      assert.equal(row!.length, 450)
      const { cache, tokensRun } = attachment.statistics()
      assert.equal(tokensRun, 449)
      assert.ok(cache.codedTokens > 350, `coded ${cache.codedTokens}`)
    })

    it('stays close to full precision at 4 bits', async () => {
      const { input_ids, attention_mask } = inputs(text(300))
      const expected = predictions(await forward(model, { input_ids, attention_mask }))
      attachment = await attach(model, { path: modelId, codebooks: await codebooks('cq-2c8b'), window: 16 })
      // In steps of ten tokens, so that earlier tokens are read from codes.
      const found: number[] = []
      let past: object = {}
      for (let at = 0; at < 300; at += 10) {
        const columns = { input_ids: input_ids.slice(null, [at, at + 10]), attention_mask: attention_mask.slice(null, [0, at + 10]) }
        const outputs = await forward(model, { ...columns, ...past })
        past = { past_key_values: nextPast(outputs) }
        found.push(...predictions(outputs))
      }
      const agree = found.filter((token, index) => token === expected[index]).length
      assert.ok(agree > 270, `${agree} of 300 predictions agree`)
    })

    it('gives each row of a left padded batch what it gives that prompt alone', async () => {
      const prompts = [text(90), text(230, 400), text(150, 800)]
      for (const books of [undefined, await codebooks('cq-8c8b')]) {
        attachment = await attach(model, { path: modelId, ...(books && { codebooks: books }), sequences: 0 })
        const alone = []
        for (const prompt of prompts) alone.push((await greedy(prompt, 30))[0]!.slice(prompt.length))
        const batch = await greedy(prompts, 30)
        assert.deepEqual(batch.map((row) => row.slice(230)), alone)
        attachment.detach()
      }
    })

    it('streams through a TextStreamer and a pipeline', async () => {
      attachment = await attach(model, { path: modelId, codebooks: await codebooks('cq-8c8b') })
      const pieces: string[] = []
      const streamer = new TextStreamer(tokenizer, { skip_prompt: true, callback_function: (piece: string) => { pieces.push(piece) } })
      const generator = new TextGenerationPipeline({ task: 'text-generation', model, tokenizer })
      const settings = { max_new_tokens: 60, do_sample: false, streamer }
      const [result] = await generator('The following options are', settings as never) as unknown as { generated_text: string }[]
      assert.ok(pieces.length > 5)
      assert.equal('The following options are' + pieces.join(''), result!.generated_text)
    })

    it('runs several generate() calls at once', async () => {
      attachment = await attach(model, { path: modelId, codebooks: await codebooks('cq-8c8b') })
      const prompts = [text(100), text(160, 300), text(100) + ' or so']
      const alone = []
      for (const prompt of prompts) {
        alone.push(await greedy(prompt, 30))
        attachment.detach()
        attachment = await attach(model, { path: modelId, codebooks: await codebooks('cq-8c8b') })
      }
      assert.deepEqual(await Promise.all(prompts.map((prompt) => greedy(prompt, 30))), alone)
    })
  })

  describe('ending early', () => {
    it('rejects with the reason of the signal given to generate(), and goes on working', async () => {
      attachment = await attach(model, { path: modelId })
      const expected = await greedy(text(100), 10)
      const controller = new AbortController()
      let pieces = 0
      const streamer = { put: () => { if (++pieces === 5) controller.abort(new Error('enough')) }, end: () => undefined }
      await assert.rejects(greedy(text(300, 500), 1000, { signal: controller.signal, streamer }), /^Error: enough$/)
      assert.ok(pieces < 8)
      await assert.rejects(greedy('x', 1, { signal: AbortSignal.abort() }), { name: 'AbortError' })
      assert.deepEqual(await greedy(text(100), 10), expected)
    })

    it('rejects within a step', async () => {
      attachment = await attach(model, { path: modelId })
      const controller = new AbortController()
      const start = performance.now()
      const work = greedy(text(3500), 1000, { signal: controller.signal })
      setTimeout(() => { controller.abort() }, 20)
      await assert.rejects(work, { name: 'AbortError' })
      assert.ok(performance.now() - start < 500)
    })

    it('rejects every step when the signal of attach() says so', async () => {
      const controller = new AbortController()
      attachment = await attach(model, { path: modelId, signal: controller.signal })
      controller.abort()
      await assert.rejects(greedy('x', 1), { name: 'AbortError' })
    })

    it('lets InterruptableStoppingCriteria stop it', async () => {
      attachment = await attach(model, { path: modelId })
      const stop = new InterruptableStoppingCriteria()
      let pieces = 0
      const streamer = { put: () => { if (++pieces === 4) stop.interrupt() }, end: () => undefined }
      const criteria = new StoppingCriteriaList()
      criteria.push(stop)
      assert.equal((await greedy('The', 100, { stopping_criteria: criteria, streamer }))[0]!.length, 6)
    })
  })

  describe('detach', () => {
    it('gives the model its own session and method back', async () => {
      const session = model.sessions.model as unknown
      const expected = await greedy(text(80), 10)
      attachment = await attach(model, { path: modelId, codebooks: await codebooks('cq-8c8b') })
      assert.notEqual(model.sessions.model, session)
      await greedy(text(80), 10)
      const { decoder } = attachment
      attachment.detach()
      attachment.detach()
      assert.equal(model.sessions.model, session)
      assert.ok(!Object.hasOwn(model, 'generate'))
      assert.deepEqual(await greedy(text(80), 10), expected)
      assert.throws(() => decoder.sequence(), { code: 'ERR_COUPLET_DISPOSED' })
    })

    it('leaves one copy of the weights in memory when told to release the original', async () => {
      const other = await loadModel()
      const inputs = tokenizer('Weights') as Inputs
      const expected = tokenRows(await other.generate({ ...inputs, max_new_tokens: 5, do_sample: false }))
      const attached = await attach(other, { path: modelId, original: 'release' })
      assert.deepEqual(tokenRows(await other.generate({ ...inputs, max_new_tokens: 5, do_sample: false })), expected)
      attached.detach()
    })

    it('comes with model.dispose()', async () => {
      const other = await loadModel()
      const { decoder } = await attach(other, { path: modelId })
      await other.dispose()
      assert.throws(() => decoder.sequence(), { code: 'ERR_COUPLET_DISPOSED' })
    })

    it('happens at the end of a using block', async () => {
      const session = model.sessions.model as unknown
      {
        using scoped = await attach(model, { path: modelId })
        assert.notEqual(model.sessions.model, session)
        assert.equal(scoped.statistics().tokensRun, 0)
      }
      assert.equal(model.sessions.model, session)
    })
  })
})

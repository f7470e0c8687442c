// A chat-like conversation on packed codes: every turn streams, and runs only the tokens that the cache has not seen.
// Run: node examples/transformers.mjs
import { existsSync, mkdirSync, readFileSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { AutoModelForCausalLM, AutoTokenizer, env, TextStreamer } from '@huggingface/transformers'
import { calibrate } from 'couplet'
import { attach } from 'couplet/transformers'

const root = resolve(import.meta.dirname, '..')
const id = 'tiny-llama-bytes'
env.localModelPath = join(root, 'models')
env.allowRemoteModels = false

// Codebooks are learned once for a model, and kept.
const codebooks = join(root, 'build', `${id}.cq-8c8b.safetensors`)
if (!existsSync(codebooks)) {
  console.log('learning codebooks at 1 bit per channel ...')
  const text = ['eslint', 'cmake-js', 'fast-check'].map((name) => readFileSync(join(root, 'node_modules', name, 'README.md'), 'utf8')).join('\n')
  const settings = { codec: 'cq-8c8b', weights: 'attention', points: 4096, iterations: 20 }
  const { codebook: book } = await calibrate({ ...settings, model: join(env.localModelPath, id), text: text.slice(0, 32768) })
  mkdirSync(join(root, 'build'), { recursive: true })
  await book.save(codebooks)
}

const model = await AutoModelForCausalLM.from_pretrained(id, { dtype: 'fp32', device: 'cpu' })
const tokenizer = await AutoTokenizer.from_pretrained(id)
const attachment = await attach(model, { path: id, codebooks, window: 32, sinks: 4, memory: 64e6 })

let text = ''
for (const turn of ['The following options are', '\n\nNOTES\n       This function', '\n\nEXAMPLES\n       To list all']) {
  const { tokensRun } = attachment.statistics()
  process.stdout.write(turn)
  const streamer = new TextStreamer(tokenizer, { skip_prompt: true })
  const ids = await model.generate({ ...tokenizer(text + turn), max_new_tokens: 120, do_sample: false, repetition_penalty: 1.05, streamer })
  text = tokenizer.decode(ids.tolist()[0], { skip_special_tokens: true })
  const { tokensRun: now, cache } = attachment.statistics()
  console.log(`\n-- ${now - tokensRun} tokens run; ${cache.tokens} tokens in ${(cache.pageBytes + cache.rawBytes) >> 10} KB of keys and values --`)
}

attachment.detach()

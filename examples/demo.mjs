// The main job on a real model: learn codebooks, measure what they cost, write on at one bit a channel.
// Run by `npm run demo`, which installs and builds first.
import { readdirSync, readFileSync } from 'node:fs'
import path from 'node:path'
import { fileURLToPath } from 'node:url'
import { SingleBar } from 'cli-progress'
import { captureActivations, evaluate, generate, learnCodebook } from 'couplet'
import { DecoderModel } from 'couplet/onnx'

const root = path.join(path.dirname(fileURLToPath(import.meta.url)), '..')
const directory = path.join(root, 'models', 'tiny-llama-bytes')
const codecs = ['cq-2c8b', 'cq-4c8b', 'cq-8c10b', 'cq-8c8b']
const length = 512

const texts = readmes(path.join(root, 'node_modules'))
const calibration = excerpts(texts.filter((_, i) => i % 2 === 0), 64 * length)
const evaluation = excerpts(texts.filter((_, i) => i % 2 === 1), 24 * length)

console.log(`\nModel: ${path.relative(root, directory)}, a byte-level Llama (its README says what it was trained on)`)
console.log(`Text: READMEs of the installed packages; ${calibration.length} characters to learn from, ${evaluation.length} others to predict\n`)

const model = await DecoderModel.load(directory)
const { layers, kvHeads, headDim } = model.shape
const fullBytes = layers * 2 * kvHeads * headDim * 4
const rows = []

const captured = await withBar('running the text', (show) => captureActivations(model, {
  text: calibration, directory, length, weights: 'attention', onProgress: ({ done, total }) => show(done, total),
}))
const full = await withBar('predicting, fp32', (show) => evaluate({ model: directory, text: evaluation, length, onProgress: show }))
rows.push({ name: 'fp32', ...full, rate: await decodeRate(model) })

let smallest
for (const codec of codecs) {
  const codebook = await withBar(`learning ${codec}`, (show) => learnCodebook(captured, { codec, iterations: 30, onProgress: ({ done, total }) => show(done, total) }))
  const result = await withBar(`predicting, ${codec}`, (show) => evaluate({ model: directory, text: evaluation, length, codebook, window: 0, sinks: 0, onProgress: show }))
  const packed = await DecoderModel.load(directory, { codebook, window: 0, sinks: 0 })
  rows.push({ name: codec, ...result, rate: await decodeRate(packed) })
  packed.dispose()
  smallest = codebook
}
captured.dispose()
model.dispose()

console.log('\nEvery token coded (no window, no sinks). Bits and bytes: codes and padding at 512 tokens; tokens/s: one by one, after 384 tokens.\n')
console.log('  cache      bits/channel  KV bytes/token  times smaller  perplexity  tokens/s')
for (const row of rows) {
  console.log(`  ${row.name.padEnd(9)} ${row.bitsPerChannel.toFixed(2).padStart(13)} ${row.bytesPerToken.toFixed(0).padStart(15)} ${(fullBytes / row.bytesPerToken).toFixed(1).padStart(14)} ${row.perplexity.toFixed(3).padStart(11)} ${row.rate.toFixed(0).padStart(9)}`)
}

console.log('\nWriting on with cq-8c8b codes, a window of 32 and 4 sinks:\n')
const writer = await DecoderModel.load(directory, { codebook: smallest, window: 32, sinks: 4 })
const prompt = '## Installation\n\nTo install the package, run:\n\n'
process.stdout.write(prompt)
for await (const text of generate(writer, { directory, prompt, tokens: 320, temperature: 0.7, seed: 5 })) process.stdout.write(text)
console.log('\n')
writer.dispose()

function readmes(modules) {
  const packages = readdirSync(modules).flatMap((name) => name.startsWith('@') ? readdirSync(path.join(modules, name)).map((inner) => `${name}/${inner}`) : [name])
  return packages.sort().flatMap((name) => {
    try {
      const text = readFileSync(path.join(modules, name, 'README.md'), 'utf8')
      return text.length >= 1024 ? [text] : []
    } catch {
      return []
    }
  })
}

// Equal shares of every text, so that no single package fills the sample.
function excerpts(texts, characters) {
  const share = Math.ceil(characters / texts.length)
  return texts.map((text) => text.slice(0, share)).join('\n').slice(0, characters)
}

async function decodeRate(model) {
  const sequence = model.sequence()
  const tokens = [...Buffer.from(evaluation.slice(0, 448), 'latin1')]
  await model.run([{ sequence, tokens: tokens.slice(0, 384) }], { logits: 'last' })
  const started = performance.now()
  for (const token of tokens.slice(384)) await model.run([{ sequence, tokens: [token] }], { logits: 'last' })
  const rate = 64 / ((performance.now() - started) / 1000)
  sequence.dispose()
  return rate
}

async function withBar(title, work) {
  const bar = new SingleBar({ format: `  ${title.padEnd(24)} {bar} {percentage} % | {eta_formatted} left`, barCompleteChar: '█', barIncompleteChar: '░', barsize: 30, hideCursor: true, noTTYOutput: true, notTTYSchedule: 5000 })
  bar.start(1, 0)
  try {
    return await work((done, total) => { bar.setTotal(total); bar.update(done) })
  } finally {
    bar.stop()
  }
}

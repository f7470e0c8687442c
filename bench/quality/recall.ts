/**
 * `npm run bench:recall`: what a model gets out of something said long ago, in full precision and from codes of each width. By the
 * product's own path: packed codes, every new token reading as one-by-one decoding would.
 */
import { readFileSync, writeFileSync } from 'node:fs'
import path from 'node:path'
import { Command, Option } from 'commander'
import { captureActivations, learnCodebook } from '../../lib/calibrate'
import type { Codebook } from '../../lib/codebook'
import { codecName, integer } from '../../lib/cli/options'
import { crossEntropy } from '../../lib/evaluate'
import { DecoderModel } from '../../lib/onnx/model'
import { loadTokenizer } from '../../lib/tokenizer'
import { machine } from '../report'
import type { Kept } from './attention'
import { makeProbes, type Probe, type ProbeKind, probeKinds } from './probes'
import { replaceBlock } from './results'

/** Logits of all tokens of a fresh sequence: float32 [tokens][vocabulary]. */
export type LogitsOf = (tokens: readonly number[]) => Promise<Float32Array>
export type Encode = (text: string) => number[]

export interface Recall {
  kind: ProbeKind
  distance: number
  /** Share of the answers' tokens that are the likeliest one; of answers all of whose tokens are. */
  tokens: number
  answers: number
  /** Share of tokens, when another thing had been said. */
  controlTokens: number
  /** Nats a token that the answer is likelier for having been said: mean, and its standard error over the probes. */
  gain: number
  error: number
  /** The gain of each probe. */
  gains: number[]
}

/** Of probes of one kind and distance. */
export async function measureRecall(logitsOf: LogitsOf, encode: Encode, probes: readonly Probe[]): Promise<Omit<Recall, 'kind' | 'distance'>> {
  const gains: number[] = []
  const right = { tokens: 0, answers: 0, control: 0, all: 0 }
  for (const { text, control, answer } of probes) {
    const said = await readAnswer(logitsOf, encode, text, answer)
    const unsaid = await readAnswer(logitsOf, encode, control, answer)
    gains.push(unsaid.loss - said.loss)
    right.tokens += said.right
    right.control += unsaid.right
    right.all += said.count
    if (said.right === said.count) right.answers += 1
  }
  const gain = gains.reduce((sum, value) => sum + value, 0) / gains.length
  const variance = gains.reduce((sum, value) => sum + (value - gain) ** 2, 0) / Math.max(1, gains.length - 1)
  return {
    gain, error: Math.sqrt(variance / gains.length), gains,
    tokens: right.tokens / right.all, answers: right.answers / probes.length, controlTokens: right.control / right.all,
  }
}

/** Mean loss of the answer's tokens, and how many of them are the likeliest. */
async function readAnswer(logitsOf: LogitsOf, encode: Encode, text: string, answer: number) {
  const tokens = encode(text)
  const first = encode(text.slice(0, -answer)).length
  const logits = await logitsOf(tokens)
  const vocabulary = logits.length / tokens.length
  let loss = 0
  let right = 0
  for (let t = first; t < tokens.length; t++) {
    const row = logits.subarray((t - 1) * vocabulary, t * vocabulary)
    loss += crossEntropy(row, tokens[t]!)
    if (row.indexOf(row.reduce((most, logit) => Math.max(most, logit))) === tokens[t]) right += 1
  }
  const count = tokens.length - first
  return { loss: loss / count, right, count }
}

const root = path.join(__dirname, '..', '..')
const shared = path.join(root, '..', 'shared', 'models', 'tiny-llama-bytes')
const today = new Date().toISOString().slice(0, 10)

const codecs = ['cq-2c8b', 'cq-4c8b', 'cq-8c12b', 'cq-8c10b', 'cq-8c8b', 'cq-16c12b']

interface Flags {
  model: string
  calibration: string
  codec: string[]
  distances: number[]
  probes: number
  threads: number
  out: string
  docs?: string
}

interface Measured extends Kept { name: string; recalls: Recall[] }

export function command(): Command {
  const list = (text: string) => text.split(',')
  return new Command('bench:recall')
    .description('what a model gets out of something said long ago, from codes of each width and in full precision')
    .addOption(new Option('--model <directory>').default(path.join(root, 'models', 'tiny-llama-bytes')))
    .addOption(new Option('--calibration <file>', 'text to learn from').default(path.join(shared, 'calibration.txt')))
    .addOption(new Option('--codec <names>').default(codecs).argParser((names) => list(names).map(codecName)))
    .addOption(new Option('--distances <counts>', 'characters between').default([16, 64, 128, 256, 384]).argParser((counts) => list(counts).map(integer(0))))
    .addOption(new Option('--probes <count>', 'of each kind and distance').default(48).argParser(integer(2)))
    .addOption(new Option('--threads <count>').default(1).argParser(integer(1, 256)))
    .addOption(new Option('--out <file>').default(path.join(root, 'bench', 'results', `${today}-recall.json`)))
    .addOption(new Option('--docs <file>', 'document whose table is to be replaced'))
    .action(benchRecall)
}

async function benchRecall(flags: Flags): Promise<void> {
  const { model: directory, threads } = flags
  const tokenizer = await loadTokenizer(directory)
  const encode: Encode = (text) => tokenizer.encode(text)
  const start = process.cpuUsage()
  const full = await DecoderModel.load(directory, { threads })
  const measured: Measured[] = [{ name: 'full precision', sinks: 0, window: Infinity, recalls: await recallOf(full, encode, flags, probeKinds) }]
  print(measured[0]!)
  using captured = await captureActivations(full, { text: encode(readFileSync(flags.calibration, 'utf8')), weights: 'attention', heldOut: 0, threads })
  for (const codec of flags.codec) {
    using codebook = await learnCodebook(captured, { codec, iterations: 30, threads })
    for (const kept of [{ sinks: 0, window: 0 }, { sinks: 4, window: 32 }]) {
      measured.push({ name: codec, ...kept, recalls: await coded(directory, codebook, kept, encode, flags) })
      print(measured.at(-1)!)
    }
  }
  full.dispose()
  const round = (_: string, value: unknown) => typeof value === 'number' && Number.isFinite(value) ? Number(value.toPrecision(6)) : value
  writeFileSync(flags.out, `${JSON.stringify({ machine: machine('cpu'), probes: flags.probes, measured }, round, 1)}\n`)
  const { user, system } = process.cpuUsage(start)
  console.log(`${flags.out}: ${((user + system) / 1e6).toFixed(0)} s of CPU time`)
  const markdown = toMarkdown(measured)
  console.log(markdown)
  if (flags.docs !== undefined) replaceBlock(flags.docs, 'recall tables', markdown)
}

async function coded(directory: string, codebook: Codebook, kept: Kept, encode: Encode, flags: Flags): Promise<Recall[]> {
  const model = await DecoderModel.load(directory, { codebook, ...kept, threads: flags.threads })
  try {
    return await recallOf(model, encode, flags, ['word'])
  } finally {
    model.dispose()
  }
}

async function recallOf(model: DecoderModel, encode: Encode, { distances, probes }: Flags, kinds: readonly ProbeKind[]): Promise<Recall[]> {
  using sequence = model.sequence()
  const logitsOf: LogitsOf = async (tokens) => {
    sequence.reset()
    return (await model.run([{ sequence, tokens }], { prefill: 'coded' })).logits
  }
  const recalls: Recall[] = []
  for (const kind of kinds) {
    for (const distance of distances) {
      recalls.push({ kind, distance, ...await measureRecall(logitsOf, encode, makeProbes(kind, { distance, count: probes })) })
    }
  }
  return recalls
}

function print({ name, window, recalls }: Measured): void {
  for (const { kind, distance, tokens, answers, controlTokens, gain, error } of recalls) {
    console.log(`${name.padEnd(15)} window ${String(window).padStart(8)}  ${kind.padEnd(8)} at ${String(distance).padStart(4)}: gain ${gain.toFixed(4)} +- ${error.toFixed(4)}  `
      + `tokens ${percent(tokens)} (unsaid ${percent(controlTokens)})  answers ${percent(answers)}`)
  }
}

const percent = (share: number): string => `${(100 * share).toFixed(1)} %`

/** What full precision recalls; then the gain of words at each width. */
export function toMarkdown(measured: readonly Measured[]): string {
  const [full, ...codedOnes] = measured
  if (!full) return ''
  const ofWords = (recalls: readonly Recall[]) => recalls.filter(({ kind }) => kind === 'word')
  const distances = ofWords(full.recalls).map(({ distance }) => distance)
  const header = (first: string[], columns: string[]) =>
    [`| ${[...first, ...columns].join(' | ')} |`, `|${first.map(() => '---|').join('')}${columns.map(() => '---:|').join('')}`]
  return [
    'Full precision:', '',
    ...header(['asked', 'distance'], ['answers right', 'bytes right', 'when unsaid', 'gain, nats a byte']),
    ...full.recalls.map(({ kind, distance, answers, tokens, controlTokens, gain, error }) =>
      `| ${kind} | ${[distance, percent(answers), percent(tokens), percent(controlTokens), `${gain.toFixed(3)} ± ${error.toFixed(3)}`].join(' | ')} |`),
    '', 'Gain of a word, nats a byte, and how far it is from that of full precision on the same texts:', '',
    ...header(['cache', 'kept'], distances.map(String)),
    `| full precision | all | ${ofWords(full.recalls).map(({ gain }) => gain.toFixed(3)).join(' | ')} |`,
    ...codedOnes.map(({ name, sinks, window, recalls }) => `| ${name} | ${window > 0 ? `${sinks} + ${window}` : 'none'} | ${recalls.map((recall, i) => {
      const { mean, error } = difference(recall.gains, ofWords(full.recalls)[i]!.gains)
      return `${recall.gain.toFixed(3)} (${mean < 0 ? '−' : '+'}${Math.abs(mean).toFixed(3)} ± ${error.toFixed(3)})`
    }).join(' | ')} |`),
  ].join('\n')
}

function difference(a: readonly number[], b: readonly number[]): { mean: number; error: number } {
  const all = a.map((value, i) => value - b[i]!)
  const mean = all.reduce((sum, value) => sum + value, 0) / all.length
  return { mean, error: Math.sqrt(all.reduce((sum, value) => sum + (value - mean) ** 2, 0) / Math.max(1, all.length - 1) / all.length) }
}

if (require.main === module) void command().parseAsync()

/** `npm run bench:quality`: couplet and its rivals on the same text, every figure by the same path. */
import { existsSync, readFileSync } from 'node:fs'
import path from 'node:path'
import { Command, Option } from 'commander'
import { tokenIds } from '../../lib/calibrate/text'
import { chunks } from '../../lib/chunks'
import { integer } from '../../lib/cli/options'
import { crossEntropy } from '../../lib/evaluate'
import { textHash } from '../../lib/inspect/quality'
import { fingerprintFiles } from '../../lib/onnx/fingerprint'
import { type Kept, TwoVersionAttention } from './attention'
import { Calibration } from './calibration'
import { evaluateMethod, fullPrecision } from './evaluate'
import { LayeredModel } from './layers'
import { methods, widths } from './methods'
import { codebookFile } from './methods/codebook'
import type { Method } from './methods/method'
import { earlierRows, keyOf, otherRows, replaceBlock, type ResultRow, saveResults, type Subject, toMarkdown } from './results'

const root = path.join(__dirname, '..', '..')
const results = path.join(root, 'bench', 'results')
const shared = path.join(root, '..', 'shared', 'models', 'tiny-llama-bytes')

const today = new Date().toISOString().slice(0, 10)
const splitNames = (names: string): string[] => names.split(',')

interface Flags {
  model: string
  text: string
  calibration: string
  tokens: number
  length: number
  only: string[]
  codebooks: string[]
  threads: number
  out: string
  docs?: string
  quick?: boolean
  fresh?: boolean
}

const keptTokens: readonly Kept[] = [{ sinks: 0, window: 0 }, { sinks: 4, window: 32 }]

/** One of each kind, cheap to learn: to see that everything runs. */
const quickMethods = [
  'int4-mixed', 'nf2-group', 'kvquant-2b-1%', 'kivi-2b', 'kitty', 'vidkv-1.5/1.58-g128', 'calibquant-1b', 'turboquant-mse-2b', 'cq-8c8b:attention',
]

export function command(): Command {
  return new Command('bench:quality')
    .description('perplexity, divergence from full precision and agreement with it, of couplet and its rivals')
    .addOption(new Option('--model <directory>').default(path.join(root, 'models', 'tiny-llama-bytes')))
    .addOption(new Option('--text <file>', 'text to predict').default(path.join(shared, 'evaluation.txt')))
    .addOption(new Option('--calibration <file>', 'text to learn from').default(path.join(shared, 'calibration.txt')))
    .addOption(new Option('--tokens <count>', 'tokens of the text to run').default(8192).argParser(integer(2)))
    .addOption(new Option('--length <tokens>', 'tokens of a chunk, each a sequence of its own').default(512).argParser(integer(2)))
    .addOption(new Option('--only <names>', 'methods whose names contain one of these, separated by commas').default([]).argParser(splitNames))
    .addOption(new Option('--codebooks <files>', 'codebooks of couplet calibrate or tune, as further methods').default([]).argParser(splitNames))
    .addOption(new Option('--threads <count>').default(1).argParser(integer(1, 256)))
    .addOption(new Option('--out <file>', 'figures; those it has already are not measured again').default(path.join(results, `${today}-quality.json`)))
    .addOption(new Option('--docs <file>', 'document whose tables are to be replaced'))
    .option('--quick', 'nine methods on 1024 tokens')
    .option('--fresh', 'measure everything again')
    .action(async (flags: Flags) => { await benchQuality(flags) })
}

async function benchQuality(flags: Flags): Promise<void> {
  const { model: directory, length, threads } = flags
  const [calibrationTokens, allTokens] = [await read(flags.calibration, directory), await read(flags.text, directory)]
  const tokens = allTokens.slice(0, flags.quick ? Math.min(flags.tokens, 1024) : flags.tokens)
  const model = await LayeredModel.load(directory, threads)
  const attention = new TwoVersionAttention(threads)
  const evaluation = { model, attention, chunks: [...chunks(tokens, length, 2)] }
  const full = await fullPrecision(evaluation)
  const subject: Subject = {
    model: await fingerprintFiles([path.join(directory, 'onnx', 'model.onnx')]),
    calibration: textHash(calibrationTokens),
    text: textHash(tokens),
    calibrationTokens: calibrationTokens.length,
    tokens: evaluation.chunks.reduce((sum, chunk) => sum + chunk.length - 1, 0),
    length,
    perplexity: perplexityOf(full, evaluation.chunks),
  }
  console.log(`full precision: perplexity ${subject.perplexity.toFixed(4)} on ${subject.tokens} tokens`)

  const known = flags.fresh ? new Map<string, ResultRow>() : earlierRows(results, flags.out)
  const isNamed = (name: string) => flags.only.length === 0 || flags.only.some((part) => name.includes(part))
  const isWanted = (name: string) => (!flags.quick || quickMethods.includes(name)) && isNamed(name)
  const wanted: readonly (Method & { identity?: string })[] = [...methods.filter(({ name }) => isWanted(name)), ...flags.codebooks.map(codebookFile)]
  const rows = otherRows(flags.out, subject, wanted.map(({ name }) => name))
  let calibration: Calibration | undefined
  const start = process.cpuUsage()
  for (const method of wanted) {
    const missing = keptTokens.some((kept) => !known.has(keyOf(method, kept, subject)))
    if (missing) calibration ??= await Calibration.of(directory, calibrationTokens, { model, attention, length, threads })
    const quantizer = missing ? await method.fit(calibration!) : undefined
    for (const kept of keptTokens) {
      const key = keyOf(method, kept, subject)
      const row = known.get(key) ?? {
        method: method.name, width: method.width, extended: method.extended ?? false, ...kept, key,
        ...await evaluateMethod(evaluation, full, quantizer!, { ...kept, rotated: method.rotated }),
      }
      rows.push(row)
      const { sinks, window, bits, perplexity, divergence, agreement } = row
      console.log(`${method.name.padEnd(24)} sinks ${sinks} window ${String(window).padStart(2)}  ${bits.toFixed(3)} bits  perplexity ${perplexity.toFixed(4)}  `
        + `KL ${divergence.toFixed(4)}  top-1 ${(100 * agreement).toFixed(1)} %${known.has(key) ? '  (measured before)' : ''}`)
    }
    saveResults(flags.out, subject, rows)
  }
  const { user, system } = process.cpuUsage(start)
  console.log(`${flags.out}: ${rows.length} rows, ${((user + system) / 1e6).toFixed(0)} s of CPU time`)
  const markdown = toMarkdown(subject, rows, widths)
  console.log(`\n${markdown}`)
  if (flags.docs !== undefined) replaceBlock(flags.docs, 'quality tables', markdown)
  calibration?.dispose()
  await model.release()
  await attention.release()
}

async function read(file: string, directory: string): Promise<number[]> {
  if (!existsSync(file)) throw new Error(`There is no ${file}; --text and --calibration name the texts to use`)
  return Array.from(await tokenIds(readFileSync(file, 'utf8'), directory))
}

function perplexityOf(logits: readonly Float32Array[], sequences: readonly (readonly number[])[]): number {
  let loss = 0
  let counted = 0
  sequences.forEach((tokens, index) => {
    const vocabulary = logits[index]!.length / tokens.length
    for (let t = 1; t < tokens.length; t++) loss += crossEntropy(logits[index]!.subarray((t - 1) * vocabulary, t * vocabulary), tokens[t]!)
    counted += tokens.length - 1
  })
  return Math.exp(loss / counted)
}

if (require.main === module) void command().parseAsync()

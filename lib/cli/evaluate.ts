import { readFile } from 'node:fs/promises'
import { basename, resolve } from 'node:path'
import { Command, Option } from 'commander'
import { tokenIds } from '../calibrate/text'
import { Codebook } from '../codebook'
import { meanBits } from '../codec'
import type { DeviceName } from '../device'
import { evaluate, type Evaluation } from '../evaluate'
import { type QualityPoint, type QualitySubject, readQualityResults, textHash } from '../inspect/quality'
import { qualityPage } from '../inspect/quality-page'
import { openDecoder } from '../onnx/decoder'
import { deviceIndexOption, deviceOption, integer, lengthOption, modelOption, sinksOption, threadsOption, windowOption } from './options'
import { checkPage, writePage } from './output'
import { Progress } from './progress'

interface Flags {
  model: string
  text: string
  length: number
  codebooks?: string[]
  window: number
  sinks: number
  threads?: number
  device: DeviceName
  deviceIndex: number
  json?: boolean
  report?: string
  results?: string[]
  sharedBy?: number
}

/** One of the evaluations of a call. */
interface Measured extends Evaluation {
  /** Of the codebook's file, or `full precision`. */
  name: string
  /** Of a code, by channel; undefined in full precision. */
  codeBits?: number
  /** bitsPerChannel and the codebook's share of the tokens of --shared-by. */
  bitsWithCodebook?: number
}

export function evaluateCommand(signal: AbortSignal): Command {
  return new Command('eval')
    .description('perplexity of a model on a text, with its KV cache coded or, without --codebooks, in full precision')
    .addOption(modelOption())
    .requiredOption('--text <file>', 'text to predict, UTF-8')
    .addOption(lengthOption())
    .option('--codebooks <files...>', 'codebook written by calibrate, or several')
    .addOption(windowOption())
    .addOption(sinksOption())
    .addOption(threadsOption())
    .addOption(deviceOption())
    .addOption(deviceIndexOption())
    .option('--report <file>', 'draw perplexity by bits on this page (HTML), beside that in full precision')
    .option('--results <files...>', 'with --report: figures of other methods on this text, as npm run bench:quality writes them')
    .addOption(new Option('--shared-by <tokens>', 'count the codebook as well, shared by so many tokens of all sequences').argParser(integer(1)))
    .option('--json', 'print one JSON object, or an array of them for several codebooks or with --report')
    .action(async (flags: Flags, command: Command) => {
      const { report, results = [], codebooks = [] } = flags
      if (results.length > 0 && report === undefined) command.error('error: --results are for --report')
      if (report !== undefined && codebooks.length + results.length === 0) command.error('error: --report needs --codebooks or --results')
      const progress = new Progress()
      try {
        const tokens = await tokenIds(await readFile(flags.text, 'utf8'), flags.model)
        // Said before the work, not after.
        if (report !== undefined) await checkPage(report)
        const given = results.length > 0 ? await readAll(results, await subjectOf(flags, tokens)) : []
        const all: Measured[] = []
        for (const file of [...(report !== undefined || codebooks.length === 0 ? [undefined] : []), ...codebooks]) {
          all.push(await measure(file, tokens, flags, { signal, progress }))
        }
        progress.stop()
        if (flags.json) console.log(JSON.stringify(all.length > 1 ? all : bare(all[0]!)))
        else for (const one of all) print(one, flags, all.length > 1)
        if (report !== undefined) await writePage(report, await pageOf(all, given, flags))
      } finally {
        progress.stop()
      }
    })
}

interface Call { signal: AbortSignal; progress: Progress }

/** @param file of a codebook; undefined: in full precision */
async function measure(file: string | undefined, tokens: ArrayLike<number>, flags: Flags, { signal, progress }: Call): Promise<Measured> {
  const { model, length, window, sinks, threads, device, deviceIndex } = flags
  const name = file === undefined ? 'full precision' : basename(file).replace(/\.safetensors$/, '')
  const codebook = file === undefined ? undefined : await Codebook.load(file, { signal })
  try {
    const evaluation = await evaluate({
      model, length, window, sinks, device, deviceIndex, signal, text: tokens,
      ...(threads !== undefined && { threads }),
      ...(codebook && { codebook }),
      onProgress: (done, total) => { progress.update(`predicting, ${name}`, done, total) },
    })
    const shared = codebook && flags.sharedBy !== undefined && { bitsWithCodebook: bitsWithCodebook(evaluation, codebook, flags.sharedBy) }
    return { name, ...evaluation, ...(codebook && { codeBits: meanBits(codebook.codecs) }), ...shared }
  } finally {
    codebook?.dispose()
  }
}

function bitsWithCodebook({ bitsPerChannel, codebookBytes }: Evaluation, { layers, kvHeads, headDim }: Codebook, tokens: number): number {
  return bitsPerChannel + codebookBytes * 8 / (tokens * layers * 2 * kvHeads * headDim)
}

function bare({ name: _name, codeBits: _codeBits, ...evaluation }: Measured): Evaluation {
  return evaluation
}

function print(measured: Measured, { length, sharedBy }: Flags, isNamed: boolean): void {
  const { name, perplexity, tokens, bitsPerToken, codeBits, bitsPerChannel, bitsWithCodebook, bytesPerToken, codebookBytes } = measured
  if (isNamed) console.log(`${name}:`)
  console.log(`perplexity             ${perplexity.toFixed(4)}  (${tokens} tokens)`)
  console.log(`bits per token         ${bitsPerToken.toFixed(4)}`)
  if (codeBits !== undefined) console.log(`bits of codes          ${codeBits.toFixed(3)}`)
  console.log(`bits per channel       ${bitsPerChannel.toFixed(3)}  (codes, padding, sinks and window of a chunk of ${length})`)
  if (bitsWithCodebook !== undefined) console.log(`bits with codebook     ${bitsWithCodebook.toFixed(3)}  (shared by ${sharedBy} tokens)`)
  console.log(`cache bytes per token  ${bytesPerToken.toFixed(0)}`)
  console.log(`codebook in memory     ${codebookBytes} bytes, shared by all sequences${isNamed ? '\n' : ''}`)
}

async function subjectOf({ model, length }: Flags, tokens: ArrayLike<number>): Promise<QualitySubject> {
  const { fingerprint } = await openDecoder(model)
  return { model: await fingerprint(), text: textHash(tokens), length }
}

async function readAll(files: readonly string[], subject: QualitySubject): Promise<QualityPoint[]> {
  const points: QualityPoint[] = []
  for (const file of files) points.push(...await readQualityResults(file, subject))
  return points
}

/** @param all the first one in full precision */
function pageOf(all: readonly Measured[], given: readonly QualityPoint[], { model, length, sinks, window }: Flags): Promise<string> {
  const { perplexity, tokens } = all[0]!
  const measured = all.slice(1).map((one): QualityPoint => (
    { name: one.name, bits: one.codeBits!, perplexity: one.perplexity, sinks, window, isSubject: true }
  ))
  return qualityPage({ name: basename(resolve(model)), perplexity, tokens, length, points: [...given, ...measured] })
}

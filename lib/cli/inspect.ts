import { basename, resolve } from 'node:path'
import { Command, Option } from 'commander'
import { inspect } from '../inspect/inspect'
import { inspectionPage } from '../inspect/inspection-page'
import { integer, lengthOption, modelOption, seedOption, sinksOption, threadsOption, windowOption } from './options'
import { checkPage, writePage } from './output'
import { Progress } from './progress'

interface Flags {
  model: string
  text: string
  codebooks?: string
  out: string
  length: number
  points?: number
  window: number
  sinks: number
  seed: number
  threads?: number
  json?: boolean
}

const phases = { capture: 'running the text', count: 'counting', attention: 'looking at attention' } as const

export function inspectCommand(signal: AbortSignal): Command {
  return new Command('inspect')
    .description('draw what channels share, what codes lose and where attention falls')
    .addOption(modelOption())
    .requiredOption('--text <file>', 'text to run, UTF-8')
    .requiredOption('--out <file>', 'page to write (HTML)')
    .option('--codebooks <file>', 'codebook written by calibrate: adds errors and code usage')
    .addOption(lengthOption())
    .addOption(new Option('--points <count>', 'tokens kept at most, a uniform sample (default: 16384, or what 1 GiB holds)').argParser(integer(2)))
    .addOption(windowOption())
    .addOption(sinksOption())
    .addOption(seedOption())
    .addOption(threadsOption())
    .option('--json', 'print the figures as one JSON object')
    .action(async ({ text: file, out, codebooks, json, ...flags }: Flags) => {
      const progress = new Progress()
      try {
        await checkPage(out)
        const inspection = await inspect({
          ...flags, text: { file }, codebook: codebooks, signal,
          onProgress: ({ phase, done, total }) => { progress.update(phases[phase], done, total) },
        })
        progress.stop()
        await writePage(out, await inspectionPage(inspection, { name: basename(resolve(flags.model)) }))
        console.log(json ? JSON.stringify(inspection) : `${out}: ${inspection.shape.layers} layers, ${inspection.tokens} tokens, ${inspection.sampled} in the sample`)
      } finally {
        progress.stop()
      }
    })
}

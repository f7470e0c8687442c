import { readFile } from 'node:fs/promises'
import { Command } from 'commander'
import type { DeviceName } from '../device'
import { evaluate } from '../evaluate'
import { deviceIndexOption, deviceOption, lengthOption, modelOption, sinksOption, threadsOption, windowOption } from './options'
import { Progress } from './progress'

interface Flags {
  model: string
  text: string
  length: number
  codebooks?: string
  window: number
  sinks: number
  threads?: number
  device: DeviceName
  deviceIndex: number
  json?: boolean
}

export function evaluateCommand(signal: AbortSignal): Command {
  return new Command('eval')
    .description('perplexity of a model on a text, with its KV cache coded or, without --codebooks, in full precision')
    .addOption(modelOption())
    .requiredOption('--text <file>', 'text to predict, UTF-8')
    .addOption(lengthOption())
    .option('--codebooks <file>', 'codebook written by calibrate')
    .addOption(windowOption())
    .addOption(sinksOption())
    .addOption(threadsOption())
    .addOption(deviceOption())
    .addOption(deviceIndexOption())
    .option('--json', 'print one JSON object')
    .action(async (flags: Flags) => {
      const progress = new Progress()
      try {
        const text = await readFile(flags.text, 'utf8')
        const { codebooks, ...rest } = flags
        const result = await evaluate({
          ...rest,
          text,
          signal,
          ...(codebooks !== undefined && { codebook: codebooks }),
          onProgress: (done, total) => { progress.update('predicting', done, total) },
        })
        progress.stop()
        if (flags.json) {
          console.log(JSON.stringify(result))
          return
        }
        console.log(`perplexity             ${result.perplexity.toFixed(4)}  (${result.tokens} tokens)`)
        console.log(`bits per token         ${result.bitsPerToken.toFixed(4)}`)
        console.log(`bits per channel       ${result.bitsPerChannel.toFixed(3)}  (codes, padding, sinks and window of a chunk of ${flags.length})`)
        console.log(`cache bytes per token  ${result.bytesPerToken.toFixed(0)}`)
        console.log(`codebook in memory     ${result.codebookBytes} bytes, shared by all sequences`)
      } finally {
        progress.stop()
      }
    })
}

import { Command, Option } from 'commander'
import { tune } from '../tune'
import { removeTuneCheckpoint } from '../tune-checkpoint'
import { integer, lengthOption, modelOption, positiveNumber, seedOption, sinksOption, textInputs, textOption, threadsOption, windowOption } from './options'
import { checkOutput } from './output'
import { Progress } from './progress'

interface Flags {
  model: string
  codebooks: string
  text: string[]
  length: number
  batch: number
  together?: number
  steps: number
  rate: number
  window: number
  sinks: number
  patience: number
  levels: boolean
  checkpoint?: string
  out: string
  seed: number
  threads?: number
}

export function tuneCommand(signal: AbortSignal): Command {
  return new Command('tune')
    .description("improve a codebook by the model's own outputs; goes on where it was interrupted")
    .addOption(modelOption())
    .requiredOption('--codebooks <file>', 'codebook to begin with')
    .addOption(textOption('--text <file>', 'text to learn from, UTF-8, the longer the better; several are welcome; - is standard input').makeOptionMandatory())
    .addOption(lengthOption())
    .addOption(new Option('--batch <chunks>', 'chunks of a step').default(4).argParser(integer(1)))
    .addOption(new Option('--together <chunks>', 'chunks of a step that are run at once (default: all); fewer take less memory').argParser(integer(1)))
    .addOption(new Option('--steps <count>', 'steps at most').default(280).argParser(integer(1)))
    .addOption(new Option('--rate <number>', "first step of a centroid, in units of its group's spread").default(0.02).argParser(positiveNumber))
    .addOption(windowOption())
    .addOption(sinksOption())
    .addOption(new Option('--patience <count>', 'ends after so many judgements, 20 steps apart, without a better one').default(7).argParser(integer(1)))
    .option('--no-levels', 'do not round values of cq-8c8b to 128 levels a channel, which GPUs read faster')
    .option('--checkpoint <file>', 'keeps the state, and is removed at the end (default: <out>.checkpoint)')
    .requiredOption('--out <file>', 'codebook to write (safetensors)')
    .addOption(seedOption())
    .addOption(threadsOption())
    .action(async (flags: Flags) => {
      const progress = new Progress()
      const { codebooks, out, checkpoint = `${out}.checkpoint`, ...rest } = flags
      try {
        await checkOutput(out)
        const { codebook, steps, bestStep, before, after } = await tune({
          ...rest,
          text: textInputs(flags.text),
          codebook: codebooks,
          checkpoint,
          signal,
          onProgress: ({ done, total, best }) => { progress.update('tuning', done, total, `KL ${best.toFixed(5)}`) },
        })
        progress.stop()
        await codebook.save(out)
        await removeTuneCheckpoint(checkpoint)
        console.log(`${out}: KL divergence of held-out text ${before.toFixed(5)} before, ${after.toFixed(5)} after ${bestStep} of ${steps} steps`)
        codebook.dispose()
      } finally {
        progress.stop()
      }
    })
}

import { access, constants, readFile } from 'node:fs/promises'
import { dirname, resolve } from 'node:path'
import { Command, Option } from 'commander'
import { calibrate, type WeightKind } from '../calibrate'
import type { DeviceName } from '../device'
import { codecName, deviceIndexOption, deviceOption, integer, lengthOption, modelOption, seedOption, threadsOption } from './options'
import { Progress } from './progress'

interface Flags {
  model: string
  text: string
  length: number
  codec: string
  weights: WeightKind
  gradients?: string
  points: number
  iterations: number
  out: string
  seed: number
  threads?: number
  device: DeviceName
  deviceIndex: number
}

export function calibrateCommand(signal: AbortSignal): Command {
  return new Command('calibrate')
    .description('learn a codebook for a model from a text')
    .addOption(modelOption())
    .requiredOption('--text <file>', 'text to learn from, UTF-8')
    .addOption(lengthOption())
    .addOption(new Option('--codec <name>', 'cq-<c>c<b>b: c channels share a code of b bits').default('cq-8c8b').argParser(codecName))
    .addOption(new Option('--weights <kind>', 'importance of a token').choices(['uniform', 'attention', 'fisher']).default('attention'))
    .option('--gradients <file>', 'for fisher weights: gradients of this text, computed elsewhere (docs/gradients.md)')
    .addOption(new Option('--points <count>', 'tokens kept for learning, a uniform sample').default(32768).argParser(integer(1)))
    .addOption(new Option('--iterations <count>', 'k-means iterations at most').default(100).argParser(integer(1)))
    .requiredOption('--out <file>', 'codebook to write (safetensors)')
    .addOption(seedOption())
    .addOption(threadsOption())
    .addOption(deviceOption())
    .addOption(deviceIndexOption())
    .action(async (flags: Flags) => {
      const progress = new Progress()
      try {
        const text = await readFile(flags.text, 'utf8')
        await access(dirname(resolve(flags.out)), constants.W_OK) // said before hours of learning, not after
        const { codebook } = await calibrate({
          ...flags,
          text,
          signal,
          onProgress: ({ phase, done, total }) => { progress.update(phase === 'capture' ? 'running the text' : 'learning centroids', done, total ?? 0) },
        })
        progress.stop()
        await codebook.save(flags.out)
        console.log(`${flags.out}: ${codebook.keyCodec?.name}, ${codebook.layers} layers, ${codebook.kvHeads} kv heads, headDim ${codebook.headDim}, learned from ${codebook.metadata.learned?.tokens ?? 0} tokens`)
        codebook.dispose()
      } finally {
        progress.stop()
      }
    })
}

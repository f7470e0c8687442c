import { Command, Option } from 'commander'
import { Codebook } from '../codebook'
import type { DeviceName } from '../device'
import { generate } from '../generate'
import { DecoderModel } from '../onnx/model'
import {
  deviceIndexOption, deviceOption, integer, modelOption, positiveNumber, seedOption, sinksOption, threadsOption, windowOption,
} from './options'

interface Flags {
  model: string
  prompt: string
  codebooks?: string
  tokens: number
  temperature: number
  seed: number
  window: number
  sinks: number
  threads?: number
  device: DeviceName
  deviceIndex: number
}

export function generateCommand(signal: AbortSignal): Command {
  return new Command('generate')
    .description('write on from a prompt, streaming, with the KV cache coded or, without --codebooks, in full precision')
    .addOption(modelOption())
    .requiredOption('--prompt <text>', 'text to write on from')
    .option('--codebooks <file>', 'codebook written by calibrate')
    .addOption(new Option('--tokens <count>', 'new tokens at most').default(256).argParser(integer(1)))
    .addOption(new Option('--temperature <number>', '0 takes the likeliest token').default(0).argParser(positiveNumber))
    .addOption(seedOption())
    .addOption(windowOption())
    .addOption(sinksOption())
    .addOption(threadsOption())
    .addOption(deviceOption())
    .addOption(deviceIndexOption())
    .action(async (flags: Flags) => {
      const { model: directory, codebooks, window, sinks, threads, device, deviceIndex, ...rest } = flags
      const codebook = codebooks === undefined ? undefined : await Codebook.load(codebooks)
      const model = await DecoderModel.load(directory, {
        ...(codebook && { codebook, window, sinks }),
        ...(threads !== undefined && { threads }),
        device,
        deviceIndex,
      })
      try {
        process.stdout.write(flags.prompt)
        for await (const text of generate(model, { directory, ...rest, signal })) process.stdout.write(text)
        process.stdout.write('\n')
      } finally {
        model.dispose()
        codebook?.dispose()
      }
    })
}

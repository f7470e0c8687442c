import { rmdir } from 'node:fs/promises'
import { Command, InvalidArgumentError, Option } from 'commander'
import type { CalibrationProgress, CalibrationReport, PredictedText, TransformStep, TriedRecipe, WeightKind } from '../calibrate'
import { calibrate } from '../calibrate'
import { removeCheckpoints } from '../calibrate/checkpoint'
import type { Codebook } from '../codebook'
import type { DeviceName } from '../device'
import { writeAtomically } from '../files'
import { transformSteps } from '../transform/learn'
import {
  codecName, deviceIndexOption, deviceOption, integer, lengthOption, modelOption, positiveNumber, seedOption, textInputs, textOption, threadsOption,
} from './options'
import { checkOutput } from './output'
import { Progress } from './progress'

interface Flags {
  model: string
  text: string[]
  evalText?: string[]
  length: number
  codec?: string
  bits?: number
  candidates?: string[]
  per?: 'head' | 'layer'
  measure?: 'divergence' | 'fisher'
  sinks?: number
  window?: number
  weights: WeightKind
  gradients?: string
  recipe: 'plain' | 'best'
  transforms?: TransformStep[]
  tuneSteps?: number
  levels: boolean
  points: number
  heldOut: number
  iterations: number
  checkpoint?: string
  report?: string
  out: string
  seed: number
  threads?: number
  device: DeviceName
  deviceIndex: number
}

const titles: Record<CalibrationProgress['phase'], string> = {
  capture: 'running the text', choose: 'trying codecs', learn: 'learning centroids', tune: 'tuning', predict: 'judging',
}

export function calibrateCommand(signal: AbortSignal): Command {
  return new Command('calibrate')
    .description('learn a codebook for a model from a text, and say what it will cost; goes on where it was interrupted')
    .addOption(modelOption())
    .addOption(textOption('--text <file>', 'text to learn from, UTF-8; more than once for several, - for standard input').makeOptionMandatory())
    .addOption(textOption('--eval-text <file>', 'text such as the codebook will meet: how far it is from the other, and what codes cost on it'))
    .addOption(lengthOption())
    .addOption(new Option('--codec <name>', 'cq-<c>c<b>b: c channels share a code of b bits (default: cq-8c8b)').argParser(codecName).conflicts('bits'))
    .addOption(new Option('--bits <number>', 'in place of --codec: of codes by channel; chooses by layer, side and kv head').argParser(positiveNumber))
    .addOption(new Option('--candidates <names>', 'with --bits: codecs to choose from').argParser((names: string) => names.split(',').map(codecName)))
    .addOption(new Option('--per <unit>', 'with --bits: whether kv heads of a layer may differ (default: head)').choices(['head', 'layer']))
    .addOption(new Option('--measure <kind>', 'with --bits: by runs of the model or fisher weights (default: divergence)').choices(['divergence', 'fisher']))
    .addOption(new Option('--sinks <tokens>', 'with --bits: as the codebook will be used (default: 4)').argParser(integer(0)))
    .addOption(new Option('--window <tokens>', 'with --bits: as the codebook will be used (default: 32)').argParser(integer(0)))
    .addOption(new Option('--weights <kind>', 'importance of a token').choices(['uniform', 'attention', 'fisher']).default('attention'))
    .addOption(new Option('--recipe <name>', 'best: tries weights and transforms, and keeps what predicts text held out best')
      .choices(['plain', 'best']).default('plain'))
    .addOption(new Option('--tune-steps <count>', 'with --recipe best: tuning; 0: none (default: each chunk 4 times, 280 at most)').argParser(integer(0)))
    .addOption(new Option('--transforms <names>', `steps beside the tables, by commas: ${transformSteps.join(', ')}`).argParser(steps))
    .option('--no-levels', 'do not round values of cq-8c8b to 128 levels a channel, which GPUs read faster')
    .option('--gradients <file>', 'for fisher weights: gradients of this text, computed elsewhere (docs/gradients.md)')
    .addOption(new Option('--points <count>', 'tokens kept for learning, a uniform sample').default(32768).argParser(integer(1)))
    .addOption(new Option('--held-out <share>', 'share of the text to judge by and not to learn from, 0 to 0.5').default(0.1).argParser(share))
    .addOption(new Option('--iterations <count>', 'k-means iterations at most').default(100).argParser(integer(1)))
    .option('--checkpoint <folder>', 'keeps the state, and is removed at the end (default: <out>.checkpoint)')
    .option('--report <file>', 'report to write as JSON')
    .requiredOption('--out <file>', 'codebook to write (safetensors)')
    .addOption(seedOption())
    .addOption(threadsOption())
    .addOption(deviceOption())
    .addOption(deviceIndexOption())
    .action(async (flags: Flags, command: Command) => {
      const progress = new Progress()
      const { text, evalText, out, report: reportFile, checkpoint = `${out}.checkpoint`, tuneSteps, ...others } = flags
      const { codec = 'cq-8c8b', bits, candidates, per, measure, sinks, window, ...rest } = others
      const choose = { candidates, per, measure, sinks, window }
      if (bits === undefined && Object.values(choose).some((given) => given !== undefined)) {
        command.error('error: --candidates, --per, --measure, --sinks and --window go with --bits')
      }
      if (text.includes('-') && evalText?.includes('-')) command.error('error: standard input can be read once only')
      if (tuneSteps !== undefined && flags.recipe !== 'best') command.error('error: --tune-steps goes with --recipe best')
      try {
        for (const file of [out, reportFile ?? out]) await checkOutput(file)
        const { codebook, report, tried, tuned } = await calibrate({
          ...rest,
          ...(bits === undefined ? { codec } : { bits, choose }),
          text: textInputs(text),
          ...(tuneSteps !== undefined && { tune: tuneSteps === 0 ? false : { steps: tuneSteps } }),
          ...(evalText && { evalText: textInputs(evalText) }),
          checkpoint,
          signal,
          onProgress: ({ phase, done, total }) => { progress.update(titles[phase], done, total) },
        })
        progress.stop()
        await codebook.save(out)
        if (reportFile !== undefined) await writeAtomically(reportFile, [new TextEncoder().encode(`${JSON.stringify({ ...report, tried, tuned }, null, 2)}\n`)])
        await removeCheckpoints(checkpoint)
        console.log(`${out}: ${codecNames(report)}, ${codebook.layers} layers, ${codebook.kvHeads} kv heads, headDim ${codebook.headDim}`)
        printChoice(codebook)
        if (codebook.transforms.length > 0) console.log(`transforms      ${codebook.transforms.join(', ')}`)
        if (tried) printTried(tried)
        if (tuned) console.log(`tuned           KL divergence ${tuned.before.toFixed(5)} -> ${tuned.after.toFixed(5)} on text held out, ${tuned.bestStep} of ${tuned.steps} steps`)
        print(report)
        codebook.dispose()
      } finally {
        progress.stop()
        await rmdir(checkpoint).catch(() => undefined) // where nothing was begun: a folder with a state in it stays
      }
    })
}

function printChoice({ codecs, metadata: { learned } }: Codebook): void {
  if (!learned?.chosen) return
  const { budget, bits, loss } = learned.chosen
  console.log(`bits            ${bits.toFixed(3)} of ${budget} by channel for codes; divergence expected ${loss.toPrecision(2)}`)
  codecs.forEach((parts, layer) => {
    const lines = parts.map(({ firstHead, heads, keyCodec, valueCodec }) => {
      const place = parts.length === 1 ? '' : heads === 1 ? `head ${firstHead} ` : `heads ${firstHead} to ${firstHead + heads - 1} `
      return `${place}keys ${keyCodec.name}, values ${valueCodec.name}`
    })
    console.log(`layer ${layer}${' '.repeat(Math.max(1, 10 - String(layer).length))}${lines.join('; ')}`)
  })
}

function steps(text: string): TransformStep[] {
  return text.split(',').map((name) => {
    const step = transformSteps.find((known) => known === name.trim())
    if (step === undefined) throw new InvalidArgumentError(`Expected names of ${transformSteps.join(', ')}.`)
    return step
  })
}

function printTried(tried: readonly TriedRecipe[]): void {
  const least = Math.min(...tried.map(({ codedLoss }) => codedLoss))
  for (const { weights, transforms, codedLoss, perplexity } of tried) {
    const name = [weights, ...transforms].join(' + ')
    console.log(`tried           ${name.padEnd(36)} perplexity ${Math.exp(codedLoss).toFixed(4)} with every token coded, ${perplexity.toFixed(4)} with window 32, sinks 4${codedLoss === least ? '  <- chosen' : ''}`)
  }
}

function share(text: string): number {
  const value = Number(text)
  if (text.trim() === '' || !(value >= 0 && value <= 0.5)) throw new InvalidArgumentError('Expected a number from 0 to 0.5.')
  return value
}

function print({ tokens, pointsPerCentroid, error, suffering, expected, evaluation, warnings }: CalibrationReport): void {
  const points = [...new Set([pointsPerCentroid.key, pointsPerCentroid.value].map((count) => count.toFixed(1)))].join(' and ')
  console.log(`learned from    ${tokens.learned} of ${tokens.run} tokens, ${points} a centroid; ${tokens.heldOut} others held out to judge by`)
  for (const side of ['key', 'value'] as const) {
    const { learned, heldOut } = error[side]
    console.log(`${side}s lose${side === 'key' ? '  ' : ''}     ${percent(learned)} of their variance${heldOut === undefined ? '' : `, ${percent(heldOut)} of that held out`}`)
  }
  if (expected) console.log(`expected        ${prediction(expected)} on text held out`)
  if (evaluation) {
    const distance = evaluation.distance === undefined ? '' : `, coded error ${evaluation.distance.toFixed(2)} times that of text held out`
    console.log(`evaluation text ${prediction(evaluation)}${distance}`)
  }
  for (const { layer, side, kvHead, error: lost, median } of suffering.slice(0, 8)) {
    console.log(`suffers         layer ${layer}, ${side}s${kvHead === undefined ? '' : ` of kv head ${kvHead}`}: ${percent(lost)}, median ${percent(median)}`)
  }
  if (suffering.length > 8) console.log(`                and ${suffering.length - 8} others (--report)`)
  for (const { message } of warnings) console.warn(`warning: ${message}`)
}

function prediction({ tokens, full, coded, added }: PredictedText): string {
  const change = coded.perplexity / full.perplexity - 1
  const error = added.standardError === undefined ? '' : ` ± ${(100 * added.standardError).toFixed(1)}`
  const signed = `${change < 0 ? '' : '+'}${(100 * change).toFixed(1)}${error} %`
  return `perplexity ${full.perplexity.toFixed(3)} -> ${coded.perplexity.toFixed(3)} (${signed}; window 32, sinks 4; ${tokens} tokens)`
}

function codecNames({ codec: { key, value } }: CalibrationReport): string {
  return key === value ? key : `${key} and ${value}`
}

function percent(share: number): string {
  return `${(100 * share).toFixed(1)} %`
}

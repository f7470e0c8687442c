// A calibration in a process of its own, which ends itself (SIGKILL: nothing is tidied up) at the place that argv names.
//
//   node --import tsx child.ts <options as JSON> <out> [phase done]
import { calibrate, type CalibrateOptions } from '../../lib/calibrate'

const [options, out, phase, place] = process.argv.slice(2) as [string, string, string?, string?]

async function main(): Promise<void> {
  const { codebook, report } = await calibrate({
    ...(JSON.parse(options) as CalibrateOptions),
    onProgress: ({ phase: now, done }) => {
      process.stdout.write(`${now} ${done}\n`)
      if (now === phase && done >= Number(place)) process.kill(process.pid, 'SIGKILL')
    },
  })
  await codebook.save(out)
  process.stdout.write(`report ${JSON.stringify(report)}\n`)
}

void main().catch((error: unknown) => {
  console.error(error)
  process.exitCode = 1
})

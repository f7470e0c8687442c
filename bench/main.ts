/**
 * `npm run bench -- [operation ...] [flags]`: microbenchmarks of couplet and, for attend on the CPU, of its peers in the same process.
 * `--device cuda` measures the same operations on a GPU, in wall time.
 */
import { spawnSync } from 'node:child_process'
import { writeFileSync } from 'node:fs'
import path from 'node:path'
import { Argument, Command, Option } from 'commander'
import { codec as parseCodec } from '../lib/codec'
import { codecName, deviceIndexOption, integer } from '../lib/cli/options'
import type { DeviceName } from '../lib/device'
import { addon } from '../lib/native/addon'
import { benchAttend, benchAttendOnDevice } from './attend'
import { benchCodes } from './codes'
import { benchCodesOnDevice, benchKmeansOnDevice } from './device'
import { benchKmeans } from './kmeans'
import { machine, print, type Table } from './report'

const operations = ['kmeans', 'encode', 'decode', 'attend'] as const

interface Flags {
  codec: string[]
  tokens: number
  queryHeads: number
  kvHeads: number
  headDim: number
  problems?: number
  points: number
  iterations: number
  threads: number
  peers: boolean
  device: DeviceName | 'sim'
  deviceIndex: number
  calls: number
  batch: number
  json?: string
}

const program = new Command('bench')
  .description('CPU time of the four operations; every result is checked against double precision before it is timed')
  .addArgument(new Argument('[operation...]', 'what to measure; default: all').choices(operations))
  .addOption(new Option('--codec <names>', 'codecs, separated by commas').default(['cq-8c8b']).argParser((names: string) => names.split(',').map(codecName)))
  .addOption(new Option('--tokens <count>').default(32768).argParser(integer(64)))
  .addOption(new Option('--query-heads <count>').default(32).argParser(integer(1)))
  .addOption(new Option('--kv-heads <count>').default(8).argParser(integer(1)))
  .addOption(new Option('--head-dim <channels>').default(128).argParser(integer(32, 256)))
  .addOption(new Option('--problems <count>', 'k-means problems; default 1, 256 on a GPU').argParser(integer(1)))
  .addOption(new Option('--points <count>', 'points of a k-means problem').default(16384).argParser(integer(1)))
  .addOption(new Option('--iterations <count>', 'of k-means').default(25).argParser(integer(1)))
  .addOption(new Option('--threads <count>').default(1).argParser(integer(1, 256)))
  .addOption(new Option('--device <name>', 'sim: the simulator of GPUs, for tests of this program').choices(['cpu', 'cuda', 'sim']).default('cpu'))
  .addOption(deviceIndexOption())
  .addOption(new Option('--calls <count>', 'calls enqueued at a time on a GPU').default(20).argParser(integer(1)))
  .addOption(new Option('--batch <count>', 'sequences of a decode step on a GPU').default(16).argParser(integer(1)))
  .option('--no-peers', 'couplet alone')
  .option('--json <file>', 'write all figures')
  .action(async (asked: (typeof operations)[number][], flags: Flags) => {
    const tables: Table[] = []
    const show = (table: Table) => {
      tables.push(table)
      print(table)
    }
    const { tokens, queryHeads, kvHeads, headDim, threads, deviceIndex } = flags
    const state = addon().backendState(flags.device)
    if (!state.available) throw new Error(`${flags.device} is not available: ${state.reason}`)
    const isGpu = flags.device !== 'cpu'
    const on = { device: flags.device as DeviceName, deviceIndex }
    for (const operation of asked.length ? asked : operations) {
      for (const codec of flags.codec) {
        const { groupChannels, centroids } = parseCodec(codec)
        if (operation === 'kmeans') {
          const { problems = isGpu ? 256 : 1, points, iterations } = flags
          const shape = { problems, points, centroids, channels: groupChannels, iterations, threads }
          show(isGpu ? benchKmeansOnDevice(shape, on) : await benchKmeans(shape))
        } else if (operation === 'attend') {
          const shape = { codec, tokens, queryHeads, kvHeads, headDim, threads }
          show(await (isGpu ? benchAttendOnDevice(shape, flags.batch, on, flags.calls) : benchAttend(shape, flags.peers ? buildPeers() : undefined)))
        } else {
          const shape = { codec, tokens: Math.min(tokens, 8192), kvHeads, headDim, threads }
          show(isGpu ? benchCodesOnDevice(shape, operation, on, flags.calls) : await benchCodes(shape, operation))
        }
      }
    }
    if (flags.json !== undefined) writeFileSync(flags.json, `${JSON.stringify({ machine: machine(flags.device), tables }, null, 2)}\n`)
  })

/** The addon with the peers, built for this machine. */
function buildPeers(): string {
  const root = path.join(__dirname, '..')
  const out = path.join(root, 'build-cmake', 'bench')
  const build = [path.join(root, 'scripts', 'build.mjs'), '--out', out, '--target', 'peers', '--', '-DCOUPLET_BENCH=ON']
  const { status } = spawnSync(process.execPath, build, { stdio: 'inherit' })
  if (status !== 0) throw new Error('the peers could not be built; --no-peers measures couplet alone')
  return path.join(out, 'peers.node')
}

program.parseAsync().catch((error: unknown) => {
  console.error(`bench: ${(error as Error).message}`)
  process.exitCode = 1
})

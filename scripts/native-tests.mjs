// Builds the native test programs and runs them.
//
//   node scripts/native-tests.mjs [--config Release] [--out DIR] [--under "qemu-aarch64 -L ..."] [--only NAME] [-- -DNAME=VALUE ...]
//
// Each of test/native and test/sim is one test. Each of test/gpu is one in every schedule of the simulator, the shuffled one
// with COUPLET_SIM_SEEDS seeds (3; under a sanitizer or an emulator with 1, and in no other schedule), and one more on a GPU,
// where the build has nvcc (COUPLET_GPU=CUDA) and the machine a driver. As many run at once as there are processors, those on a
// GPU one by one; what a program says is printed when it ends.
// The last line is `N passed, N failed`.
import { spawn } from 'node:child_process'
import { existsSync, readdirSync } from 'node:fs'
import { availableParallelism } from 'node:os'
import { join, parse, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { root, step } from './setup.mjs'

/** @returns {Promise<{ passed: number, failed: number }>} */
export async function nativeTests({ config = 'Release', out, under = '', only, definitions = [] } = {}) {
  const place = ['--config', config, ...(out ? ['--out', out] : [])]
  const gpu = process.env.COUPLET_GPU ?? 'SIM'
  const build = ['scripts/build.mjs', ...place, '--', '-DCOUPLET_TESTS=ON', '-DCOUPLET_WERROR=ON', `-DGPU=${gpu}`, ...definitions]
  step('building the addon and the native tests', process.execPath, build)
  const folder = resolve(root, out ?? join('build-cmake', config))
  const sanitized = definitions.some((definition) => /^-DSANITIZE=./.test(definition))
  const wanted = programs(folder, sanitized || under !== '').filter(({ program }) => !only || program.startsWith(only))
  if (wanted.length === 0) throw new Error('no test ran')
  const task = (test) => run(folder, under, test)
  const onHost = await atOnce(availableParallelism(), wanted.filter(({ device }) => !device), task)
  const onDevice = await atOnce(1, wanted.filter(({ device }) => device), task)
  const passed = [...onHost, ...onDevice].filter(Boolean).length
  return { passed, failed: wanted.length - passed }
}

/** The results of `task` for each of `items`, `most` of them under way at a time. */
async function atOnce(most, items, task) {
  const results = []
  let next = 0
  const worker = async () => {
    while (next < items.length) {
      const index = next++
      results[index] = await task(items[index])
    }
  }
  await Promise.all(Array.from({ length: most }, worker))
  return results
}

/** @returns {Promise<boolean>} whether the program ended well */
async function run(folder, under, { program, schedule }) {
  const title = schedule ? `${program}, ${schedule}` : program
  const [command, ...argv] = [...under.split(' ').filter(Boolean), join(folder, program)]
  const env = { ...process.env, COUPLET_TEST_LAUNCHER: under, ...(schedule ? { COUPLET_SIM_SCHEDULE: schedule } : {}) }
  const begin = performance.now()
  const said = []
  const why = await new Promise((done) => {
    const child = spawn(command, argv, { stdio: ['ignore', 'pipe', 'pipe'], cwd: root, env })
    for (const stream of [child.stdout, child.stderr]) stream.on('data', (text) => said.push(text))
    child.on('error', (error) => done(error.message))
    child.on('close', (status, signal) => done(status === 0 ? undefined : (signal ?? `exit status ${status}`)))
  })
  console.log(`\n> ${title} (${((performance.now() - begin) / 1000).toFixed(1)} s)`)
  process.stdout.write(Buffer.concat(said))
  if (why !== undefined) console.error(`FAILED: ${title} (${why})`)
  return why === undefined
}

/** What there is to run; `slow`: everything takes ten times as long and longer. */
function programs(folder, slow) {
  const names = (place) => readdirSync(join(root, 'test', place)).filter((name) => /_test\.(cc|cu)$/.test(name)).sort().map((name) => parse(name).name)
  const list = names('native').map((program) => ({ program }))
  if (existsSync(join(folder, 'libcouplet_sim.so'))) {
    const seeds = Number(process.env.COUPLET_SIM_SEEDS ?? (slow ? 1 : 3))
    const schedules = [...(slow ? [] : ['forward', 'reversed']), ...Array.from({ length: seeds }, (_, index) => `shuffled:${index + 1}`)]
    list.push(...names('sim').map((program) => ({ program })))
    list.push(...names('gpu').flatMap((name) => schedules.map((schedule) => ({ program: `${name}_sim`, schedule }))))
  } else {
    console.log('\nNOT RUN: test/sim and test/gpu in the simulator (not built: COUPLET_GPU is OFF, or CUDA has no headers here)')
  }
  if (existsSync(join(folder, 'libcouplet_cuda.so'))) {
    if (existsSync('/dev/nvidiactl')) list.push(...names('gpu').map((name) => ({ program: `${name}_cuda`, device: true })))
    else console.log('\nNOT RUN: test/gpu on a GPU (there is none)')
  }
  return list
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const text = { type: 'string' }
  const { values, positionals } = parseArgs({ options: { config: text, out: text, under: text, only: text }, allowPositionals: true })
  const { passed, failed } = await nativeTests({ ...values, definitions: positionals })
  console.log(`\n${passed} passed, ${failed} failed`)
  process.exitCode = failed > 0 ? 1 : 0
}

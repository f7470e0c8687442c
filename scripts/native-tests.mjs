// Builds the native test programs and runs them.
//
//   node scripts/native-tests.mjs [--config Release] [--out DIR] [--under "qemu-aarch64 -L ..."] [--only NAME] [-- -DNAME=VALUE ...]
//
// Each of test/native and test/sim is one test. Each of test/gpu is one in every schedule of the simulator, the shuffled one
// with COUPLET_SIM_SEEDS seeds (3; under a sanitizer or an emulator with 1, and in no other schedule), and one more on a GPU,
// where the build has nvcc (COUPLET_GPU=CUDA) and the machine a driver.
// The last line is `N passed, N failed`.
import { spawnSync } from 'node:child_process'
import { existsSync, readdirSync } from 'node:fs'
import { join, parse, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { root, step } from './setup.mjs'

/** @returns {{ passed: number, failed: number }} */
export function nativeTests({ config = 'Release', out, under = '', only, definitions = [] } = {}) {
  const place = ['--config', config, ...(out ? ['--out', out] : [])]
  const gpu = process.env.COUPLET_GPU ?? 'SIM'
  const build = ['scripts/build.mjs', ...place, '--', '-DCOUPLET_TESTS=ON', '-DCOUPLET_WERROR=ON', `-DGPU=${gpu}`, ...definitions]
  step('building the addon and the native tests', process.execPath, build)
  const folder = resolve(root, out ?? join('build-cmake', config))
  const [launcher, ...prefix] = under.split(' ').filter(Boolean)
  const env = { ...process.env, COUPLET_TEST_LAUNCHER: under }
  let passed = 0
  let failed = 0
  const sanitized = definitions.some((definition) => /^-DSANITIZE=./.test(definition))
  for (const { program, schedule } of programs(folder, sanitized || under !== '')) {
    if (only && !program.startsWith(only)) continue
    const title = schedule ? `${program}, ${schedule}` : program
    console.log(`\n> ${title}`)
    const path = join(folder, program)
    const [command, argv] = launcher ? [launcher, [...prefix, path]] : [path, []]
    const options = { stdio: 'inherit', cwd: root, env: schedule ? { ...env, COUPLET_SIM_SCHEDULE: schedule } : env }
    const { status, signal, error } = spawnSync(command, argv, options)
    if (status === 0) passed++
    else {
      failed++
      console.error(`FAILED: ${title} (${error?.message ?? signal ?? `exit status ${status}`})`)
    }
  }
  if (passed + failed === 0) throw new Error('no test ran')
  return { passed, failed }
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
    if (existsSync('/dev/nvidiactl')) list.push(...names('gpu').map((name) => ({ program: `${name}_cuda` })))
    else console.log('\nNOT RUN: test/gpu on a GPU (there is none)')
  }
  return list
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const text = { type: 'string' }
  const { values, positionals } = parseArgs({ options: { config: text, out: text, under: text, only: text }, allowPositionals: true })
  const { passed, failed } = nativeTests({ ...values, definitions: positionals })
  console.log(`\n${passed} passed, ${failed} failed`)
  process.exitCode = failed > 0 ? 1 : 0
}

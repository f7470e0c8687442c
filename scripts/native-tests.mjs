// Builds the programs of test/native and runs each of them: one program, one test.
//
//   node scripts/native-tests.mjs [--config Release] [--out DIR] [--under "qemu-aarch64 -L ..."] [-- -DNAME=VALUE ...]
//
// The last line is `N passed, N failed`.
import { spawnSync } from 'node:child_process'
import { readdirSync } from 'node:fs'
import { basename, join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { root, step } from './setup.mjs'

/** @returns {{ passed: number, failed: number }} */
export function nativeTests({ config = 'Release', out, under = '', definitions = [] } = {}) {
  const place = ['--config', config, ...(out ? ['--out', out] : [])]
  const build = ['scripts/build.mjs', ...place, '--', '-DCOUPLET_TESTS=ON', '-DCOUPLET_WERROR=ON', ...definitions]
  step('building the addon and the native tests', process.execPath, build)
  const folder = resolve(root, out ?? join('build-cmake', config))
  const [launcher, ...prefix] = under.split(' ').filter(Boolean)
  let passed = 0
  let failed = 0
  for (const source of readdirSync(join(root, 'test', 'native')).filter((name) => name.endsWith('_test.cc')).sort()) {
    const name = basename(source, '.cc')
    console.log(`\n> ${name}`)
    const program = join(folder, name)
    const [command, argv] = launcher ? [launcher, [...prefix, program]] : [program, []]
    const { status, signal, error } = spawnSync(command, argv, { stdio: 'inherit', cwd: root })
    if (status === 0) passed++
    else {
      failed++
      console.error(`FAILED: ${name} (${error?.message ?? signal ?? `exit status ${status}`})`)
    }
  }
  if (passed + failed === 0) throw new Error('test/native holds no test')
  return { passed, failed }
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const text = { type: 'string' }
  const { values, positionals } = parseArgs({ options: { config: text, out: text, under: text }, allowPositionals: true })
  const { passed, failed } = nativeTests({ ...values, definitions: positionals })
  console.log(`\n${passed} passed, ${failed} failed`)
  process.exitCode = failed > 0 ? 1 : 0
}

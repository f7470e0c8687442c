// Builds the programs of test/native and runs each of them: one program, one test.
//
//   node scripts/native-tests.mjs [--config Release] [--out DIR] [--emulator "qemu-aarch64 -L ..."] [-- -DNAME=VALUE ...]
//
// The last line is `N passed, N failed`.
import { spawnSync } from 'node:child_process'
import { readdirSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'
import { parseArgs } from 'node:util'
import { root, step } from './setup.mjs'

/** @returns {{ passed: number, failed: number }} */
export function nativeTests({ config = 'Release', out = join(root, 'build-cmake', config), emulator = '', definitions = [] } = {}) {
  const build = ['scripts/build.mjs', '--config', config, '--out', out, '--', '-DCOUPLET_TESTS=ON', ...definitions]
  step(`building addon and native tests in ${out}`, process.execPath, build)
  const names = readdirSync(join(root, 'test', 'native')).filter((name) => name.endsWith('_test.cc')).map((name) => name.slice(0, -3))
  const [program, ...prefix] = emulator.split(' ').filter(Boolean)
  let passed = 0
  let failed = 0
  for (const name of names) {
    console.log(`\n> ${name}`)
    const path = join(resolve(root, out), name)
    const { status, signal, error } = program
      ? spawnSync(program, [...prefix, path], { stdio: 'inherit', cwd: root })
      : spawnSync(path, [], { stdio: 'inherit', cwd: root })
    if (status === 0) passed++
    else {
      failed++
      console.error(`FAILED: ${name} (${error?.message ?? signal ?? `exit status ${status}`})`)
    }
  }
  return { passed, failed }
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const { values, positionals } = parseArgs({
    options: { config: { type: 'string' }, out: { type: 'string' }, emulator: { type: 'string' } },
    allowPositionals: true,
  })
  const { passed, failed } = nativeTests({ ...values, definitions: positionals })
  console.log(`\n${passed} passed, ${failed} failed`)
  process.exitCode = failed > 0 ? 1 : 0
}

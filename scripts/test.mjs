// `npm test`: everything from a clean clone to one line of counts. Sets up, builds, type-checks, then runs the native test
// programs and mocha. Arguments go to mocha (`npm test -- --grep kmeans`).
import { spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { nativeTests } from './native-tests.mjs'
import { installDependencies, root, step } from './setup.mjs'

installDependencies()
const native = nativeTests()
step('type-checking lib, test and bench', process.execPath, ['node_modules/typescript/bin/tsc', '-p', '.'])
step('compiling lib/ to dist/', process.execPath, ['scripts/build-lib.mjs'])
const mocha = mochaTests(process.argv.slice(2))

const passed = native.passed + mocha.passed
const failed = native.failed + mocha.failed
console.log(`\n${passed} passed, ${failed} failed${mocha.skipped > 0 ? `, ${mocha.skipped} skipped` : ''}`)
process.exitCode = failed > 0 ? 1 : 0

function mochaTests(argv) {
  console.log('\n> mocha')
  const folder = mkdtempSync(join(tmpdir(), 'couplet-test-'))
  const counts = join(folder, 'counts.json')
  const { status, signal } = spawnSync(process.execPath, ['node_modules/mocha/bin/mocha.js', '--reporter', 'scripts/mocha-reporter.cjs', ...argv], {
    stdio: 'inherit',
    cwd: root,
    env: { ...process.env, COUPLET_TEST_COUNTS: counts },
  })
  let result = { passed: 0, failed: 0, skipped: 0 }
  try {
    result = JSON.parse(readFileSync(counts, 'utf8'))
  } catch {
    console.error(`mocha ended without a result (${signal ?? `exit status ${status}`})`)
  }
  rmSync(folder, { recursive: true })
  // A crash, or a process that mocha's own count does not explain, is a failure too.
  if (status !== 0 && result.failed === 0) result.failed = 1
  return result
}

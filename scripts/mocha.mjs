// Runs mocha on the given files (or, without any, on those of .mocharc.json) and ends with `N passed, N failed[, N skipped]`.
//
//   node scripts/mocha.mjs [mocha options] [files]
import { spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { root } from './setup.mjs'

/** @returns {{ passed: number, failed: number, skipped: number }} */
export function mochaTests(argv) {
  const folder = mkdtempSync(join(tmpdir(), 'couplet-test-'))
  const counts = join(folder, 'counts.json')
  // Files on the command line would add to the configured ones, not replace them.
  const config = argv.some((argument) => argument.endsWith('.ts')) ? ['--no-config', '--import=tsx', '--forbid-only', '--timeout=20000'] : []
  const command = ['node_modules/mocha/bin/mocha.js', ...config, '--reporter', 'scripts/mocha-reporter.cjs', ...argv]
  const env = { ...process.env, COUPLET_TEST_COUNTS: counts }
  const { status, signal } = spawnSync(process.execPath, command, { stdio: 'inherit', cwd: root, env })
  let result = { passed: 0, failed: 0, skipped: 0 }
  try {
    result = JSON.parse(readFileSync(counts, 'utf8'))
  } catch {
    console.error(`mocha ended without a result (${signal ?? `exit status ${status}`})`)
  }
  rmSync(folder, { recursive: true })
  // A process that ends badly after its tests (a crash at exit, say) is a failure that mocha has not counted.
  if (status !== 0 && result.failed === 0) result.failed = 1
  return result
}

export function summary({ passed, failed, skipped = 0 }) {
  return `\n${passed} passed, ${failed} failed${skipped > 0 ? `, ${skipped} skipped` : ''}`
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const result = mochaTests(process.argv.slice(2))
  console.log(summary(result))
  process.exitCode = result.failed > 0 ? 1 : 0
}

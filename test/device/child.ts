/** Runs JavaScript in a process of its own, as the simulator reads its environment variables once. `couplet` is lib/, `device` the simulator. */
import { spawnSync } from 'node:child_process'
import { join } from 'node:path'

const setUp = `require(${JSON.stringify(require.resolve('tsx/cjs'))})
const assert = require('node:assert/strict')
const couplet = require(${JSON.stringify(join(__dirname, '..', '..', 'lib', 'index.ts'))})
const { noise } = require(${JSON.stringify(join(__dirname, '..', 'codebook', 'samples.ts'))})
const device = 'sim'
`

export function child(code: string, env: Record<string, string> = {}, flags: string[] = []): { stdout: string; stderr: string; status: number | null } {
  const wrapped = `${setUp};(async () => {${code}})().catch((error) => { console.error(error); process.exitCode = 1 })`
  return spawnSync(process.execPath, [...flags, '-e', wrapped], { encoding: 'utf8', timeout: 60_000, env: { ...process.env, ...env } })
}

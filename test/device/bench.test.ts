// `npm run bench -- --device`: runs tiny in the simulator, and says why where there is no GPU.
import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import { gpus } from './devices'

const root = join(__dirname, '..', '..')
const tiny = ['--tokens', '64', '--kv-heads', '2', '--query-heads', '4', '--head-dim', '32', '--codec', 'cq-8c3b', '--problems', '2', '--points', '60',
  '--iterations', '2', '--calls', '2', '--batch', '2']

function bench(...args: string[]): { status: number | null; stdout: string; stderr: string } {
  return spawnSync(process.execPath, ['--import', 'tsx', join(root, 'bench', 'main.ts'), ...args], { encoding: 'utf8', cwd: root })
}

describe('bench --device', function () {
  this.timeout(120_000)

  it('measures the operations on a device, and writes what it found', function () {
    if (!gpus.includes('sim' as never)) this.skip()
    const folder = mkdtempSync(join(tmpdir(), 'couplet-bench-'))
    const file = join(folder, 'figures.json')
    const { status, stderr } = bench('--device', 'sim', ...tiny, '--json', file)
    assert.equal(status, 0, stderr)
    const { machine, tables } = JSON.parse(readFileSync(file, 'utf8')) as {
      machine: { sim: { available: boolean } }
      tables: { operation: string; shape: { device: string }; rows: { value: number }[] }[]
    }
    rmSync(folder, { recursive: true })
    assert.equal(machine.sim.available, true)
    assert.deepEqual(tables.map(({ operation, shape }) => `${operation} ${shape.device}`), ['kmeans sim', 'encode sim', 'decode sim', 'attend sim'])
    for (const { rows } of tables) {
      assert.ok(rows.length > 0)
      for (const { value } of rows) assert.ok(value > 0 && Number.isFinite(value))
    }
  })

  it('fails with the reason where there is no GPU', function () {
    if (gpus.includes('cuda')) this.skip()
    const { status, stdout, stderr } = bench('--device', 'cuda', ...tiny)
    assert.equal(status, 1)
    assert.match(stderr, /^bench: cuda is not available: \S.+/)
    assert.equal(stdout, '')
  })
})

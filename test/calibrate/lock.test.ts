// One process at a time for a checkpoint: real processes, killed ones among them.
import assert from 'node:assert/strict'
import type { ChildProcess } from 'node:child_process'
import { spawn, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { existsSync, readFileSync, writeFileSync } from 'node:fs'
import { hostname } from 'node:os'
import { join } from 'node:path'

import type { CalibrateOptions, CoupletError, TuneOptions } from '../../lib'
import { calibrate, tune } from '../../lib'
import { removeCheckpoints } from '../../lib/calibrate/checkpoint'
import { whileLocked } from '../../lib/file-lock'
import { temporaryFolder, tinyLlama } from '../onnx/files'

const start = (script: string, ...argv: string[]): ChildProcess =>
  spawn(process.execPath, ['--import', 'tsx', join(__dirname, script), ...argv], { cwd: join(__dirname, '../..'), stdio: ['ignore', 'pipe', 'inherit'] })

/** Says something, and is ended at once, with nothing tidied up. */
async function killedWhenItSpeaks(child: ChildProcess, while_: () => Promise<void>): Promise<void> {
  try {
    await once(child.stdout!, 'data')
    await while_()
  } finally {
    const ended = once(child, 'exit')
    child.kill('SIGKILL')
    await ended
  }
}

describe('a path for one process at a time', function () {
  this.timeout(60_000)
  const folder = temporaryFolder()
  const work = () => Promise.resolve('done')
  const isBusy = (path: string, pid: number) => (error: { code?: string; message: string }) => {
    assert.equal(error.code, 'ERR_COUPLET_BUSY')
    assert.ok(error.message.includes(`process ${pid} of host "${hostname()}"`) && error.message.includes(`remove "${path}.lock"`), error.message)
    return true
  }
  const deadPid = () => spawnSync(process.execPath, ['-e', '']).pid

  it('is refused while another process has it, and taken from one that was killed', async () => {
    const path = join(folder.path, 'killed')
    const child = start('lock-child.ts', path, '0')
    await killedWhenItSpeaks(child, async () => { await assert.rejects(whileLocked(path, 'path', work), isBusy(path, child.pid!)) })
    assert.ok(existsSync(`${path}.lock`))
    assert.equal(await whileLocked(path, 'path', work), 'done')
    assert.ok(!existsSync(`${path}.lock`))
  })

  it('has one process inside, however many take over what a dead one left', async () => {
    const path = join(folder.path, 'many')
    writeFileSync(`${path}.lock`, JSON.stringify({ pid: deadPid(), host: hostname(), started: null }))
    const exits = [1, 2, 3].map(async () => (await once(start('lock-child.ts', path, '40'), 'exit'))[0] as number)
    assert.deepEqual(await Promise.all(exits), [0, 0, 0])
    assert.ok(!existsSync(`${path}.lock`))
  })

  it('is given back when the work fails, and is one for two calls of a process', async () => {
    const path = join(folder.path, 'own')
    await assert.rejects(whileLocked(path, 'path', () => Promise.reject(new Error('no'))), /^Error: no$/)
    await whileLocked(path, 'path', async () => { await assert.rejects(whileLocked(path, 'path', work), isBusy(path, process.pid)) })
    assert.equal(await whileLocked(path, 'path', work), 'done')
  })

  it('is taken from a process whose number another has now, and from one that died as it wrote', async () => {
    const path = join(folder.path, 'stale')
    const left = [
      ...(existsSync('/proc/self/stat') ? [JSON.stringify({ pid: process.pid, host: hostname(), started: '1' })] : []),
      '', '{"pid":', '[]', 'null', '{"pid":"1"}',
    ]
    for (const text of left) {
      writeFileSync(`${path}.lock`, text)
      assert.equal(await whileLocked(path, 'path', work), 'done', text)
    }
    writeFileSync(`${path}.lock`, JSON.stringify({ pid: deadPid(), host: 'elsewhere', started: null }))
    await assert.rejects(whileLocked(path, 'path', work), /of host "elsewhere" uses: wait until it has ended, or give another path; if it has ended, remove/)
  })
})

describe('a checkpoint', function () {
  this.timeout(60_000)
  const folder = temporaryFolder()
  const text = readFileSync(join(__dirname, '../../docs/api.md'), 'utf8').slice(0, 2000)
  const options = { model: tinyLlama, text, length: 128, codec: 'cq-8c3b', iterations: 3, threads: 1 } satisfies CalibrateOptions

  it('is refused to a second process, and goes on from one that was killed', async () => {
    const checkpoint = join(folder.path, 'new', 'state')
    const child = start('child.ts', JSON.stringify({ ...options, checkpoint }), join(folder.path, 'out'))
    await killedWhenItSpeaks(child, async () => {
      await assert.rejects(calibrate({ ...options, checkpoint }), { code: 'ERR_COUPLET_BUSY' })
      await removeCheckpoints(checkpoint)
      assert.ok(existsSync(join(checkpoint, 'state.json')), 'what another uses is not removed')
    })
    const { codebook } = await calibrate({ ...options, checkpoint })
    assert.deepEqual(codebook.toBuffer(), (await calibrate(options)).codebook.toBuffer())
    await removeCheckpoints(checkpoint)
    assert.deepEqual([existsSync(checkpoint), existsSync(`${checkpoint}.lock`)], [false, false])
  })

  it('is for one of two tunings', async () => {
    const { codebook } = await calibrate(options)
    const checkpoint = join(folder.path, 'tuning')
    const tuning: TuneOptions = { model: tinyLlama, codebook, text, length: 128, batch: 2, steps: 1, threads: 1, checkpoint }
    const ends = await Promise.allSettled([tune(tuning), tune(tuning)]) // either may be the first to come to its checkpoint
    assert.deepEqual(ends.map(({ status }) => status).sort(), ['fulfilled', 'rejected'])
    for (const end of ends) {
      if (end.status === 'fulfilled') assert.equal(end.value.steps, 1)
      else assert.equal((end.reason as CoupletError).code, 'ERR_COUPLET_BUSY')
    }
    assert.ok(!existsSync(`${checkpoint}.lock`))
  })
})

import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { mkdirSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import { CoupletError, capabilities, kmeansSync } from '../../lib'
import { linesOf } from '../../lib/cli/doctor'
import { addon } from '../../lib/native/addon'
import { describeOn } from '../device/devices'

const root = join(__dirname, '..', '..')

const load = `const couplet = require(${JSON.stringify(join(root, 'lib', 'index.ts'))})`

/** Runs code in a process of its own. */
function run(code: string, env: Record<string, string> = {}): { stdout: string; stderr: string } {
  return spawnSync(process.execPath, ['--import', 'tsx', '-e', code], { cwd: root, encoding: 'utf8', env: { ...process.env, ...env } })
}

describe('capabilities', () => {
  it('says what is loaded', () => {
    const { version, abi, layout, isa, cores, backends } = capabilities()
    assert.equal(version, (JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as { version: string }).version)
    assert.equal(abi, 1)
    assert.equal(layout, 1)
    assert.match(isa, /^(portable|avx2|avx512)$/)
    assert.ok(Number.isInteger(cores) && cores >= 1)
    assert.ok(backends.cpu.available)
    assert.equal(backends.cpu.variant, isa)
    assert.equal(backends.cpu.driver, undefined)
    const [device] = backends.cpu.devices
    assert.ok(backends.cpu.devices.length === 1 && device && 'name' in device)
    const { index, name, architecture, memoryBytes, freeBytes, multiprocessors } = device
    assert.deepEqual([index, name, architecture, multiprocessors], [0, 'CPU', isa, cores])
    assert.ok(freeBytes > 0 && freeBytes <= memoryBytes)
  })

  it('says why a backend is missing', () => {
    const { cuda } = capabilities().backends
    if (!cuda.available) assert.match(cuda.reason, /^This build of couplet has no cuda backend: there is no .*libcouplet_cuda\.so$|cuda|driver/i)
  })

  it('follows COUPLET_ISA', () => {
    const { stdout, stderr } = run(load + '; console.log(couplet.capabilities().isa)', { COUPLET_ISA: 'portable' })
    assert.equal(stdout.trim(), 'portable', stderr)
  })
})

describeOn('gpus', 'capabilities of a backend for GPUs', (name) => {
  it('say its versions and devices, in the words of doctor too', () => {
    const state = addon().backendState(name)
    assert.ok(state.available)
    assert.match(`${state.driver} ${state.runtime}`, /^\d+\.\d+ \d+\.\d+$/)
    assert.ok(state.devices.length > 0)
    for (const [at, device] of state.devices.entries()) {
      assert.ok('name' in device)
      assert.equal(device.index, at)
      assert.match(device.architecture, /^sm_\d+$/)
      assert.ok(device.freeBytes > 0 && device.freeBytes <= device.memoryBytes && device.multiprocessors > 0)
      assert.match(linesOf(state)[at + 1] ?? '', /^device \d: .+, sm_\d+, \d+ multiprocessors, [\d.]+ of [\d.]+ GiB free$/)
    }
    assert.match(linesOf(state)[0] ?? '', /^available, .+, driver for CUDA [\d.]+, built with CUDA [\d.]+$/)
  })
})

describe('doctor', () => {
  it('says why a backend or a device is missing', () => {
    assert.deepEqual(linesOf({ available: false, reason: 'no driver' }), ['not available: no driver'])
    const lost = linesOf({ available: true, variant: 'sm_90', devices: [{ index: 0, reason: 'lost' }] })
    assert.deepEqual(lost, ['available, sm_90', 'device 0: not usable: lost'])
  })
})

describe('an addon that does not load', () => {
  let folder: string
  before(() => {
    folder = mkdtempSync(join(tmpdir(), 'couplet-addon-'))
  })
  after(() => rmSync(folder, { recursive: true }))

  const report = 'try { couplet.capabilities() } catch (error) { console.log(error instanceof couplet.CoupletError, error.code, error.message) }'

  it('is an error that names every place that was tried', () => {
    const { stdout, stderr } = run(`${load}\n${report}`, { COUPLET_PREBUILD: folder })
    assert.match(stdout, /^true ERR_COUPLET_ADDON The addon of couplet .* could not be loaded/, stderr)
    for (const place of ['build/Release', 'build/Debug', `prebuilds/${process.platform}-${process.arch}`]) assert.ok(stdout.includes(join(folder, place)), place)
    assert.match(stdout, /npm rebuild couplet/)
  })

  it('is an error with what the loader said', () => {
    mkdirSync(join(folder, 'build', 'Release'), { recursive: true })
    writeFileSync(join(folder, 'build', 'Release', 'couplet.node'), 'not a library')
    const { stdout, stderr } = run(`${load}\n${report}`, { COUPLET_PREBUILD: folder })
    assert.match(stdout, /couplet\.node: .*(invalid ELF header|file too short|not a mach-o|slice)/, stderr)
  })

  it('is an error when it was built for another version', () => {
    const asVersion99 = `
      const fs = require('node:fs')
      const { readFileSync } = fs
      fs.readFileSync = (path, ...rest) =>
        path === ${JSON.stringify(join(root, 'package.json'))} ? '{ "version": "99.0.0" }' : readFileSync(path, ...rest)`
    const { stdout, stderr } = run(`${asVersion99}\n${load}\n${report}`)
    assert.match(stdout, /built for couplet \d+\.\d+\.\d+, and this is couplet 99\.0\.0/, stderr)
  })
})

describe('CoupletError', () => {
  it('knows its own, and those that the addon made', () => {
    const own = new CoupletError('ERR_COUPLET_BUSY', 'A step is open', { layer: 3, cause: 'why' })
    assert.ok(own instanceof CoupletError && own instanceof Error)
    assert.deepEqual([own.name, own.code, own.layer, own.cause, 'token' in own], ['CoupletError', 'ERR_COUPLET_BUSY', 3, 'why', false])
    assert.ok(!(new Error('x') instanceof CoupletError))
    assert.ok(!(Object.assign(new Error('x'), { code: 'ENOENT' }) instanceof CoupletError))
    assert.ok(!((null as unknown) instanceof CoupletError))
    assert.throws(
      () => kmeansSync(new Float32Array(4), { problems: 1, points: 4, channels: 1, centroids: 1, threads: -1 }),
      (error: unknown) => error instanceof CoupletError && error instanceof RangeError && error.code === 'ERR_COUPLET_INVALID_ARGUMENT',
    )
  })
})

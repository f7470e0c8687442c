// libcouplet_cuda.so as a release carries it: found where a build left one (npm run check builds it where there is nvcc).
import assert from 'node:assert/strict'
import { execFileSync, spawnSync } from 'node:child_process'
import { copyFileSync, existsSync, mkdirSync, mkdtempSync, rmSync, statSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join, resolve } from 'node:path'

const root = resolve(__dirname, '../..')
const folders = ['build/Release', `prebuilds/${process.platform}-${process.arch}`, 'build-cmake/cuda']
const library = folders.map((folder) => join(root, folder, 'libcouplet_cuda.so')).find((path) => existsSync(path))
const addon = join(root, 'build', 'Release', 'couplet.node')

describe('the CUDA library', function () {
  this.timeout(60_000)
  before(function () {
    if (library !== undefined && existsSync(addon)) return
    console.log('    not run: no libcouplet_cuda.so was built here')
    this.skip()
  })

  it('needs the C and C++ libraries and no other, of the age that the addon asks for', function () {
    if (spawnSync('readelf', ['--version']).status !== 0) this.skip()
    const read = (flag: string) => execFileSync('readelf', [flag, '--wide', library ?? ''], { encoding: 'utf8', maxBuffer: 1 << 26 })
    const needed = [...read('--dynamic').matchAll(/\(NEEDED\).*\[(.+)\]/g)].map((match) => match[1] ?? '')
    assert.deepEqual(needed.filter((name) => !/^(lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s)|ld-linux-x86-64)\.so\.\d+$/.test(name)), [])
    const newest = Math.max(...[...read('--version-info').matchAll(/GLIBC_2\.(\d+)/g)].map((match) => Number(match[1])))
    assert.ok(newest <= 34, `needs GLIBC_2.${newest}`)
  })

  it('loads beside the addon where there is no driver, and the reason is told', function () {
    const folder = mkdtempSync(join(tmpdir(), 'couplet-cuda-'))
    const place = join(folder, 'build', 'Release')
    mkdirSync(place, { recursive: true })
    copyFileSync(addon, join(place, 'couplet.node'))
    copyFileSync(library ?? '', join(place, 'libcouplet_cuda.so'))
    const code = `const { capabilities } = require(${JSON.stringify(join(root, 'lib', 'index.ts'))}); console.log(JSON.stringify(capabilities().backends.cuda))`
    const { stdout, stderr } = spawnSync(process.execPath, ['--import', 'tsx', '-e', code], {
      cwd: root, encoding: 'utf8', env: { ...process.env, COUPLET_PREBUILD: folder },
    })
    rmSync(folder, { recursive: true })
    const state = JSON.parse(stdout || '{}') as { available?: boolean; reason?: string }
    if (existsSync('/dev/nvidiactl')) assert.ok(state.available !== undefined, stderr)
    // A library of an earlier build of another ABI is refused for that; never for what the loader misses.
    else if (statSync(library ?? '').mtimeMs < statSync(addon).mtimeMs) assert.match(state.reason ?? stderr, /no NVIDIA driver|has (ABI|struct|layout)/)
    else assert.equal(state.reason, 'This machine has no NVIDIA driver', stderr)
  })
})

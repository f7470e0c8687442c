// What code for GPUs may say and include. The simulator runs every kernel because these hold.
import assert from 'node:assert/strict'
import { execFileSync, spawnSync } from 'node:child_process'
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { dirname, join, relative, resolve } from 'node:path'

const root = resolve(__dirname, '../..')

/** Only here is the difference between nvcc and the simulator known. */
const bothWorlds = /^cuda\/(gpu\.h$|sim\/)/
const nvccOnly = /<<<|\b(__shared__|asm|__asm__|__CUDA_ARCH__|__CUDACC__|__threadfence\w*)\b/
const nodeHeaders = /^(napi|node_api|js_native_api|uv|v8|node)\b.*\.h$/
const rooms = /^(cuda|native\/(abi|common))\//

interface Line { readonly file: string; readonly line: number; readonly text: string }

function sources(folder: string): string[] {
  const absolute = join(root, folder)
  if (!existsSync(absolute)) return []
  return readdirSync(absolute, { recursive: true, encoding: 'utf8' })
    .filter((name) => /\.(h|cc|cu|cuh|inc)$/.test(name))
    .map((name) => join(folder, name))
}

/** The lines of a file without its comments. */
function code(file: string): Line[] {
  const text = readFileSync(join(root, file), 'utf8').replace(/\/\*[^]*?\*\//g, (comment) => comment.replace(/[^\n]/g, ' '))
  return text.split('\n').map((line, index) => ({ file, line: index + 1, text: line.replace(/\/\/.*/, '') }))
}

function includes(lines: Line[]): { from: Line; path: string; quoted: boolean }[] {
  return lines.flatMap((from) => {
    const match = /^\s*#\s*include\s*(?:"([^"]+)"|<([^>]+)>)/.exec(from.text)
    return match ? [{ from, path: match[1] ?? match[2] ?? '', quoted: match[1] !== undefined }] : []
  })
}

function none(offenders: Line[], rule: string): void {
  assert.deepEqual(offenders.map(({ file, line, text }) => `${file}:${line}: ${text.trim()}`), [], rule)
}

describe('rooms of cuda/', () => {
  const all = ['cuda', 'test/gpu', 'test/sim', 'bench/cuda'].flatMap(sources)
  const lines = all.flatMap(code)
  const ofCuda = includes(lines).filter(({ from }) => from.file.startsWith('cuda/'))
  const target = (from: Line, path: string): string => relative(root, resolve(root, dirname(from.file), path))

  it('the scan found the sources, and knows what it looks for', () => {
    assert.ok(all.length > 10)
    assert.ok(lines.some(({ file, text }) => file === 'cuda/gpu.h' && nvccOnly.test(text)))
  })

  it('kernels speak through gpu.h alone', () => {
    none(lines.filter(({ file, text }) => !bothWorlds.test(file) && nvccOnly.test(text)), 'cuda/gpu.h has the spelling that both worlds know')
  })

  it('kernels do not ask which world they are in', () => {
    // The backend says its own name; tests of the simulator are of one world by nature.
    const exempt = (file: string): boolean => bothWorlds.test(file) || file === 'cuda/backend.cu' || file.startsWith('test/sim/')
    none(lines.filter(({ file, text }) => !exempt(file) && /\bGPU_SIM\b/.test(text)), 'a difference belongs in cuda/gpu.h')
  })

  it('cuda includes itself, native/abi and native/common', () => {
    none(ofCuda.filter(({ from, path, quoted }) => quoted && !rooms.test(target(from, path))).map(({ from }) => from), 'neither native/cpu nor Node')
    none(ofCuda.filter(({ path, quoted }) => !quoted && nodeHeaders.test(path)).map(({ from }) => from), 'only native/binding speaks to Node')
    const inSim = (file: string): boolean => file.startsWith('cuda/sim/')
    const quoted = ofCuda.filter((one) => one.quoted).map(({ from, path }) => ({ from, to: target(from, path) }))
    none(quoted.filter(({ from, to }) => inSim(from.file) && !inSim(to)).map(({ from }) => from), 'the simulator knows nothing of couplet')
    none(quoted.filter(({ from, to }) => !inSim(from.file) && from.file !== 'cuda/gpu.h' && inSim(to)).map(({ from }) => from),
      'only gpu.h opens the simulator')
  })

  it('every quoted include exists', () => {
    const missing = includes(lines).filter(({ from, path, quoted }) => quoted && !existsSync(join(root, target(from, path))))
    none(missing.map(({ from }) => from), 'paths are relative')
  })

  it('a backend library shows the loader no symbol but its entry', function () {
    const built = ['cuda', 'sim'].map((name) => join(root, 'build', 'Release', `libcouplet_${name}.so`)).filter((path) => existsSync(path))
    if (built.length === 0 || spawnSync('nm', ['--version']).status !== 0) this.skip()
    for (const library of built) {
      const symbols = execFileSync('nm', ['--dynamic', '--defined-only', library], { encoding: 'utf8' }).trim().split('\n')
      assert.deepEqual(symbols.map((line) => line.split(' ').at(-1)), ['couplet_backend_entry'], library)
    }
  })
})

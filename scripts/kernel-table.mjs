// Compiles cuda/ with nvcc, warnings and spills being errors, and writes what ptxas says of each kernel into docs/kernels.md.
//
//   node scripts/kernel-table.mjs [--check]     with --check nothing is written, and a difference is an error
//
// Without nvcc it says so and does nothing.
import { spawnSync } from 'node:child_process'
import { existsSync, readdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join, relative } from 'node:path'
import { root, step } from './setup.mjs'

const document = join(root, 'docs', 'kernels.md')
const folder = join(root, 'build-cmake', 'cuda')
const objects = join(folder, 'cuda', 'CMakeFiles', 'couplet_cuda_objects.dir')
const markers = ['<!-- written by scripts/kernel-table.mjs -->\n', '<!-- up to here -->\n']
// What CI can afford, and the devices that kernels are tuned on.
const architectures = ['sm_80', 'sm_90a']

const nvcc = findNvcc()
if (!nvcc) {
  console.log('NOT RUN: the compilation of kernels by nvcc, and the table of their registers (there is no nvcc here)')
} else {
  const launcher = [process.execPath, join(root, 'scripts', 'nvcc-log.mjs'), ...(spawnSync('ccache', ['--version']).status === 0 ? ['ccache'] : [])]
  const definitions = ['GPU=CUDA', 'COUPLET_ADDON=OFF', 'COUPLET_TESTS=ON', 'COUPLET_WERROR=ON', 'CMAKE_CUDA_ARCHITECTURES=80;90a-real',
    'CMAKE_CUDA_FLAGS=-Xptxas=-v', `CMAKE_CUDA_COMPILER_LAUNCHER=${launcher.join(';')}`]
  const build = ['scripts/build.mjs', '--out', folder, '--target', 'couplet_nvcc', '--', ...definitions.map((definition) => `-D${definition}`)]
  step('compiling the kernels with nvcc', process.execPath, build)
  const version = /release [\d.]+, V([\d.]+)/.exec(spawnSync(nvcc, ['--version'], { encoding: 'utf8' }).stdout)?.[1]
  const kernels = readKernels()
  if (process.argv.includes('--check')) check(version, kernels)
  else write(version, kernels)
}

function findNvcc() {
  const places = [...(process.env.PATH ?? '').split(':'), `${process.env.CUDA_PATH}/bin`, `${process.env.CUDA_HOME}/bin`, '/usr/local/cuda/bin']
  return places.map((place) => join(place, 'nvcc')).find((path) => existsSync(path))
}

/** What ptxas said, by file and kernel: one entry for each architecture. */
function readKernels() {
  const kernels = new Map()
  const logs = readdirSync(objects, { recursive: true }).filter((name) => name.endsWith('.ptxas'))
  for (const log of logs) {
    const file = relative(root, join(root, 'cuda', log.replace(/\.(cu)\.(o|ptxas).*$/, '.$1')))
    if (!existsSync(join(root, file))) continue // an object of a file that is no more
    const text = readFileSync(join(objects, log), 'utf8')
    for (const part of text.split(/ptxas info\s*: Compiling entry function /).slice(1)) {
      const [, mangled, architecture] = /^'(\w+)' for '(\w+)'/.exec(part) ?? fail(part)
      const [, stack, stores, loads] = /(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads/.exec(part) ?? fail(part)
      const [, registers] = /Used (\d+) registers/.exec(part) ?? fail(part)
      const shared = /(\d+) bytes smem/.exec(part)?.[1] ?? '0'
      const key = `${file} ${mangled}`
      const kernel = kernels.get(key) ?? { file, mangled }
      kernel[architecture] = { registers, shared, stack, spills: String(Number(stores) + Number(loads)) }
      kernels.set(key, kernel)
    }
  }
  const list = [...kernels.values()]
  const names = spawnSync('c++filt', [], { input: list.map((kernel) => kernel.mangled).join('\n'), encoding: 'utf8' }).stdout.split('\n')
  list.forEach((kernel, index) => { kernel.name = shortName(names[index]) })
  return list.sort((left, right) => left.file.localeCompare(right.file) || left.name.localeCompare(right.name, 'en', { numeric: true }))
}

/** Without return type, parameters, and the namespaces that all kernels share. */
function shortName(name) {
  let depth = 0
  let end = name.length
  const plain = name.replace(/\(anonymous namespace\)::|_GLOBAL__N__\w+::|_INTERNAL_\w+::|couplet::cuda::/g, '').replace(/^void /, '')
  for (const [index, character] of [...plain].entries()) {
    if (character === '<') depth++
    if (character === '>') depth--
    if (character === '(' && depth === 0) {
      end = index
      break
    }
  }
  return plain.slice(0, Math.min(end, plain.length)).replace(/\((?:int|unsigned int|bool)\)/g, '')
}

function table(version, kernels) {
  const cells = (kernel) => [
    `${kernel.name.replaceAll('|', '\\|')}`,
    kernel.file.replace(/^cuda\//, ''),
    ...['registers', 'shared', 'stack', 'spills'].map((what) => {
      const values = architectures.map((architecture) => kernel[architecture]?.[what] ?? '?')
      return new Set(values).size === 1 ? values[0] : values.join(' / ')
    }),
  ]
  const rows = kernels.map((kernel) => `| ${cells(kernel).join(' | ')} |\n`)
  return `nvcc ${version}, ${architectures.join(' / ')} where they differ; bytes, the dynamic shared memory of a launch not among them.\n\n`
    + '| kernel | file | registers | static shared | stack | spills |\n| --- | --- | --- | --- | --- | --- |\n'
    + rows.join('')
}

function write(version, kernels) {
  const [before, , after] = parts()
  writeFileSync(document, `${before}${markers[0]}${table(version, kernels)}${markers[1]}${after}`)
  console.log(`docs/kernels.md: ${kernels.length} kernels`)
}

function check(version, kernels) {
  const written = parts()[1]
  const by = /^nvcc ([\d.]+)/.exec(written)?.[1]
  if (by !== version) {
    console.log(`NOT COMPARED: docs/kernels.md is of nvcc ${by}, and this is nvcc ${version} (everything compiled, without warnings and spills)`)
    return
  }
  const [wanted, found] = [written, table(version, kernels)].map((text) => text.split('\n'))
  const gone = wanted.filter((line) => !found.includes(line))
  const fresh = found.filter((line) => !wanted.includes(line))
  if (gone.length + fresh.length === 0) {
    console.log(`docs/kernels.md agrees with nvcc ${version} on ${kernels.length} kernels`)
    return
  }
  console.error('docs/kernels.md disagrees with nvcc (node scripts/kernel-table.mjs writes it anew):')
  for (const line of gone) console.error(`- ${line}`)
  for (const line of fresh) console.error(`+ ${line}`)
  process.exitCode = 1
}

/** docs/kernels.md before, between and after the markers. */
function parts() {
  const text = readFileSync(document, 'utf8')
  const [begin, end] = markers.map((marker) => text.indexOf(marker))
  if (begin < 0 || end < begin) throw new Error(`docs/kernels.md lacks ${markers.join('or ')}`)
  return [text.slice(0, begin), text.slice(begin + markers[0].length, end), text.slice(end + markers[1].length)]
}

function fail(text) {
  throw new Error(`ptxas says something unknown: ${text.slice(0, 300)}`)
}

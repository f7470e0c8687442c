// Builds the addon and, on request, the native tests and benchmarks: drives CMakeLists.txt through cmake-js.
//
//   node scripts/build.mjs [--config Release] [--out DIR] [--to DIR] [--target NAME] [-- -DNAME=VALUE ...]
//
// CMake works in --out (build-cmake/<config>); couplet.node is then copied to --to (build/<config>), where node-gyp-build
// and prebuildify look for it. A build with an --out of its own keeps its addon there: COUPLET_PREBUILD=<out> loads it.
// COUPLET_GPU (or -DGPU=) says which backends are built and put beside the addon: OFF, CUDA, AUTO or SIM (CMakeLists.txt).
import { spawnSync } from 'node:child_process'
import { copyFileSync, existsSync, mkdirSync, readFileSync, renameSync, rmSync } from 'node:fs'
import { createRequire } from 'node:module'
import { availableParallelism } from 'node:os'
import { delimiter, dirname, join, resolve } from 'node:path'
import { parseArgs } from 'node:util'

const root = resolve(import.meta.dirname, '..')
const { values, positionals } = parseArgs({
  options: { config: { type: 'string' }, out: { type: 'string' }, to: { type: 'string' }, target: { type: 'string' } },
  allowPositionals: true,
})
const config = values.config ?? 'Release'
const out = resolve(values.out ?? join(root, 'build-cmake', config))
const to = resolve(values.to ?? (values.out ? join(out, 'build', 'Release') : join(root, 'build', config)))

// Stated on every run, because CMake would otherwise keep what an earlier run said.
const definitions = new Map([
  ['COUPLET_ADDON', 'ON'],
  ['COUPLET_TESTS', 'OFF'],
  ['COUPLET_BENCH', 'OFF'],
  ['GPU', process.env.COUPLET_GPU ?? 'OFF'],
  ['SANITIZE', ''],
])
if (onPath('ccache')) {
  definitions.set('CMAKE_CXX_COMPILER_LAUNCHER', 'ccache')
  definitions.set('CMAKE_CUDA_COMPILER_LAUNCHER', 'ccache')
}
for (const argument of positionals) {
  const [, name, value] = /^-D(\w+)(?::\w+)?=(.*)$/s.exec(argument) ?? []
  if (name === undefined) fail(`Expected -DNAME=VALUE after -- but received ${argument}`)
  definitions.set(name, value)
}
if (!/^(CUDA|AUTO)$/.test(definitions.get('GPU'))) definitions.delete('CMAKE_CUDA_COMPILER_LAUNCHER')

const require = createRequire(import.meta.url)
const cmakeJs = join(dirname(require.resolve('cmake-js/package.json')), 'bin', 'cmake-js')
const common = ['--directory', root, '--out', out, '--config', config, '--log-level', 'warn']
const generator = earlierGenerator()

// A backend of an earlier build must not stay beside this one's addon.
const backends = ['libcouplet_cuda.so', 'libcouplet_sim.so']
for (const library of backends) rmSync(join(out, library), { force: true })

// `configure` then `build`, never `compile`: after a compile error that one deletes everything and starts again.
cmake('configure', generator ? ['--generator', generator] : [], [...definitions].map(([name, value]) => `-D${name}=${value}`))
cmake('build', ['--parallel', process.env.JOBS ?? String(availableParallelism()), ...(values.target ? ['--target', values.target] : [])])

if (definitions.get('COUPLET_ADDON') === 'ON') {
  for (const file of ['couplet.node', ...backends]) {
    if (existsSync(join(out, file))) place(file)
    else if (!values.target) rmSync(join(to, file), { force: true })
  }
}

// Renamed into place: a process that has the old file mapped keeps it whole.
function place(file) {
  mkdirSync(to, { recursive: true })
  const partial = join(to, `${file}.${process.pid}.partial`)
  copyFileSync(join(out, file), partial)
  renameSync(partial, join(to, file))
}

function cmake(command, options, rest = []) {
  const env = { ...process.env }
  delete env.MAKEFLAGS // under node-gyp, make exports its own job server
  delete env.MFLAGS
  env.CCACHE_BASEDIR ??= root // one cache for all clones
  const argv = [cmakeJs, command, ...common, ...options, ...(rest.length > 0 ? ['--', ...rest] : [])]
  const { status, error } = spawnSync(process.execPath, argv, { stdio: 'inherit', env, cwd: root })
  if (error) throw error
  if (status !== 0) process.exit(status ?? 1)
}

// A build folder keeps the generator it was made with; cmake-js alone would switch to ninja as soon as it is installed.
function earlierGenerator() {
  const cache = join(out, 'CMakeCache.txt')
  return existsSync(cache) ? /^CMAKE_GENERATOR:INTERNAL=(.*)$/m.exec(readFileSync(cache, 'utf8'))?.[1] : undefined
}

function onPath(program) {
  return (process.env.PATH ?? '').split(delimiter).some((folder) => folder !== '' && existsSync(join(folder, program)))
}

function fail(message) {
  console.error(message)
  process.exit(2)
}

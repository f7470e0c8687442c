// The built addon against what lib/native says of it, and against the machines it must load on.
import assert from 'node:assert/strict'
import { execFileSync, spawnSync } from 'node:child_process'
import { existsSync, readdirSync } from 'node:fs'
import { createRequire } from 'node:module'
import { basename, join, resolve } from 'node:path'
import ts from 'typescript'

const root = resolve(__dirname, '../..')
const load = createRequire(__filename)('node-gyp-build') as (folder: string) => Record<string, unknown>
const release = join(root, 'build', 'Release', 'couplet.node')

function tool(name: string, argv: string[]): string {
  return execFileSync(name, argv, { encoding: 'utf8', maxBuffer: 1 << 26 })
}
const has = (name: string): boolean => spawnSync(name, ['--version']).status === 0

describe('the addon', () => {
  it('exports exactly what lib/native declares', function () {
    this.timeout(60_000)
    const file = join(root, 'lib/native/addon.ts')
    const { options } = ts.parseJsonConfigFileContent(ts.readConfigFile(join(root, 'tsconfig.json'), (name) => ts.sys.readFile(name)).config, ts.sys, root)
    const program = ts.createProgram([file], options)
    const checker = program.getTypeChecker()
    const source = program.getSourceFile(file)
    const module = source && checker.getSymbolAtLocation(source)
    const addon = module && checker.getExportsOfModule(module).find((symbol) => symbol.name === 'Addon')
    assert.ok(addon, 'lib/native/addon.ts exports the type Addon')
    const declared = checker.getPropertiesOfType(checker.getDeclaredTypeOfSymbol(addon)).map((property) => property.name).sort()
    assert.deepEqual(Object.keys(load(root)).sort(), declared)
    assert.ok(declared.length > 0)
  })

  it('loads with the C library of Debian 12 and of its age (glibc 2.34)', function () {
    if (!existsSync(release) || !has('readelf')) this.skip()
    const { glibcVersionRuntime } = (process.report.getReport() as { header: { glibcVersionRuntime?: string } }).header
    // What a newer C library's headers ask for is no fault of ours; releases are built where this test runs in full.
    if (glibcVersionRuntime === undefined || compare(glibcVersionRuntime, '2.36') > 0) this.skip()
    const versions = [...tool('readelf', ['--version-info', '--wide', release]).matchAll(/GLIBC_([\d.]+)/g)].map((match) => match[1] ?? '')
    assert.ok(versions.length > 0)
    assert.ok(compare(versions.sort(compare).at(-1) ?? '', '2.34') <= 0, `needs GLIBC_${versions.at(-1)}`)
  })

  it('shows the loader no symbol but its entry', function () {
    if (!existsSync(release) || !has('nm')) this.skip()
    const symbols = tool('nm', ['--dynamic', '--defined-only', release]).trim().split('\n').map((line) => line.split(' ').at(-1) ?? '')
    assert.deepEqual(symbols.filter((name) => !/^(napi_register_module_v1|node_api_module_get_api_version_v1|_init|_fini)$/.test(name)), [])
  })

  it('holds no function shared between instruction sets', function () {
    const objects = join(root, 'build-cmake/Release/CMakeFiles/couplet_cpu.dir/native/cpu')
    if (!existsSync(objects) || !has('nm')) this.skip()
    // A weak function compiled for AVX-512 may be the one the linker keeps for everybody. One whose name holds the
    // instruction set, in its namespace, is nobody else's.
    const bodies = readdirSync(objects, { recursive: true, encoding: 'utf8' }).filter((file) => /_(avx2|avx512)\.cc\.o$/.test(file))
    for (const body of bodies) {
      const isa = /avx\d+/.exec(basename(body))?.[0] ?? ''
      const weak = tool('nm', ['--demangle', '--defined-only', join(objects, body)]).split('\n').filter((line) => / [WVu] /.test(line))
      assert.deepEqual(weak.filter((line) => !new RegExp(`\\b\\w*${isa}::`).test(line)), [], body)
    }
  })
})

function compare(left: string, right: string): number {
  const [leftParts, rightParts] = [left.split('.').map(Number), right.split('.').map(Number)]
  for (let part = 0; part < 3; part++) {
    const difference = (leftParts[part] ?? 0) - (rightParts[part] ?? 0)
    if (difference !== 0) return difference
  }
  return 0
}

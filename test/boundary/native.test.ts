// Which room of native/ may include what. The table below is the rule; CONTRIBUTING.md explains it.
import assert from 'node:assert/strict'
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { dirname, join, relative, resolve } from 'node:path'

const root = resolve(__dirname, '../..')

/** Room -> the other rooms it may include. */
const rooms: Record<string, readonly string[]> = {
  abi: [],
  common: ['abi'],
  cpu: ['abi', 'common'],
  dispatch: ['abi', 'common', 'cpu'],
  cache: ['abi', 'common'],
  call: ['abi', 'common'],
  onnxruntime: ['abi', 'common', 'dispatch', 'cache'],
  binding: ['abi', 'common', 'dispatch', 'cache', 'call', 'onnxruntime'],
}
const nodeHeaders = /^(napi|node_api|js_native_api|uv|v8|node)\b.*\.h$/
const intrinsics = /(intrin|arm_neon|arm_sve|cpuid)\.h$/
const cuda = /^cuda/
const cHeaders = /^(stddef|stdint)\.h$/
// Declarations and macros only. <cmath> and <algorithm>, say, bring inline functions, which a file compiled for AVX-512
// would emit weak: the linker may then keep that copy for everybody, and an older processor dies in it.
const withoutInlineCode = /^(cfloat|climits|cstddef|cstdint|cstring|float\.h|limits\.h|stddef\.h|stdint\.h|string\.h)$/
const isaBody = /_(portable|avx2|avx512)\.cc$/

interface Include { readonly file: string; readonly line: number; readonly path: string; readonly quoted: boolean }

function sources(folder: string): string[] {
  const absolute = join(root, folder)
  if (!existsSync(absolute)) return []
  return readdirSync(absolute, { recursive: true, encoding: 'utf8' })
    .filter((name) => /\.(h|cc|inc)$/.test(name))
    .map((name) => join(folder, name))
}

function includes(file: string): Include[] {
  return readFileSync(join(root, file), 'utf8')
    .split('\n')
    .flatMap((text, index) => {
      const match = /^\s*#\s*include\s*(?:"([^"]+)"|<([^>]+)>)/.exec(text)
      return match ? [{ file, line: index + 1, path: match[1] ?? match[2] ?? '', quoted: match[1] !== undefined }] : []
    })
}

const target = (include: Include): string => relative(root, resolve(root, dirname(include.file), include.path))

/** What `file` includes, directly or through our own headers. */
function closure(file: string, seen = new Set<string>()): Include[] {
  if (seen.has(file)) return []
  seen.add(file)
  return includes(file).flatMap((include) => (include.quoted ? [include, ...closure(target(include), seen)] : [include]))
}

function none(offenders: Include[], rule: string): void {
  const list = offenders.map((include) => `${include.file}:${include.line} includes ${include.path}`)
  assert.deepEqual(list, [], rule)
}

describe('rooms of native/', () => {
  const all = sources('native').flatMap(includes)
  const system = all.filter((include) => !include.quoted)
  const room = (file: string): string => file.split('/')[1] ?? ''

  it('every room is in the table', () => {
    const found = readdirSync(join(root, 'native'), { withFileTypes: true }).filter((entry) => entry.isDirectory())
    assert.deepEqual(found.map((entry) => entry.name).filter((name) => !(name in rooms)), [])
    assert.ok(all.length > 50, 'the scan found the sources')
  })

  it('a room includes only the rooms below it', () => {
    none(all.filter((include) => {
      if (!include.quoted) return false
      const [top, to = ''] = target(include).split('/')
      const from = room(include.file)
      return top !== 'native' || (from !== to && rooms[from]?.includes(to) !== true)
    }), 'see the table in test/boundary/native.test.ts')
  })

  it('every quoted include exists', () => {
    none(all.filter((include) => include.quoted && !existsSync(join(root, target(include)))), 'quoted includes are relative paths')
  })

  it('abi sees nothing but <stddef.h> and <stdint.h>', () => {
    none(system.filter((include) => room(include.file) === 'abi' && !cHeaders.test(include.path)), 'the waist is plain C')
  })

  it('only binding sees Node', () => {
    none(system.filter((include) => room(include.file) !== 'binding' && nodeHeaders.test(include.path)), 'only native/binding speaks to Node')
  })

  it('only cpu sees intrinsics, and nobody sees CUDA', () => {
    none(system.filter((include) => room(include.file) !== 'cpu' && intrinsics.test(include.path)), 'vectors live in native/cpu')
    none(system.filter((include) => cuda.test(include.path)), 'the addon holds no CUDA code')
  })

  it('bodies for one instruction set include no inline code of the standard library', () => {
    for (const file of sources('native/cpu').filter((name) => isaBody.test(name))) {
      none(closure(file).filter((include) =>
        !include.quoted && !withoutInlineCode.test(include.path) && !intrinsics.test(include.path)), `${file}, directly or through a header`)
    }
  })
})

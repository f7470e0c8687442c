// Which module of lib/ may import what, from the source text: no rule here depends on anything being built.
import assert from 'node:assert/strict'
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { dirname, join, relative, resolve } from 'node:path'
import ts from 'typescript'

const root = resolve(__dirname, '../..')

interface Import { readonly file: string; readonly path: string; readonly typeOnly: boolean; readonly dynamic: boolean }

function sources(folder: string): string[] {
  const absolute = join(root, folder)
  if (!existsSync(absolute)) return []
  return readdirSync(absolute, { recursive: true, encoding: 'utf8' }).filter((name) => name.endsWith('.ts')).map((name) => join(folder, name))
}

/** Every import, export from, import() and require() of a file; relative ones as paths from the root, without .ts. */
function imports(file: string): Import[] {
  const text = readFileSync(join(root, file), 'utf8')
  const source = ts.createSourceFile(file, text, ts.ScriptTarget.Latest, true)
  const found: Import[] = []
  const add = (specifier: string, typeOnly: boolean, dynamic: boolean): void => {
    const path = specifier.startsWith('.') ? relative(root, resolve(root, dirname(file), specifier)).replace(/\.(js|ts)$/, '') : specifier
    found.push({ file, path, typeOnly, dynamic })
  }
  const visit = (node: ts.Node): void => {
    if (ts.isImportDeclaration(node) && ts.isStringLiteral(node.moduleSpecifier)) {
      add(node.moduleSpecifier.text, node.importClause?.isTypeOnly === true, false)
    } else if (ts.isExportDeclaration(node) && node.moduleSpecifier && ts.isStringLiteral(node.moduleSpecifier)) {
      add(node.moduleSpecifier.text, node.isTypeOnly, false)
    } else if (ts.isCallExpression(node)) {
      const [first] = node.arguments
      const called = node.expression.kind === ts.SyntaxKind.ImportKeyword || /^require(\.resolve)?$/.test(node.expression.getText())
      if (called && first && ts.isStringLiteralLike(first)) add(first.text, false, true)
    }
    ts.forEachChild(node, visit)
  }
  visit(source)
  return found
}

function none(offenders: Import[], rule: string): void {
  assert.deepEqual(offenders.map((one) => `${one.file} imports ${one.path}`), [], rule)
}

describe('rooms of lib/', () => {
  const all = sources('lib').flatMap(imports)
  const within = (path: string, ...folders: string[]): boolean => folders.some((folder) => path === folder || path.startsWith(`${folder}/`))

  it('only lib/native/addon loads the addon', () => {
    none(all.filter((one) => /node-gyp-build|\.node$/.test(one.path) && one.file !== 'lib/native/addon.ts'), 'one loader')
    none([...all, ...sources('test').flatMap(imports)].filter((one) => /^(native|build|prebuilds)\//.test(one.path)), 'no way around it')
  })

  it('lib/native imports nothing of the facade but its errors', () => {
    none(all.filter((one) =>
      within(one.file, 'lib/native') && within(one.path, 'lib') && !within(one.path, 'lib/native', 'lib/errors') && !one.typeOnly),
    'the typed surface of the addon stands below the facade')
  })

  it('the facade knows neither the plugs nor the command line', () => {
    const plugs = ['lib/onnx', 'lib/gradient', 'lib/transformers', 'lib/inspect', 'lib/cli']
    const upper = [...plugs, 'lib/allocate', 'lib/calibrate', 'lib/evaluate', 'lib/generate', 'lib/tune', 'lib/tune-checkpoint', 'lib/index']
    none(all.filter((one) => !upper.some((folder) => within(one.file.replace(/\.ts$/, ''), folder)) && within(one.path, ...plugs)),
      'lib <- plugs <- cli')
    none(all.filter((one) => !within(one.file, 'lib/cli') && within(one.path, 'lib/cli')), 'nothing imports the command line')
  })

  it('optional peers are types, or loaded when asked for', () => {
    none(all.filter((one) => /^(onnxruntime-|@huggingface\/transformers|vega)/.test(one.path) && !one.typeOnly && !one.dynamic),
      'couplet works without onnxruntime-node, @huggingface/transformers and vega')
  })

  it('every package that lib imports is a dependency', () => {
    const manifest = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as Record<'dependencies' | 'peerDependencies', Record<string, string>>
    const declared = new Set([...Object.keys(manifest.dependencies), ...Object.keys(manifest.peerDependencies)])
    const name = (path: string): string => path.split('/').slice(0, path.startsWith('@') ? 2 : 1).join('/')
    none(all.filter((one) => !within(one.path, 'lib') && !one.path.startsWith('node:') && !declared.has(name(one.path))
      && !one.path.endsWith('package.json')), 'see package.json')
  })
})

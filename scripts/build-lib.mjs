// Compiles lib/ to dist/: CommonJS and its types by tsc, then one .mjs and one .d.mts beside each entry of package.json
// that hand out the very same objects. There is one copy of couplet in a process, however it is loaded, so `instanceof`
// and the addon's handles work across require() and import.
import { rmSync, writeFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { basename, join, resolve } from 'node:path'
import ts from 'typescript'

const root = resolve(import.meta.dirname, '..')
const dist = join(root, 'dist')
const { exports } = createRequire(import.meta.url)('../package.json')

const { options, fileNames, errors } = ts.getParsedCommandLineOfConfigFile(join(root, 'tsconfig.build.json'), {}, {
  ...ts.sys,
  onUnRecoverableConfigFileDiagnostic: (diagnostic) => report([diagnostic]),
})
report(errors)
rmSync(dist, { recursive: true, force: true })
const program = ts.createProgram(fileNames, options)
report([...ts.getPreEmitDiagnostics(program), ...program.emit().diagnostics])

const checker = program.getTypeChecker()
for (const entry of Object.values(exports)) {
  if (typeof entry === 'string') continue
  const module = entry.require.default
  const source = join(root, module.replace('/dist/', '/lib/').replace(/\.js$/, '.ts'))
  const file = program.getSourceFile(source)
  if (!file) throw new Error(`package.json exports ${module}, but there is no ${source}`)
  const values = checker
    .getExportsOfModule(checker.getSymbolAtLocation(file))
    .map((symbol) => (symbol.flags & ts.SymbolFlags.Alias ? checker.getAliasedSymbol(symbol) : symbol).flags & ts.SymbolFlags.Value ? symbol.name : '')
    .filter(Boolean)
    .sort()
  const lines = values.map((name) => `export const ${name} = couplet.${name}\n`)
  writeFileSync(join(root, entry.import.default), `import couplet from './${basename(module)}'\n${lines.join('')}`)
  writeFileSync(join(root, entry.import.types), `export * from './${basename(module)}'\n`)
}

function report(diagnostics) {
  if (diagnostics.length === 0) return
  console.error(ts.formatDiagnostics(diagnostics, { getCanonicalFileName: (name) => name, getCurrentDirectory: () => root, getNewLine: () => '\n' }))
  process.exit(1)
}

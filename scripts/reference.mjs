// Writes docs/reference from the declarations in lib/ (typedoc.json says how), or with --check fails when it is not current.
import { mkdtempSync, readdirSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { root, step } from './setup.mjs'

const committed = join(root, 'docs', 'reference')
const check = process.argv.includes('--check')
const out = check ? mkdtempSync(join(tmpdir(), 'couplet-reference-')) : committed
step('typedoc', process.execPath, ['node_modules/typedoc/bin/typedoc', '--out', out, '--logLevel', 'Warn', '--treatWarningsAsErrors'])
if (check) {
  const stale = differing(committed, out)
  rmSync(out, { recursive: true })
  if (stale.length > 0) {
    console.error(`docs/reference is not what lib/ declares (${stale.join(', ')}): run npm run docs`)
    process.exit(1)
  }
}

function differing(left, right) {
  const names = new Set([...readdirSync(left), ...readdirSync(right)])
  return [...names].filter((name) => text(join(left, name)) !== text(join(right, name)))
}

function text(file) {
  try {
    return readFileSync(file, 'utf8')
  } catch {
    return undefined
  }
}

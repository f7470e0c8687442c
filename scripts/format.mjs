// `npm run format` lays out C++ by clang-format 14 and TypeScript by eslint; `--check` changes nothing and fails instead.
import { readdirSync } from 'node:fs'
import { spawnSync } from 'node:child_process'
import { join } from 'node:path'
import { root, step } from './setup.mjs'

const check = process.argv.includes('--check')
const sources = ['native', 'cuda', 'test/native', 'test/gpu', 'test/sim', 'bench/native', 'bench/cuda'].flatMap((folder) => cppFiles(join(root, folder)))
step(check ? 'clang-format' : 'formatting C++', clangFormat(), [...(check ? ['--dry-run', '-Werror'] : ['-i']), ...sources])
const eslint = ['node_modules/eslint/bin/eslint.js', '.', '--max-warnings', '0', ...(check ? [] : ['--fix'])]
step(check ? 'eslint' : 'formatting TypeScript', process.execPath, eslint)

function cppFiles(folder) {
  let names
  try {
    names = readdirSync(folder, { recursive: true })
  } catch {
    return []
  }
  return names.filter((name) => /\.(h|cc|cu)$/.test(name)).map((name) => join(folder, name))
}

// Other versions lay the same style out differently.
function clangFormat() {
  for (const program of ['clang-format-14', 'clang-format']) {
    const { status, stdout } = spawnSync(program, ['--version'], { encoding: 'utf8' })
    if (status === 0 && /version 14\./.test(stdout)) return program
  }
  console.error('clang-format 14 is needed and was not found (Debian: apt-get install clang-format-14)')
  process.exit(1)
}

// Makes a clone ready to run: dependencies, addon, dist/. `npm run demo` and `npm run bench` start with it.
// Uses nothing but Node itself until the dependencies are there.
import { spawnSync } from 'node:child_process'
import { lstatSync, readFileSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { fileURLToPath } from 'node:url'

export const root = resolve(import.meta.dirname, '..')

/** Prints a step's name and runs it; any failure ends this process. */
export function step(title, command, argv, options = {}) {
  console.log(`\n> ${title}`)
  const { status, error } = spawnSync(command, argv, { stdio: 'inherit', cwd: root, ...options })
  if (error) throw error
  if (status !== 0) {
    console.error(`failed: ${title}`)
    process.exit(status ?? 1)
  }
}

/** npm ci, unless node_modules already holds what package-lock.json asks for. */
export function installDependencies() {
  const reason = staleDependencies()
  if (!reason) return
  if (lstatSync(join(root, 'node_modules'), { throwIfNoEntry: false })?.isSymbolicLink()) {
    console.log(`node_modules is a link to another folder, left as it is although ${reason}`)
    return
  }
  // No scripts: the addon is built by the next step, where its output can be seen, and the one other script that would do
  // something is onnxruntime-node's, which fetches 300 MB of CUDA libraries that couplet does not use.
  step(`installing dependencies (${reason})`, 'npm', ['ci', '--ignore-scripts', '--prefer-offline', '--no-audit', '--no-fund'])
}

function staleDependencies() {
  let installed
  try {
    installed = JSON.parse(readFileSync(join(root, 'node_modules', '.package-lock.json'), 'utf8')).packages
  } catch {
    return 'node_modules is not there'
  }
  const wanted = JSON.parse(readFileSync(join(root, 'package-lock.json'), 'utf8')).packages
  for (const [path, { version, optional }] of Object.entries(wanted)) {
    if (path === '' || (optional && !installed[path])) continue // optional: another platform's
    if (installed[path]?.version !== version) return `${path} is not at ${version}`
  }
  return undefined
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  installDependencies()
  step('building the addon', process.execPath, ['scripts/build.mjs'])
  step('compiling lib/ to dist/', process.execPath, ['scripts/build-lib.mjs'])
}

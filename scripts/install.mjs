// `npm install`: takes the prebuilt addon when one suits this machine, else builds from source. Downloads nothing.
// `npm install --build-from-source` builds in any case.
import { spawnSync } from 'node:child_process'
import { createRequire } from 'node:module'
import { join, resolve } from 'node:path'

const root = resolve(import.meta.dirname, '..')
const load = createRequire(import.meta.url)('node-gyp-build')

if (process.env.npm_config_build_from_source || !loads()) {
  const { status } = spawnSync(process.execPath, [join(root, 'scripts', 'build.mjs')], { stdio: 'inherit' })
  if (status !== 0) {
    console.error('couplet has no prebuilt addon for this machine and could not be built: that needs CMake 3.22, make or ninja, and a C++20 compiler.')
    process.exit(1)
  }
}

function loads() {
  try {
    load(root)
    return true
  } catch (error) {
    console.log(`couplet: building from source (${error.message.split('\n')[0]})`)
    return false
  }
}

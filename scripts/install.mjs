// `npm install`: takes the prebuilt addon when one suits this machine, else builds from source. Downloads nothing.
// `npm install --build-from-source` builds in any case.
import { spawnSync } from 'node:child_process'
import { createRequire } from 'node:module'
import { join, resolve } from 'node:path'

const root = resolve(import.meta.dirname, '..')
const load = createRequire(import.meta.url)('node-gyp-build')

if (process.env.npm_config_build_from_source || !loads()) {
  // A compiler newer than ours may know a new warning; that must not keep anybody from installing. CMake remembers it for
  // the builds that follow here; tests and checks say otherwise.
  const argv = [join(root, 'scripts', 'build.mjs'), '--', '-DCOUPLET_WERROR=OFF']
  const { status } = spawnSync(process.execPath, argv, { stdio: 'inherit' })
  if (status !== 0) {
    console.error('couplet has no prebuilt addon for this machine, and building it failed.')
    console.error('A build needs CMake 3.22 or newer, make or ninja, and a C++20 compiler (Debian: apt-get install cmake ninja-build g++).')
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

// `npm run prebuild`: prebuilds/<platform>-<arch>/couplet.<libc>.node for the tarball, through prebuildify and binding.gyp.
// Run it by npm, which puts the node-gyp that prebuildify calls on PATH. A release has the CUDA backend beside the addon:
// `COUPLET_GPU=CUDA npm run prebuild`, with nvcc, for all architectures that CMakeLists.txt lists.
import { copyFileSync, existsSync, readdirSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { root, step } from './setup.mjs'

// The addon needs only node-api-headers, but node-gyp insists on Node's own headers and would fetch them; those of the
// running Node, where it has them, keep it off the network.
const prefix = dirname(dirname(process.execPath))
const env = { ...process.env }
if (existsSync(join(prefix, 'include', 'node', 'node_version.h'))) env.npm_package_config_node_gyp_nodedir ??= prefix
delete env.npm_config_nodedir // from a user's .npmrc; npm warns of it

step('building a prebuilt addon', process.execPath, ['node_modules/prebuildify/bin.js', '--napi', '--strip', '--tag-libc'], { env })

// prebuildify knows of one file.
const library = 'libcouplet_cuda.so'
const built = join(root, 'build', 'Release', library)
if (existsSync(built)) {
  const folder = join(root, 'prebuilds', `${process.platform}-${process.arch}`)
  copyFileSync(built, join(folder, library))
  step('stripping the CUDA backend', 'strip', [join(folder, library)])
  console.log(readdirSync(folder).map((name) => join(folder, name)).join('\n'))
}

// The tarball, installed as a user would: from source on a machine without CUDA, then with a prebuilt addon on one with
// neither compiler nor Python. One compilation serves both, because prebuildify runs inside the first installation.
import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { delimiter, dirname, join, resolve } from 'node:path'

const root = resolve(__dirname, '../..')
const path = (process.env.PATH ?? '').split(delimiter)

interface Manifest { readonly scripts: Readonly<Record<string, string>>; readonly files: readonly string[] }
const manifest = JSON.parse(readFileSync(join(root, 'package.json'), 'utf8')) as Manifest

/** Two clusters in one dimension; whoever prints this has loaded the addon and computed with it. */
const use = `
const { centroids } = couplet.kmeansSync(Float32Array.of(0, 2, 100, 104), { problems: 1, points: 4, channels: 1, centroids: 2, seed: 1 })
console.log(JSON.stringify([...centroids].sort((a, b) => a - b)))
`
const fromCommonJs = `const couplet = require('couplet')\n${use}`
const fromModule = `import * as couplet from 'couplet'\nimport { createRequire } from 'node:module'
if (createRequire(import.meta.url)('couplet').kmeansSync !== couplet.kmeansSync) throw new Error('two copies of couplet in one process')\n${use}`

describe('the package', function () {
  this.timeout(400_000)
  this.slow(200_000)
  let folder = ''

  before(() => {
    assert.ok(existsSync(join(root, 'dist', 'index.js')), 'dist/ is there (npm run compile)')
    folder = mkdtempSync(join(tmpdir(), 'couplet-package-'))
  })
  after(() => rmSync(folder, { recursive: true, force: true }))

  it('runs no script at installation that could download', () => {
    const hooks = ['preinstall', 'install', 'postinstall', 'prepublish', 'preprepare', 'prepare', 'postprepare']
    assert.deepEqual(hooks.flatMap((name) => manifest.scripts[name] ?? []), ['node scripts/install.mjs'])
    for (const script of manifest.files.filter((name) => name.startsWith('scripts/'))) {
      assert.doesNotMatch(readFileSync(join(root, script), 'utf8'), /https?:|\bfetch\(|node:(http|https|net|tls)|curl|wget/, script)
    }
  })

  it('installs from source without nvcc', () => {
    const tarball = pack(root)
    const app = application('source')
    // Both environments leave out npm's own variables, which `npm test` hands down and which would steer the inner npm.
    const env = environment(path.filter((entry) => !existsSync(join(entry, 'nvcc'))).join(delimiter))
    if (existsSync(join(root, 'prebuilds'))) env.npm_config_build_from_source = 'true'
    install(app, tarball, env)
    assert.ok(existsSync(join(app, 'node_modules/couplet/build/Release/couplet.node')))
    works(app, env)
  })

  it('installs a prebuilt addon with neither compiler nor Python', function () {
    const source = join(folder, 'source', 'node_modules', 'couplet')
    if (!existsSync(join(source, 'build'))) this.skip() // the test above has failed and says why
    const env = environment(path.join(delimiter))
    const headers = dirname(dirname(process.execPath)) // as scripts/prebuild.mjs
    if (existsSync(join(headers, 'include/node/node_version.h'))) env.npm_package_config_node_gyp_nodedir = headers
    const prebuildify = `"${process.execPath}" "${join(root, 'node_modules/prebuildify/bin.js')}" --napi --strip --tag-libc --quiet`
    npm(['exec', '--offline', '--call', prebuildify], source, env)
    const [platform] = readdirSync(join(source, 'prebuilds'))
    assert.equal(platform, `${process.platform}-${process.arch}`)

    const app = application('prebuilt')
    const bare = environment(bareFolder())
    install(app, pack(source), bare)
    const installed = join(app, 'node_modules', 'couplet')
    assert.ok(!existsSync(join(installed, 'build')) && !existsSync(join(installed, 'build-cmake')), 'nothing was built')
    works(app, bare)

    // Of all that couplet brings along, nothing but couplet itself has an install script.
    const lock = JSON.parse(readFileSync(join(app, 'package-lock.json'), 'utf8')) as { packages: Record<string, { hasInstallScript?: boolean }> }
    assert.deepEqual(Object.keys(lock.packages).filter((name) => lock.packages[name]?.hasInstallScript), ['node_modules/couplet'])
  })

  function application(name: string): string {
    const app = join(folder, name)
    mkdirSync(app)
    writeFileSync(join(app, 'package.json'), JSON.stringify({ name, version: '1.0.0', private: true }))
    writeFileSync(join(app, 'common.cjs'), fromCommonJs)
    writeFileSync(join(app, 'module.mjs'), fromModule)
    return app
  }

  function works(app: string, env: NodeJS.ProcessEnv): void {
    for (const script of ['common.cjs', 'module.mjs']) {
      assert.equal(execFileSync(process.execPath, [script], { cwd: app, env, encoding: 'utf8' }).trim(), '[1,102]', script)
    }
  }

  function pack(of: string): string {
    const destination = mkdtempSync(join(folder, 'tarball-'))
    npm(['pack', '--ignore-scripts', '--pack-destination', destination], of, environment(path.join(delimiter)))
    const [tarball] = readdirSync(destination)
    assert.ok(tarball)
    return join(destination, tarball)
  }

  /** A PATH on which there is Node, npm and the shell that npm starts scripts with; nothing else. */
  function bareFolder(): string {
    const bare = join(folder, 'bin')
    mkdirSync(bare)
    for (const program of ['node', 'npm', 'sh']) {
      const found = path.map((entry) => join(entry, program)).find((file) => existsSync(file))
      assert.ok(found, `${program} is on PATH`)
      symlinkSync(program === 'node' ? process.execPath : found, join(bare, program))
    }
    return bare
  }

  function environment(PATH: string): NodeJS.ProcessEnv {
    const inherited = Object.entries(process.env).filter(([name]) => !/^(npm_|NODE_OPTIONS$|COUPLET_)/.test(name))
    // Relative paths for ccache, where there is one: the temporary folder's name changes from run to run.
    return { ...Object.fromEntries(inherited), PATH, CCACHE_BASEDIR: join(folder, 'source') }
  }

  function install(app: string, tarball: string, env: NodeJS.ProcessEnv): void {
    npm(['install', '--prefer-offline', '--no-audit', '--no-fund', tarball], app, env)
  }

  function npm(argv: string[], cwd: string, env: NodeJS.ProcessEnv): void {
    try {
      execFileSync('npm', argv, { cwd, env, encoding: 'utf8', stdio: 'pipe' })
    } catch (error) {
      const { stdout, stderr } = error as { stdout?: string; stderr?: string }
      throw new Error(`npm ${argv.join(' ')} failed:\n${stdout ?? ''}${stderr ?? String(error)}`)
    }
  }
})

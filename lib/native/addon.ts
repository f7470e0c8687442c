import { existsSync, readFileSync, readdirSync } from 'node:fs'
import { dirname, join } from 'node:path'

import { CoupletError } from '../errors'
import type { CacheAddon } from './cache'
import type { CapabilitiesAddon } from './capabilities'
import type { DeviceAddon } from './device'
import type { OnnxruntimeAddon } from './onnxruntime'
import type { OperationsAddon } from './operations'

/** All that native/binding exports. */
export type Addon = CapabilitiesAddon & DeviceAddon & OperationsAddon & CacheAddon & OnnxruntimeAddon

/** The package's folder: where package.json, build/ and prebuilds/ are, seen from lib/native as from dist/native. */
export const packageRoot = dirname(dirname(__dirname))

export const packageVersion = (JSON.parse(readFileSync(join(packageRoot, 'package.json'), 'utf8')) as { version: string }).version

let loaded: Addon | undefined

/**
 * The addon, loaded on first use: build/Release, build/Debug, then prebuilds/, as node-gyp-build looks for it.
 * @throws {CoupletError} `ERR_COUPLET_ADDON`, naming every place that was tried and what was wrong there.
 */
export function addon(): Addon {
  loaded ??= load()
  return loaded
}

/* eslint-disable @typescript-eslint/no-require-imports -- only require() loads an addon, and node-gyp-build has no types */
function load(): Addon {
  let path: string | undefined
  try {
    const nodeGypBuild = require('node-gyp-build') as { resolve(folder: string): string }
    path = nodeGypBuild.resolve(packageRoot)
    const candidate = require(path) as Addon
    if (candidate.version !== packageVersion)
      throw new Error(`it was built for couplet ${candidate.version}, and this is couplet ${packageVersion}`)
    return candidate
  } catch (cause) {
    throw new CoupletError('ERR_COUPLET_ADDON', failure(path, cause), { cause })
  }
}
/* eslint-enable @typescript-eslint/no-require-imports */

function failure(path: string | undefined, cause: unknown): string {
  const reason = cause instanceof Error ? cause.message.trimEnd() : String(cause)
  const root = process.env.COUPLET_PREBUILD ?? packageRoot // node-gyp-build's own way to look elsewhere
  const attempts = [
    path === undefined ? `node-gyp-build: ${reason}` : `${path}: ${reason}`,
    ...['build/Release', 'build/Debug', join('prebuilds', `${process.platform}-${process.arch}`)].map((folder) => findings(join(root, folder))),
  ]
  return [
    `The addon of couplet ${packageVersion} could not be loaded (Node ${process.versions.node}, ${process.platform}-${process.arch}):`,
    ...attempts.map((attempt) => `  - ${attempt}`),
    'Build it with `npm rebuild couplet --build-from-source` (this needs CMake and a C++20 compiler).',
  ].join('\n')
}

function findings(path: string): string {
  if (!existsSync(path)) return `${path}: there is no such folder`
  const addons = readdirSync(path).filter((name) => name.endsWith('.node'))
  return `${path}: ${addons.length > 0 ? `has ${addons.join(', ')}` : 'has no addon'}`
}

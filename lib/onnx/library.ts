/** Finds the onnxruntime library that onnxruntime-node ships and loads. */
import { existsSync, readdirSync } from 'node:fs'
import { dirname, join, resolve } from 'node:path'

import { CoupletError } from '../errors'
import { addon } from '../native/addon'

/** The library file of each platform, as onnxruntime-node names it. */
const libraryNames: Partial<Record<NodeJS.Platform, RegExp>> = {
  linux: /^libonnxruntime\.so\.\d/,
  darwin: /^libonnxruntime\..*dylib$/,
}

const installation = 'Install it with `npm install onnxruntime-node`; couplet runs models through its library'

/** An onnxruntime that couplet can use. */
export interface Onnxruntime {
  /** The shared library, an absolute path. */
  readonly library: string
  /** As the library itself says, such as "1.30.0". */
  readonly version: string
}

/**
 * Opens the library of the installed onnxruntime-node: the copy that is loaded already if there is one, so that both share one
 * environment; else the one that couplet resolves, or the application (the current directory).
 * @param given the module that the caller imported, or the path of its folder, when it has to be that one.
 * @throws CoupletError ERR_COUPLET_ONNXRUNTIME when there is none or it is unsuitable, saying what to install.
 */
export function openOnnxruntime(given?: unknown): Onnxruntime {
  const folder = given === undefined ? findFolder() : folderOf(given)
  const library = findLibrary(folder)
  return { library, version: addon().openOnnxruntime({ library }) }
}

function findFolder(): string {
  const entry = loadedModules().find(([path]) => /[\\/]onnxruntime-node[\\/]dist[\\/]index\.js$/.test(path))?.[0]
  if (entry) return dirname(dirname(entry))
  try {
    return dirname(require.resolve('onnxruntime-node/package.json', { paths: [__dirname, process.cwd()] }))
  } catch (cause) {
    throw new CoupletError('ERR_COUPLET_ONNXRUNTIME', `onnxruntime-node is not installed. ${installation}`, { cause })
  }
}

function folderOf(given: unknown): string {
  if (typeof given === 'string') return resolve(given)
  const exported = (given as { default?: unknown } | null)?.default ?? given
  const entry = loadedModules().find(([, module]) => module?.exports === given || module?.exports === exported)?.[0]
  if (entry) return dirname(dirname(entry))
  throw new CoupletError('ERR_COUPLET_ONNXRUNTIME', 'Expected `onnxruntime` to be the module onnxruntime-node or the path of its folder')
}

function loadedModules(): [path: string, module: NodeJS.Module | undefined][] {
  return Object.entries(require.cache)
}

function findLibrary(folder: string): string {
  const pattern = libraryNames[process.platform]
  const bin = join(folder, 'bin')
  for (const abi of existsSync(bin) ? readdirSync(bin).sort().reverse() : []) {
    const libraries = join(bin, abi, process.platform, process.arch)
    const name = pattern && existsSync(libraries) && readdirSync(libraries).find((file) => pattern.test(file))
    if (name) return join(libraries, name)
  }
  throw new CoupletError('ERR_COUPLET_ONNXRUNTIME', `${folder} has no onnxruntime library for ${process.platform}-${process.arch}. ${installation}`)
}

import { statSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { unsupportedModel } from './errors'
import type { ModelSession, PretrainedModel, TransformersModule } from './types'

/** Endings that transformers.js gives to file names for each `dtype`. */
const SUFFIXES: Readonly<Record<string, string>> = {
  fp32: '', fp16: '_fp16', int8: '_int8', uint8: '_uint8', q8: '_quantized', q4: '_q4', q2: '_q2', q1: '_q1',
  q4f16: '_q4f16', q2f16: '_q2f16', q1f16: '_q1f16', bnb4: '_bnb4',
}

/**
 * The .onnx file that a model was loaded from. transformers.js keeps no trace of it but the dtype, so `name` is what
 * from_pretrained was given (a model id or a folder) or the file itself; without it, config.json's `_name_or_path` is tried.
 * Looked up as from_pretrained does: as a path, in env.localModelPath, in env.cacheDir.
 * @throws {CoupletError} ERR_COUPLET_UNSUPPORTED_MODEL when there is no such file.
 */
export function locateModel(model: PretrainedModel, session: ModelSession, name: string | undefined, env: TransformersModule['env']): string {
  const file = `model${SUFFIXES[session.config?.dtype ?? 'fp32'] ?? ''}.onnx`
  const { _name_or_path: guess } = model.config as { _name_or_path?: unknown }
  const wanted = name ?? (typeof guess === 'string' && guess !== '' ? guess : undefined)
  const tried: string[] = []
  if (wanted !== undefined) {
    const folders = [resolve(wanted), ...[env.localModelPath, env.cacheDir].flatMap((root) => (root ? [join(root, wanted)] : []))]
    for (const path of folders.flatMap((folder) => [folder, join(folder, 'onnx', file), join(folder, file)])) {
      if (statSync(path, { throwIfNoEntry: false })?.isFile()) return path
      tried.push(path)
    }
  }
  const looked = tried.length > 0 ? ` (not at ${tried.join(', ')})` : ''
  throw unsupportedModel(
    `attach() cannot tell which file the model was loaded from${looked}; pass \`path\`: the id or folder given to from_pretrained, or the .onnx file itself`,
  )
}

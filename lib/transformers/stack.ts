import { createRequire } from 'node:module'
import { CoupletError } from '../errors'
import { unsupported } from './errors'
import type { ModelSession, OnnxruntimeModule, PretrainedModel, TransformersModule } from './types'

/** The modules that a loaded model belongs to. */
export interface Stack {
  readonly transformers: TransformersModule
  readonly onnxruntime: OnnxruntimeModule
}

/**
 * Finds the copies of transformers.js and onnxruntime-node that made the model. A process can hold several: transformers.js
 * is one module for import and another for require(), and packages may bring their own.
 * @throws {CoupletError} ERR_COUPLET_UNSUPPORTED for another major version of transformers.js, or when the copy is not found;
 *   ERR_COUPLET_ONNXRUNTIME when onnxruntime-node is not found.
 */
export async function findStack(model: PretrainedModel, session: ModelSession, given: Partial<Stack>): Promise<Stack> {
  const transformers = await findTransformers(model, given.transformers)
  const major = transformers.env.version.split('.')[0]
  if (major !== '4') {
    throw unsupported(
      `attach() knows the inner workings of @huggingface/transformers 4, and this model was loaded by version ${transformers.env.version}; install version 4; or use CoupledCache`,
    )
  }
  return { transformers, onnxruntime: findOnnxruntime(session, given.onnxruntime) }
}

async function findTransformers(model: PretrainedModel, given: TransformersModule | undefined): Promise<TransformersModule> {
  const required = given ? undefined : requiredTransformers()
  if (required && model instanceof required.PreTrainedModel) return required
  const found = given ?? (await importTransformers())
  if (model instanceof found.PreTrainedModel) return found
  throw unsupported(
    'the model was not loaded by the copy of @huggingface/transformers that couplet finds; pass that module to attach() as `transformers`',
  )
}

async function importTransformers(): Promise<TransformersModule> {
  try {
    return await import('@huggingface/transformers')
  } catch (cause) {
    throw unsupported(
      'couplet does not find @huggingface/transformers; install version 4 beside it, or pass the module to attach() as `transformers`',
      { cause },
    )
  }
}

/** transformers.js as require() gives it, if the process has required it; it is never loaded a second time for this. */
function requiredTransformers(): TransformersModule | undefined {
  const path = transformersPath()
  return path === undefined ? undefined : (require.cache[path]?.exports as TransformersModule | undefined)
}

function transformersPath(): string | undefined {
  try {
    return require.resolve('@huggingface/transformers')
  } catch {
    return undefined
  }
}

/** transformers.js accepts outputs of exactly the Tensor class of the onnxruntime-node that made its session. */
function findOnnxruntime(session: ModelSession, given: OnnxruntimeModule | undefined): OnnxruntimeModule {
  const made = (candidate: OnnxruntimeModule | undefined): candidate is OnnxruntimeModule =>
    typeof candidate?.InferenceSession === 'function' && session instanceof candidate.InferenceSession
  const failures: unknown[] = []
  const attempts = given
    ? [() => given]
    : [
      () => (globalThis as Record<symbol, unknown>)[Symbol.for('onnxruntime')] as OnnxruntimeModule | undefined,
      () => createRequire(transformersPath() ?? __filename)('onnxruntime-node') as OnnxruntimeModule,
    ]
  for (const attempt of attempts) {
    try {
      const candidate = attempt()
      if (made(candidate)) return candidate
    } catch (error) {
      failures.push(error)
    }
  }
  throw new CoupletError(
    'ERR_COUPLET_ONNXRUNTIME',
    "the model's session was not made by the onnxruntime-node that couplet finds; pass that module to attach() as `onnxruntime`",
    { cause: failures[0] },
  )
}

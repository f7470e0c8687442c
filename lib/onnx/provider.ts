/** Which of onnxruntime's execution providers runs the nodes around couplet's attention. */
import { existsSync } from 'node:fs'
import { dirname, join } from 'node:path'

import { CoupletError, throwExpected } from '../errors'
import { addon } from '../native/addon'

/** 'auto' is 'cuda' where attention runs on CUDA and onnxruntime can be had there, else 'cpu'; what is asked for by name and not there is an error. */
export type ProviderName = 'cpu' | 'cuda' | 'auto'

/** What runs the nodes around couplet's attention, which stays with the CPU provider. */
export interface ExecutionProvider {
  readonly name: Exclude<ProviderName, 'auto'>
  /** Why this one and not the other. */
  readonly reason: string
}

/** What the choice depends on. */
export interface ProviderSituation {
  wish: ProviderName
  /** Where attention runs, as the cache says. */
  device: string
  /** Why this onnxruntime has no CUDA provider; undefined when it has one. */
  reasonAgainstCuda: () => string | undefined
}

/** Libraries that a build with CUDA opens when it is asked for it; onnxruntime-node downloads them when it is installed. */
const cudaLibraries = ['libonnxruntime_providers_shared.so', 'libonnxruntime_providers_cuda.so']

export function requireProvider(value: unknown): asserts value is ProviderName {
  if (!['cpu', 'cuda', 'auto'].includes(value as string)) throwExpected('"cpu", "cuda" or "auto"', 'executionProvider', value)
}

/**
 * Why an onnxruntime library cannot be asked for CUDA, from what it lists and what lies beside it. It may still refuse: for want of CUDA's
 * own libraries, say.
 * @param listed names of execution providers, as onnxruntime's GetAvailableProviders gives them.
 */
export function reasonAgainstCuda(library: string, listed: readonly string[] = addon().listProviders({ library })): string | undefined {
  if (!listed.includes('CUDAExecutionProvider')) return `this onnxruntime was built without CUDA (it lists ${listed.join(', ')})`
  const missing = cudaLibraries.find((name) => !existsSync(join(dirname(library), name)))
  return missing && `${missing} is not beside ${library}; installing onnxruntime-node with its scripts on downloads it`
}

/**
 * Makes a session on the provider that is wished for. `create` is asked for CUDA first where that is the choice, and under 'auto' for the CPU when
 * it refuses.
 * @throws {CoupletError} `ERR_COUPLET_ONNXRUNTIME` where 'cuda' was named and cannot be had, and whatever `create` throws for the CPU.
 */
export async function createOnProvider<Session>(
  { wish, device, reasonAgainstCuda }: ProviderSituation,
  create: (provider: ExecutionProvider['name']) => Promise<Session>,
): Promise<{ session: Session; provider: ExecutionProvider }> {
  const onCpu = async (reason: string) => ({ session: await create('cpu'), provider: { name: 'cpu', reason } as const })
  if (wish === 'cpu') return onCpu('asked for')
  if (wish === 'auto' && device !== 'cuda') return onCpu(`attention runs on the device '${device}'`)
  const missing = reasonAgainstCuda()
  if (missing !== undefined) {
    if (wish === 'auto') return onCpu(missing)
    throw new CoupletError('ERR_COUPLET_ONNXRUNTIME', `The CUDA execution provider cannot be had: ${missing}`)
  }
  try {
    return { session: await create('cuda'), provider: { name: 'cuda', reason: wish === 'auto' ? 'attention runs there too' : 'asked for' } }
  } catch (error) {
    if (wish === 'cuda') throw error
    return onCpu(`the CUDA execution provider refused: ${(error as Error).message}`)
  }
}

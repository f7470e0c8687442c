import { CoupletError, typeError } from '../errors'

/** A feed or an option that is not what it should be. */
export function invalid(name: string, expected: string, received: string): TypeError {
  return typeError(`Expected ${expected} for \`${name}\` but received ${received}`)
}

/** What the plug cannot do, why, and what to use instead. */
export function unsupported(reason: string, options?: ErrorOptions): CoupletError {
  return new CoupletError('ERR_COUPLET_UNSUPPORTED', reason, options)
}

/** A model that the plug cannot run, why, and what to use instead. */
export function unsupportedModel(reason: string): CoupletError {
  return new CoupletError('ERR_COUPLET_UNSUPPORTED_MODEL', reason)
}

export function isCacheFull(error: unknown): boolean {
  return error instanceof CoupletError && error.code === 'ERR_COUPLET_CACHE_FULL'
}

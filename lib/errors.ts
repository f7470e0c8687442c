/** The codes of couplet's own errors. A cancelled call rejects with an AbortError (`ABORT_ERR`) instead. */
export type CoupletErrorCode =
  | 'ERR_COUPLET_INVALID_ARGUMENT'
  | 'ERR_COUPLET_NOT_FINITE'
  | 'ERR_COUPLET_OUT_OF_MEMORY'
  | 'ERR_COUPLET_CACHE_FULL'
  | 'ERR_COUPLET_UNSUPPORTED'
  | 'ERR_COUPLET_UNSUPPORTED_MODEL'
  | 'ERR_COUPLET_BACKEND_UNAVAILABLE'
  | 'ERR_COUPLET_DEVICE'
  | 'ERR_COUPLET_BUSY'
  | 'ERR_COUPLET_DISPOSED'
  | 'ERR_COUPLET_CODEBOOK_INVALID'
  | 'ERR_COUPLET_CODEBOOK_MISMATCH'
  | 'ERR_COUPLET_ONNXRUNTIME'
  | 'ERR_COUPLET_MISSING_PACKAGE'
  | 'ERR_COUPLET_ADDON'
  | 'ERR_COUPLET_INTERNAL'

/** Where in the data an error lies; a member is absent when it does not apply. */
export interface ErrorPlace {
  layer?: number
  kvHead?: number
  token?: number
  channel?: number
  /** Of kmeans: the problem, and the point in it. */
  problem?: number
  point?: number
  /** The number that a device, the operating system or onnxruntime gave the error. */
  nativeCode?: number
}

/**
 * What couplet throws and rejects with.
 *
 * Invalid arguments are `TypeError`s (the wrong kind of value) and `RangeError`s (a value out of range), made by the addon as
 * often as by the facade; `error instanceof CoupletError` is true for these too, because it asks for the `code`, not for
 * the class: every error whose code starts with `ERR_COUPLET_` is one.
 */
export class CoupletError extends Error {
  readonly code: CoupletErrorCode
  declare readonly layer?: number
  declare readonly kvHead?: number
  declare readonly token?: number
  declare readonly channel?: number
  declare readonly problem?: number
  declare readonly point?: number
  declare readonly nativeCode?: number

  constructor(code: CoupletErrorCode, message: string, options: ErrorOptions & ErrorPlace = {}) {
    const { cause, ...place } = options
    super(message, cause === undefined ? undefined : { cause })
    this.code = code
    Object.assign(this, place)
  }

  static override [Symbol.hasInstance](value: unknown): value is CoupletError {
    return codeOf(value)?.startsWith('ERR_COUPLET_') ?? false
  }
}

Object.defineProperty(CoupletError.prototype, 'name', { value: 'CoupletError', writable: true, configurable: true })

/** The `code` of a thrown value, if it has one. */
export function codeOf(error: unknown): string | undefined {
  return typeof error === 'object' && error !== null && 'code' in error && typeof error.code === 'string' ? error.code : undefined
}

/** The wrong kind of value. */
export function typeError(message: string): TypeError & { code: CoupletErrorCode } {
  return Object.assign(new TypeError(message), { code: 'ERR_COUPLET_INVALID_ARGUMENT' as const })
}

/** The right kind of value, out of range. */
export function rangeError(message: string): RangeError & { code: CoupletErrorCode } {
  return Object.assign(new RangeError(message), { code: 'ERR_COUPLET_INVALID_ARGUMENT' as const })
}

/** Thrown by everything that is used after its dispose(). */
export function disposedError(what: string): CoupletError {
  return new CoupletError('ERR_COUPLET_DISPOSED', `This ${what} has been disposed`)
}

/** Throws "Expected X for `name` but received Y": a TypeError, or a RangeError when `received` is of the right kind and only out of range. */
export function throwExpected(expected: string, name: string, received: unknown, rightKind = false): never {
  const message = `Expected ${expected} for \`${name}\` but received ${describe(received)}`
  throw rightKind ? rangeError(message) : typeError(message)
}

/** The Y of that sentence: "the string", "a Float32Array of 12 elements". The addon's describe() says the same. */
export function describe(value: unknown): string {
  if (typeof value === 'string') return JSON.stringify(value.length > 40 ? `${value.slice(0, 40)}...` : value)
  if (typeof value === 'number' || typeof value === 'boolean' || typeof value === 'undefined') return String(value)
  if (typeof value !== 'object') return `a ${typeof value}`
  if (value === null) return 'null'
  if (Array.isArray(value)) return 'an array'
  if (value instanceof ArrayBuffer) return 'an ArrayBuffer'
  if (!ArrayBuffer.isView(value) || value instanceof DataView) return 'an object'
  const { length } = value as unknown as { length: number }
  const kind = Object.prototype.toString.call(value).slice(8, -1)
  const extent = isDetached(value.buffer) ? 'whose buffer is detached' : `of ${length} element${length === 1 ? '' : 's'}`
  return `${kind.startsWith('I') ? 'an' : 'a'} ${kind} ${extent}`
}

export function isDetached(buffer: ArrayBufferLike): boolean {
  try {
    new Uint8Array(buffer) // the one test that Node 20 has: ArrayBuffer.prototype.detached is newer
    return false
  } catch {
    return true
  }
}

/**
 * What the facade asks of arguments before it allocates results: counts, and typed arrays that reach far enough.
 * native/binding reads every argument again (values.h), in the same words, because memory safety is decided there.
 */
import { CoupletError, describe, isDetached, rangeError, throwExpected, typeError } from './errors'
import { requireSignal } from './native/call'

export type Float16ArrayLike = ArrayBufferView & { readonly length: number; readonly [Symbol.toStringTag]: 'Float16Array' }

const int32Max = 2 ** 31 - 1

export function requireObject(value: unknown, name: string): asserts value is object {
  if (typeof value !== 'object' || value === null || Array.isArray(value) || ArrayBuffer.isView(value)) throwExpected('an object', name, value)
}

export function requireInteger(value: unknown, name: string, least: number, most = int32Max): asserts value is number {
  if (!Number.isInteger(value) || (value as number) < least || (value as number) > most)
    throwExpected(`an integer from ${least} to ${most}`, name, value, typeof value === 'number')
}

export function requireBoolean(value: unknown, name: string): asserts value is boolean {
  if (typeof value !== 'boolean') throwExpected('a boolean', name, value)
}

/** An integer of 64 bits, of which a number holds 53; more of a bigint are dropped. */
export function requireSeed(value: unknown, name: string): asserts value is number | bigint {
  if (typeof value !== 'bigint') requireInteger(value, name, 0, Number.MAX_SAFE_INTEGER)
}

export function requireList(value: unknown, name: string): asserts value is readonly unknown[] {
  if (!Array.isArray(value)) throwExpected('an array', name, value)
}

export function requireText(value: unknown, name: string): asserts value is string {
  if (typeof value !== 'string') throwExpected('a string', name, value)
}

/** What every call that reports and can be cancelled takes. */
export function requireCallOptions({ signal, onProgress }: { signal?: unknown; onProgress?: unknown }): void {
  requireSignal(signal)
  if (onProgress !== undefined && typeof onProgress !== 'function') throwExpected('a function', 'onProgress', onProgress)
}

type TypedArray = ArrayBufferView & { readonly length: number }

/** A typed array's class, as far as it is used here. */
export interface TypedArrayClass<Kind> {
  new (length: number): Kind
  readonly name: string
}

/** instanceof, but also for arrays of another realm (a vm context, as jest uses), and for classes this Node does not have. */
export function isArray<Kind extends TypedArray>(value: unknown, kind: TypedArrayClass<Kind> | { name: string }): value is Kind {
  return ArrayBuffer.isView(value) && (value as unknown as { [Symbol.toStringTag]: string })[Symbol.toStringTag] === kind.name
}

/** Refuses another class and fewer elements than `leastLength`; the addon also refuses buffers that can change their size. */
export function requireArray<Kind extends TypedArray>(
  value: unknown,
  name: string,
  kind: TypedArrayClass<Kind>,
  leastLength: number,
): asserts value is Kind {
  const article = kind.name.startsWith('I') ? 'an' : 'a'
  if (!isArray(value, kind)) throw typeError(`Expected ${article} ${kind.name} for \`${name}\` but received ${describe(value)}`)
  if (value.length < leastLength) throwExpected(`${article} ${kind.name} of ${leastLength} or more elements`, name, value, true)
}

/** Throws for what is no array of exactly `elements`, which `shape` explains: a RangeError for an array of another length. */
export function throwElements(kind: string, elements: number, shape: string, name: string, value: unknown): never {
  const message = `Expected a ${kind} of ${elements} elements (${shape}) for \`${name}\` but received ${describe(value)}`
  throw ArrayBuffer.isView(value) ? rangeError(message) : typeError(message)
}

export function requireArrayOfAnyKind(value: unknown, name: string): asserts value is TypedArray {
  if (!ArrayBuffer.isView(value) || value instanceof DataView) throwExpected('a typed array', name, value)
  requireAttached(value as TypedArray, name)
}

/** Refuses an array whose buffer was transferred away: its length is 0, but a view of its buffer throws without a code. */
export function requireAttached(array: TypedArray, name: string): void {
  if (isDetached(array.buffer)) throwExpected('an array whose buffer is still its own', name, array, true)
}

/** A zero-filled typed array for a result, or the caller's own after a check. */
export function resultArray<Kind extends TypedArray>(
  out: Kind | undefined,
  kind: TypedArrayClass<Kind>,
  length: number,
): Kind {
  if (out !== undefined) {
    requireArray(out, 'out', kind, length)
    return out
  }
  try {
    return new kind(length)
  } catch (cause) {
    throw new CoupletError('ERR_COUPLET_OUT_OF_MEMORY', `There is no memory for a result of ${length} elements`, { cause })
  }
}

/** Elements that a strided view reaches: 0 when a count is 0, else 1 + the sum of (count - 1) * stride. */
export function extent(...axes: { count: number; stride: number }[]): number {
  return axes.some(({ count }) => count === 0) ? 0 : axes.reduce((last, { count, stride }) => last + (count - 1) * stride, 1)
}

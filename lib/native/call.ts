/** How the facade calls what native/binding/worker.h runs. */
import { codeOf, throwExpected } from '../errors'

/**
 * Starts a call that an AbortSignal can stop: `start` hands `cancel` on to the addon, which looks at it while it works.
 * Rejects with `signal.reason` when the signal stopped it; a signal that comes too late changes nothing.
 */
export async function abortable<Result>(
  signal: AbortSignal | undefined,
  start: (cancel: Int32Array | undefined) => Promise<Result>,
): Promise<Result> {
  requireSignal(signal)
  if (signal === undefined) return start(undefined)
  signal.throwIfAborted()
  const cancel = new Int32Array(new SharedArrayBuffer(4)) // shared, so that nobody can detach it under the call
  const stop = (): void => {
    Atomics.store(cancel, 0, 1)
  }
  signal.addEventListener('abort', stop, { once: true })
  try {
    return await start(cancel)
  } catch (error) {
    if (signal.aborted && codeOf(error) === 'ABORT_ERR') throw signal.reason
    throw error
  } finally {
    signal.removeEventListener('abort', stop)
  }
}

export function requireSignal(signal: unknown): asserts signal is AbortSignal | undefined {
  // Also one of another realm; not one of before 2022, without a reason.
  const isSignal = typeof signal === 'object' && signal !== null && 'throwIfAborted' in signal && 'addEventListener' in signal
  if (signal !== undefined && !isSignal) throwExpected('an AbortSignal', 'signal', signal)
}

/** Sync forms block the thread on which a signal or a progress report would arrive: asking for one is a mistake. */
export function refusePromiseOptions(options: object): void {
  const { signal, onProgress } = options as Record<string, unknown>
  if (signal !== undefined) throwExpected('no signal (a Sync call cannot be interrupted)', 'signal', signal)
  if (onProgress !== undefined) throwExpected('no function (a Sync call blocks the thread that would run it)', 'onProgress', onProgress)
}

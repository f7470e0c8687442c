import { availableParallelism } from 'node:os'

import { disposedError } from '../errors'
import { addon } from '../native/addon'
import { abortable } from '../native/call'
import type { NativeFeed, NativeOutput, NativeSession } from '../native/onnxruntime'
import { openOnnxruntime } from '../onnx/library'
import type { Model } from '../onnx/proto'
import { encodeModel } from '../onnx/proto'

export interface GraphSessionOptions {
  /** Where the model's external data lies. */
  folder?: string
  /** Default 0, all cores. */
  threads?: number
}

/** An onnxruntime session over a plain graph: no attention of couplet's in it, and no state. Runs leave the JS thread. */
export class GraphSession {
  readonly #outputNames: readonly string[]
  #session: NativeSession | undefined

  private constructor(session: NativeSession, outputNames: readonly string[]) {
    this.#session = session
    this.#outputNames = outputNames
  }

  /** @throws {CoupletError} `ERR_COUPLET_ONNXRUNTIME` when onnxruntime-node is missing, unsuitable or refuses the graph. */
  static async create(model: Model, { folder = '', threads = 0 }: GraphSessionOptions = {}): Promise<GraphSession> {
    const { library } = openOnnxruntime()
    const session = await addon().createSession({ library, model: encodeModel(model), folder, threads: threads === 0 ? availableParallelism() : threads })
    return new GraphSession(session, model.graph.output.map(({ name }) => name))
  }

  /** Outputs of the graph by name: all, or those asked for. */
  async run(feeds: NativeFeed[], signal?: AbortSignal, names = this.#outputNames): Promise<Map<string, NativeOutput>> {
    const session = this.#session
    if (session === undefined) throw disposedError('session')
    const outputs = await abortable(signal, (cancel) => {
      const interrupt = (): void => { if (cancel) addon().interruptSession(session, cancel) }
      signal?.addEventListener('abort', interrupt, { once: true })
      return addon()
        .runSession({ session, feeds, outputs: [...names], logits: '', lastColumn: false, cancel })
        .finally(() => signal?.removeEventListener('abort', interrupt))
    })
    return new Map(outputs.map((output) => [output.name, output]))
  }

  dispose(): void {
    if (this.#session === undefined) return
    addon().disposeSession(this.#session)
    this.#session = undefined
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}

import { GraphBuilder } from '../gradient/builder'
import { expandAttention, rowsName, sides } from '../gradient/attention'
import type { Side } from '../gradient/attention'
import { divergenceFeeds, divergenceLoss } from '../gradient/loss'
import { decoderFeeds, floatsOf, lossName } from '../gradient/model'
import { GraphSession } from '../gradient/session'
import type { NativeFeed } from '../native/onnxruntime'
import type { ModelShape } from '../onnx/decoder'
import { openDecoder } from '../onnx/decoder'
import { removeUnused } from '../onnx/graph'
import { DataType } from '../onnx/proto'

export interface DivergenceModelOptions {
  /** Tokens in full precision, as evaluate has them. */
  sinks: number
  window: number
  threads?: number | undefined
}

/** Texts of equally many tokens, and the logits of the model in full precision: float32 [texts][tokens][vocabulary]. */
export interface ReferenceBatch {
  readonly texts: readonly (readonly number[])[]
  readonly logits: Float32Array
}

/** What is added to one side of a layer wherever a query reads it from codes: float32 [texts][tokens][kvHeads][headDim]. */
export interface RowErrors {
  layer: number
  side: Side
  errors: Float32Array
}

const errorsName = (layer: number, side: Side): string => `${rowsName(layer, side)}.errors`

/**
 * A decoder whose coded keys and values are the exact ones plus errors that are given: what the KL divergence from its full-precision
 * logits is when one side of a layer alone is coded. Runs whole texts, so that memory grows with queryHeads * tokens^2.
 */
export class DivergenceModel {
  readonly shape: ModelShape
  readonly #session: GraphSession
  readonly #feeds: (batch: ReferenceBatch) => NativeFeed[]

  private constructor(shape: ModelShape, session: GraphSession, feeds: (batch: ReferenceBatch) => NativeFeed[]) {
    this.shape = shape
    this.#session = session
    this.#feeds = feeds
  }

  static async load(path: string, { sinks, window, threads = 0 }: DivergenceModelOptions): Promise<DivergenceModel> {
    const decoder = await openDecoder(path)
    const { graph, folder, layers, shape } = decoder
    const coded = (build: GraphBuilder, layer: number, side: Side, rows: string): string => {
      const name = errorsName(layer, side)
      return build.add('Add', [rows, build.input(name, DataType.float, [0, 1, 2, 3].map((axis) => `${name}.${axis}`))])
    }
    const attentionFeeds = expandAttention(graph, layers, { coded, sinks, window })
    const build = new GraphBuilder(graph, 'couplet.loss')
    const loss = divergenceLoss(build, 'logits')
    graph.graph.output = []
    build.output(loss.value, lossName)
    graph.graph.node.push(...build.take())
    removeUnused(graph)
    return new DivergenceModel(shape, await GraphSession.create(graph, { folder, threads }), (batch) => {
      const { texts, logits } = batch
      const tokens = texts[0]!.length
      const dims = [texts.length, tokens, logits.length / tokens / texts.length]
      return [...decoderFeeds(decoder, texts), ...attentionFeeds(tokens), ...divergenceFeeds(logits, dims)]
    })
  }

  /** Mean KL divergence over all tokens, in natural logarithms, when these sides have errors and all others have none. */
  async run(batch: ReferenceBatch, given: readonly RowErrors[], signal?: AbortSignal): Promise<number> {
    const { layers, kvHeads, headDim } = this.shape
    const none: Pick<NativeFeed, 'dims' | 'data'> = { dims: [1, 1, 1, 1], data: new Float32Array(1) }
    const dims = [batch.texts.length, batch.texts[0]!.length, kvHeads, headDim]
    const feeds = Array.from({ length: layers }, (_, layer) => sides.map((side): NativeFeed => {
      const found = given.find((one) => one.layer === layer && one.side === side)
      return { name: errorsName(layer, side), type: DataType.float, ...(found ? { dims, data: found.errors } : none) }
    })).flat()
    const outputs = await this.#session.run([...this.#feeds(batch), ...feeds], signal)
    return floatsOf(outputs, lossName)[0]!
  }

  dispose(): void {
    this.#session.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}

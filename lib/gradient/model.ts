import { CoupletError, rangeError } from '../errors'
import { requireInteger, requireObject } from '../arguments'
import type { NativeFeed, NativeOutput } from '../native/onnxruntime'
import type { Decoder, ModelShape } from '../onnx/decoder'
import { openDecoder } from '../onnx/decoder'
import { feedsOf } from '../onnx/feeds'
import { removeUnused } from '../onnx/graph'
import type { AttentionLayer } from '../onnx/rewrite'
import { expandAttention, rowsName, sides } from './attention'
import type { Side } from './attention'
import { GraphBuilder } from './builder'
import { differentiate } from './differentiate'
import { crossEntropyFeeds, crossEntropyLoss } from './loss'
import { GraphSession } from './session'

export interface GradientModelOptions {
  /** Threads of onnxruntime's operators; default all cores. */
  threads?: number
}

/** What one text gives: float32 [tokens][kvHeads][headDim] for each layer and side. */
export interface TextGradients {
  /** Before rotary embedding. */
  readonly rows: Record<Side, Float32Array[]>
  /** Of the loss with respect to `rows`. */
  readonly gradients: Record<Side, Float32Array[]>
  /** Sum of the cross-entropies of tokens 1 .. tokens - 1, in natural logarithms. */
  readonly loss: number
}

/** Name of the gradient of a layer's keys or values in the graph. */
export const gradientName = (layer: number, side: Side): string => `${rowsName(layer, side)}.gradient`

/** The output that is the value of the loss. */
export const lossName = 'couplet.loss'

/**
 * A decoder together with the gradient of its loss, one graph in an onnxruntime session of its own: attention is expanded into
 * plain operators, and the nodes of a reverse pass are added (docs/algorithm.md). A text is run at once, so memory grows with
 * its length: every activation of the text, and queryHeads * tokens^2 probabilities for each layer.
 */
export class GradientModel {
  readonly shape: ModelShape
  readonly #fingerprint: () => Promise<string>
  readonly #session: GraphSession
  readonly #feeds: (tokens: readonly number[]) => NativeFeed[]

  private constructor(decoder: Decoder, session: GraphSession, feeds: (tokens: readonly number[]) => NativeFeed[]) {
    this.shape = decoder.shape
    this.#fingerprint = decoder.fingerprint
    this.#session = session
    this.#feeds = feeds
  }

  /**
   * @param path an .onnx file, or a folder that has onnx/model.onnx or model.onnx.
   * @throws {CoupletError} `ERR_COUPLET_UNSUPPORTED_MODEL` naming the node through which couplet cannot compute a gradient
   */
  static async load(path: string, options: GradientModelOptions = {}): Promise<GradientModel> {
    requireObject(options, 'options')
    const { threads = 0 } = options
    requireInteger(threads, 'threads', 0, 256)
    const decoder = await openDecoder(path)
    const feeds = await addGradients(decoder)
    return new GradientModel(decoder, await GraphSession.create(decoder.graph, { folder: decoder.folder, threads }), feeds)
  }

  /** "sha256:..." over the graph and all its weights. */
  fingerprint(): Promise<string> {
    return this.#fingerprint()
  }

  /**
   * Runs a text of its own, at least two tokens.
   * @throws {RangeError} `ERR_COUPLET_INVALID_ARGUMENT` for a text longer than the model's positions
   */
  async run(tokens: readonly number[], signal?: AbortSignal): Promise<TextGradients> {
    const outputs = await this.#session.run(this.#feeds(tokens), signal)
    const layers = (side: Side, name: typeof rowsName) => Array.from({ length: this.shape.layers }, (_, layer) => floatsOf(outputs, name(layer, side)))
    const collect = (name: typeof rowsName) => ({ key: layers('key', name), value: layers('value', name) })
    return { rows: collect(rowsName), gradients: collect(gradientName), loss: floatsOf(outputs, lossName)[0]! }
  }

  dispose(): void {
    this.#session.dispose()
  }

  [Symbol.dispose](): void {
    this.dispose()
  }
}

/** Adds loss and gradients to a decoder's graph, in place; returns what makes the feeds of a text. */
export async function addGradients(decoder: Decoder): Promise<(tokens: readonly number[]) => NativeFeed[]> {
  const { graph, folder, layers } = decoder
  const attentionFeeds = expandAttention(graph, layers)
  const build = new GraphBuilder(graph, 'couplet.loss')
  const loss = crossEntropyLoss(build, 'logits')
  graph.graph.node.push(...build.take())
  const targets = layers.flatMap((_, layer) => sides.map((side) => rowsName(layer, side)))
  const gradients = await differentiate(graph, { seeds: new Map([['logits', loss.gradient]]), targets, folder })
  graph.graph.output = []
  build.output(loss.value, lossName)
  for (const [layer] of layers.entries()) {
    for (const side of sides) {
      build.declare(rowsName(layer, side))
      build.output(gradients.get(rowsName(layer, side))!, gradientName(layer, side))
    }
  }
  graph.graph.node.push(...build.take())
  removeUnused(graph)
  return (tokens) => [...decoderFeeds(decoder, [tokens]), ...attentionFeeds(tokens.length), ...crossEntropyFeeds([tokens])]
}

/** Feeds of a decoder's own inputs for fresh texts of equally many tokens. */
export function decoderFeeds({ graph, measuredPasts, inputNames, shape, layers }: Decoder, rows: readonly (readonly number[])[]): NativeFeed[] {
  const tokens = rows[0]?.length ?? 0
  const positions = mostPositions(layers)
  if (tokens > positions) throw rangeError(`Expected a text of at most ${positions} tokens, the positions of the model, but received one of ${tokens}`)
  const used = new Set(graph.graph.input.map(({ name }) => name))
  const names = inputNames.filter((name) => used.has(name))
  const pasts = measuredPasts.filter(({ name }) => used.has(name))
  return feedsOf({ names, measuredPasts: pasts, kvHeads: shape.kvHeads }, rows.map((row) => ({ past: 0, tokens: row })), false)
}

/** The positions that all rotary tables have. */
function mostPositions(layers: readonly AttentionLayer[]): number {
  return Math.min(...layers.map(({ rotary }) => rotary?.positions ?? Infinity))
}

export function floatsOf(outputs: ReadonlyMap<string, NativeOutput>, name: string): Float32Array {
  const output = outputs.get(name)
  if (output === undefined) throw new CoupletError('ERR_COUPLET_INTERNAL', `The gradient graph has no output "${name}"`)
  return new Float32Array(output.data)
}

/**
 * Attention of evaluation: every token has two versions of its key and value, exact and as codes would give them back, and a query
 * reads one of the two. Sinks and the window of the query are exact, as in the product (`prefill: 'coded'`).
 */
import { create } from '@bufbuild/protobuf'
import * as ort from 'onnxruntime-node'
import { AttributeType, createNode, encodeModel, encodeTensor, GraphSchema, ModelSchema, OperatorSetSchema, ValueInfoSchema } from '../../lib/onnx/proto'
import type { AttentionLayer } from '../../lib/onnx/rewrite'
import { Rotation } from '../../lib/transformers/rotation'
import type { Rows } from './layers'

/** Tokens kept in full precision; the window counts the query's own token. */
export interface Kept {
  readonly sinks: number
  readonly window: number
}

export class TwoVersionAttention {
  readonly #sessions = new Map<string, Promise<ort.InferenceSession>>()
  readonly #masks = new Map<string, ort.Tensor>()
  readonly #rotations = new Map<AttentionLayer, Rotation>()

  constructor(readonly threads = 1) {}

  /** Rotates rows in place, or takes the rotation back; row i of the tokens stands at position `first` + i. */
  rotate(layer: AttentionLayer, rows: Rows, first: number, back = false): void {
    if (!layer.rotary) return
    let rotation = this.#rotations.get(layer)
    if (!rotation) this.#rotations.set(layer, (rotation = new Rotation(layer.rotary, layer.headDim)))
    if (back) rotation.undo(rows.data, rows, first)
    else rotation.apply(rows.data, rows, first)
  }

  /**
   * Queries and keys rotated. `coded` has the same tokens; undefined: everything is exact.
   * @returns float32 [queryHeads][tokens][channels]
   */
  async attend(layer: AttentionLayer, query: Rows, exact: { key: Rows; value: Rows }, coded?: { key: Rows; value: Rows } & Kept): Promise<Float32Array> {
    if (layer.headSinks) throw new Error('A model with learned attention sinks is not evaluated here')
    const { tokens, channels } = query
    const { kvHeads, queryHeads } = layer
    const kept = coded ?? { sinks: 0, window: Infinity }
    const versions = !coded ? [exact] : kept.sinks === 0 && kept.window === 0 ? [coded] : [exact, coded]
    const stack = (side: 'key' | 'value') => new ort.Tensor('float32', interleaveVersions(versions.map((version) => version[side])),
      [kvHeads, 1, versions.length * tokens, channels])
    const session = await this.#session(layer)
    const { outputs } = await session.run({
      queries: new ort.Tensor('float32', query.data, [kvHeads, queryHeads / kvHeads, tokens, channels]),
      keys: stack('key'),
      values: stack('value'),
      mask: this.#mask(tokens, kept, layer.localWindow),
    })
    return outputs!.data as Float32Array
  }

  async release(): Promise<void> {
    for (const session of this.#sessions.values()) await (await session).release()
  }

  #session({ scale, softcap, headDim }: AttentionLayer): Promise<ort.InferenceSession> {
    const factor = scale === 0 ? 1 / Math.sqrt(headDim) : scale
    const name = `${factor} ${softcap}`
    let session = this.#sessions.get(name)
    if (!session) {
      const options = { intraOpNumThreads: this.threads, interOpNumThreads: 1, logSeverityLevel: 3 as const }
      this.#sessions.set(name, (session = ort.InferenceSession.create(attentionGraph(factor, softcap), options)))
    }
    return session
  }

  /** float32 [tokens][tokens, or twice that: exact, then coded]: 0 where a query reads a key, else -infinity. */
  #mask(tokens: number, { sinks, window }: Kept, localWindow: number): ort.Tensor {
    const name = `${tokens} ${sinks} ${window} ${localWindow}`
    const known = this.#masks.get(name)
    if (known) return known
    const single = window === Infinity || (sinks === 0 && window === 0)
    const width = single ? tokens : 2 * tokens
    const mask = new Float32Array(tokens * width).fill(-Infinity)
    for (let query = 0; query < tokens; query++) {
      for (let token = localWindow > 0 ? Math.max(0, query - localWindow + 1) : 0; token <= query; token++) {
        const isExact = token < sinks || query - token < window
        mask[query * width + (single || isExact ? token : tokens + token)] = 0
      }
    }
    const tensor = new ort.Tensor('float32', mask, [tokens, width])
    this.#masks.set(name, tensor)
    return tensor
  }
}

/** [heads][tokens][channels] of each version to [heads][version][tokens][channels]. */
function interleaveVersions(versions: Rows[]): Float32Array {
  const [first, ...others] = versions as [Rows, ...Rows[]]
  if (others.length === 0) return first.data
  const size = first.tokens * first.channels
  const out = new Float32Array(versions.length * first.data.length)
  for (let head = 0; head < first.heads; head++) {
    versions.forEach(({ data }, version) => { out.set(data.subarray(head * size, (head + 1) * size), (head * versions.length + version) * size) })
  }
  return out
}

/** outputs = softmax(cap(scale * queries keys^T) + mask) values, heads first. */
function attentionGraph(scale: number, softcap: number): Uint8Array {
  const scalar = (name: string, value: number): [string, Uint8Array] =>
    [name, encodeTensor({ name, dims: [], dataType: 1, rawData: new Uint8Array(Float32Array.of(value).buffer) })]
  const node = (opType: string, input: string[], output: string) => createNode({ name: output, opType, input, output: [output] })
  const transpose = node('Transpose', ['keys'], 'columns')
  transpose.attribute = createNode({ attribute: [{ name: 'perm', ints: [0n, 1n, 3n, 2n], type: AttributeType.ints }] }).attribute
  const capped = softcap > 0
    ? [node('Mul', ['products', 'inner'], 'scaled'), node('Tanh', ['scaled'], 'bounded'), node('Mul', ['bounded', 'cap'], 'logits')]
    : [node('Mul', ['products', 'inner'], 'logits')]
  const softmax = node('Softmax', ['masked'], 'probabilities') // axis -1 since version 13
  const graph = create(GraphSchema, {
    name: 'attention',
    node: [
      transpose, node('MatMul', ['queries', 'columns'], 'products'), ...capped, node('Add', ['logits', 'mask'], 'masked'), softmax,
      node('MatMul', ['probabilities', 'values'], 'outputs'),
    ],
    input: ['queries', 'keys', 'values', 'mask'].map((name) => create(ValueInfoSchema, { name, type: { tensorType: { elemType: 1 } } })),
    output: [create(ValueInfoSchema, { name: 'outputs' })],
  })
  const head = create(ModelSchema, { irVersion: 8n, opsetImport: [create(OperatorSetSchema, { domain: '', version: 17n })] })
  const constants = softcap > 0 ? [scalar('inner', scale / softcap), scalar('cap', softcap)] : [scalar('inner', scale)]
  return encodeModel({ head, graph, initializers: new Map(constants) })
}

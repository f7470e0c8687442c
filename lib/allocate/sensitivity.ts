/** What coding one side of one kv head, or of all those of a layer, costs, at each codec, while all else is exact. */
import { learnParts, transformsOf } from '../calibrate/learn'
import type { Captured, CommonOptions } from '../calibrate/capture'
import type { Codec } from '../codec'
import { decode, encode } from '../codes'
import type { DeviceOptions } from '../device'
import { rangeError } from '../errors'
import { sides } from '../gradient/attention'
import type { Side } from '../gradient/attention'
import { Capture } from '../onnx/capture'
import { enterSide, leaveSide } from '../transform/apply'
import type { SideTransforms, TransformStep } from '../transform/learn'
import type { ReferenceBatch } from './divergence'
import { DivergenceModel } from './divergence'

export interface SensitivityOptions extends CommonOptions, DeviceOptions {
  candidates: readonly Codec[]
  /** Whether heads of a layer are measured one by one, or together. */
  per: 'head' | 'layer'
  /** `divergence`: by running the model on the chunks held out; `fisher`: by squared gradients of the tokens held out. */
  measure: 'divergence' | 'fisher'
  /** Tokens that will be in full precision. */
  sinks: number
  window: number
  iterations?: number | undefined
  /** Steps that the codebook will have: every candidate is measured with what it would learn of them. */
  transforms?: readonly TransformStep[] | undefined
}

/** Of one side of some kv heads of a layer. */
export interface Sensitivity {
  layer: number
  side: 'key' | 'value'
  firstHead: number
  heads: number
  /** One for each candidate, in natural logarithms a token. */
  losses: number[]
}

/** Losses of all layers, sides and, unless they are to be alike, heads, layer by layer. Tables are learned for every candidate and dropped again. */
export async function measureSensitivity(captured: Captured, options: SensitivityOptions): Promise<Sensitivity[]> {
  const { sample, model } = captured
  const { layers, kvHeads, headDim, rotary } = model.shape
  const { candidates, iterations, transforms = [], seed, threads, signal, device, deviceIndex, onProgress } = options
  const learning = { iterations, seed, threads, signal, device, deviceIndex }
  using judge = options.measure === 'fisher' ? new FisherJudge(captured) : await DivergenceJudge.open(captured, options)
  const found: Sensitivity[] = []
  const total = layers * sides.length * candidates.length
  for (let layer = 0; layer < layers; layer++) {
    for (const side of sides) {
      const activations = await sample.side(layer, side)
      const rows = await judge.rows(layer, side)
      const heads = options.per === 'head' ? 1 : kvHeads
      const pieces = Array.from({ length: kvHeads / heads }, (_, piece): Sensitivity => ({ layer, side, firstHead: piece * heads, heads, losses: [] }))
      for (const [index, codec] of candidates.entries()) {
        const place = { tokens: sample.tokensKept, kvHeads, headDim, rotary, parts: [{ firstHead: 0, heads: kvHeads, codec }] }
        const learned = await transformsOf(activations, place, side, transforms)
        const tables = await learnParts(activations, { ...place, transforms: learned }, defined(learning))
        const errors = await codedErrors(rows, { codec, kvHeads, headDim, tables, threads, signal }, learned)
        for (const { losses, ...place } of pieces) losses.push(await judge.loss({ ...place, errors }))
        onProgress?.({ phase: 'choose', done: (layer * sides.length + sides.indexOf(side)) * candidates.length + index + 1, total })
      }
      found.push(...pieces)
    }
  }
  return found
}

interface Coding {
  codec: Codec
  kvHeads: number
  headDim: number
  tables: Float32Array
  threads: number | undefined
  signal: AbortSignal | undefined
}

/** What codes make of rows, through transforms and back, less the rows. */
async function codedErrors(rows: Float32Array, coding: Coding, transforms: SideTransforms): Promise<Float32Array> {
  const { kvHeads, headDim } = coding
  const shape = { tokens: rows.length / kvHeads / headDim, kvHeads, headDim }
  const { metric } = transforms
  const entering = await enterSide({ rows, weights: undefined }, transforms, shape)
  const codes = await encode(entering.rows, { ...coding, tokens: shape.tokens, ...(metric && { metric }) })
  const leaving = await leaveSide(await decode(codes, { ...coding, tokens: shape.tokens }), transforms, shape)
  return leaving.map((value, i) => value - rows[i]!)
}

/** Without members that are undefined. */
function defined<Options extends object>(options: Options): { [Name in keyof Options]: Exclude<Options[Name], undefined> } {
  return Object.fromEntries(Object.entries(options).filter(([, value]) => value !== undefined)) as never
}

function tooShort(): RangeError {
  return rangeError('Expected a text of which chunks can be held out, to measure codecs on, but received one that is too short')
}

interface CodedHeads {
  layer: number
  side: Side
  firstHead: number
  heads: number
  /** Of all heads: float32 [tokens][kvHeads][headDim]. */
  errors: Float32Array
}

interface Judge extends Disposable {
  /** What is coded: float32 [tokens][kvHeads][headDim]. */
  rows(layer: number, side: Side): Promise<Float32Array>
  loss(coded: CodedHeads): Promise<number>
}

/** A chunk with its exact keys and values, float32 [tokens][layers][kvHeads][headDim]. */
interface ReferenceRows {
  reference: ReferenceBatch
  key: Float32Array
  value: Float32Array
}

/** KL divergence from the full-precision logits of the chunks that were held out. */
class DivergenceJudge implements Judge {
  readonly #model: DivergenceModel
  readonly #batches: readonly ReferenceRows[]
  readonly #tokens: number
  readonly #signal: AbortSignal | undefined

  private constructor(model: DivergenceModel, batches: readonly ReferenceRows[], signal: AbortSignal | undefined) {
    this.#model = model
    this.#batches = batches
    this.#tokens = batches.reduce((sum, { reference }) => sum + reference.texts[0]!.length, 0)
    this.#signal = signal
  }

  static async open({ model, heldOutChunks }: Captured, { sinks, window, threads, signal }: SensitivityOptions): Promise<DivergenceJudge> {
    if (heldOutChunks.length === 0) throw tooShort()
    const batches: ReferenceRows[] = []
    for (const tokens of heldOutChunks) {
      using sequence = model.sequence()
      using capture = new Capture({ model, points: tokens.length, weights: 'uniform' })
      const { logits } = await model.run([{ sequence, tokens }], { capture, ...(signal && { signal }) })
      batches.push({ reference: { texts: [tokens], logits }, key: capture.keys, value: capture.values })
    }
    return new DivergenceJudge(await DivergenceModel.load(model.file, { sinks, window, threads }), batches, signal)
  }

  /** Of all chunks, one after another. */
  rows(layer: number, side: Side): Promise<Float32Array> {
    const { layers, kvHeads, headDim } = this.#model.shape
    const width = kvHeads * headDim
    const rows = new Float32Array(this.#tokens * width)
    let at = 0
    for (const { reference: { texts }, [side]: data } of this.#batches) {
      for (let token = 0; token < texts[0]!.length; token++, at += width) {
        rows.set(data.subarray((token * layers + layer) * width, (token * layers + layer + 1) * width), at)
      }
    }
    return Promise.resolve(rows)
  }

  async loss({ layer, side, firstHead, heads, errors }: CodedHeads): Promise<number> {
    const { kvHeads, headDim } = this.#model.shape
    const width = kvHeads * headDim
    let sum = 0
    let first = 0
    for (const { reference } of this.#batches) {
      const tokens = reference.texts[0]!.length
      const own = new Float32Array(tokens * width)
      for (let at = firstHead * headDim; at < own.length; at += width) own.set(errors.subarray(first + at, first + at + heads * headDim), at)
      sum += tokens * await this.#model.run(reference, [{ layer, side, errors: own }], this.#signal)
      first += tokens * width
    }
    return sum / this.#tokens
  }

  [Symbol.dispose](): void {
    this.#model.dispose()
  }
}

/** Half the sum of squared gradients times squared errors: the divergence to second order, channels taken alone, as if no token were kept in full precision. */
class FisherJudge implements Judge {
  readonly #captured: Captured
  #weights = new Float32Array(0)

  constructor(captured: Captured) {
    if (captured.weights !== 'fisher') throw rangeError(`Expected fisher weights to estimate by but received "${captured.weights}"`)
    if (captured.heldOut === undefined) throw tooShort()
    this.#captured = captured
  }

  async rows(layer: number, side: Side): Promise<Float32Array> {
    const { rows, weights } = await this.#captured.heldOut!.side(layer, side)
    const elements = this.#captured.heldOut!.tokensKept * this.#captured.model.shape.kvHeads * this.#captured.model.shape.headDim
    this.#weights = weights!.subarray(0, elements).map((gradient) => gradient ** 2)
    return rows.slice(0, elements)
  }

  loss({ firstHead, heads, errors }: CodedHeads): Promise<number> {
    const { kvHeads, headDim } = this.#captured.model.shape
    let sum = 0
    for (let at = firstHead * headDim; at < errors.length; at += kvHeads * headDim) {
      for (let channel = at; channel < at + heads * headDim; channel++) sum += errors[channel]! ** 2 * this.#weights[channel]!
    }
    return Promise.resolve((sum / 2) * kvHeads * headDim / errors.length)
  }

  [Symbol.dispose](): void {
    this.#weights = new Float32Array(0)
  }
}

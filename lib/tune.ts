import { createHash } from 'node:crypto'

import { requireBoolean, requireCallOptions, requireInteger, requireObject } from './arguments'
import type { Texts } from './calibrate/text'
import { EvenChoice, TextReader } from './calibrate/text'
import { Codebook } from './codebook'
import type { Codec } from './codec'
import { sideParts } from './codec'
import { rangeError, throwExpected } from './errors'
import { whileLocked } from './file-lock'
import { adamStep, groupSpreads } from './gradient/adam'
import { sides } from './gradient/attention'
import type { CodedBatch, Tables } from './gradient/coded'
import { CodedGradientModel } from './gradient/coded'
import { DecoderModel } from './onnx/model'
import { shuffled } from './shuffle'
import { levelsOf, onLevels } from './transform/levels'
import type { TuneProgressState, TuneSettings, TuneTables } from './tune-checkpoint'
import { readCheckpoint, writeCheckpoint } from './tune-checkpoint'

export interface TuneProgress {
  /** Steps done, of `steps` at most. */
  done: number
  total: number
  /** Mean KL divergence of the last step's texts, in natural logarithms. */
  loss: number
  /** Of the held-out texts: at the start, and the best so far. */
  before: number
  best: number
}

export interface TuneOptions {
  /** Directory of the model. */
  model: string
  /** Codebook to begin with, or its file. */
  codebook: Codebook | string
  /**
   * One text or several to learn from, as `calibrate` takes them. A long one: a text that is seen often is learned by heart. Of one that is
   * longer than all steps together, evenly spread chunks are kept.
   */
  text: Texts
  /** Tokens of a chunk; every chunk is a sequence of its own, and a shorter rest is left out. Default 512. */
  length?: number
  /** Chunks of a step. Default 4. */
  batch?: number
  /**
   * Chunks of a step that are run at once, which divides `batch`. Default `batch`. Fewer take less memory (docs/algorithm.md) and give the same but
   * for rounding.
   */
  together?: number
  /** Steps at most. Default 280. */
  steps?: number
  /** First step of a centroid in units of the spread of its group; falls to 0 along half a cosine. Default 0.02. */
  rate?: number
  /** Newest tokens that a query reads in full precision, itself among them: as the codebook will be used. Default 32. */
  window?: number
  /** First tokens in full precision. Default 4. */
  sinks?: number
  /** Chunks at the end of the text that are kept apart to judge by. Default a tenth of them, 1 to 16. */
  heldOut?: number
  /** Steps from one judgement to the next. Default 20. */
  checkEvery?: number
  /** Ends after so many judgements without a better one; while steps are large, several in a row may be none. Default 7. */
  patience?: number
  /** Whether values end on levels, as `calibrate` has it, and are judged there. Default true. */
  levels?: boolean
  /** Of the order of the chunks. Default 0. */
  seed?: number
  /** File that keeps the state after every judgement; a tuning with the same options, but for `patience`, goes on from it. It stays when the tuning is done. */
  checkpoint?: string
  threads?: number
  signal?: AbortSignal
  onProgress?: (progress: TuneProgress) => void
}

export interface Tuned {
  /** The best tables by the held-out texts; as good as those to begin with, or better. */
  codebook: Codebook
  /** Steps run, and the one that gave the best tables (0: those to begin with). */
  steps: number
  bestStep: number
  /** Mean KL divergence of the held-out texts from the full-precision model, in natural logarithms. */
  before: number
  after: number
}

/** Chunks that are kept apart by default. */
const mostHeldOut = 16

/** Bytes of full-precision logits that are kept for later steps. */
const keptLogitBytes = 2 ** 28

/**
 * Improves the centroids of a codebook by the model's own outputs: minimises the KL divergence of its logits on codes from those in
 * full precision, over the centroids alone (docs/algorithm.md). What a cache stores and how fast it is read do not change. The same
 * options give the same codebook on the same number of threads, interrupted or not.
 *
 * @throws {RangeError} `ERR_COUPLET_INVALID_ARGUMENT` for a text of fewer than two chunks, or a checkpoint of another tuning
 * @throws {CoupletError} `ERR_COUPLET_UNSUPPORTED_MODEL` for a graph through which couplet cannot compute gradients;
 *   `ERR_COUPLET_CODEBOOK_MISMATCH` for the codebook of another model
 * @example
 * const { codebook, before, after } = await tune({ model: 'my-model', codebook: 'my-model.cq-8c8b.safetensors', text })
 * await codebook.save('my-model.cq-8c8b.tuned.safetensors')
 */
export async function tune(options: TuneOptions): Promise<Tuned> {
  requireObject(options, 'options')
  const plan = checkTune(options)
  const run = () => tuneText(options, plan)
  return options.checkpoint === undefined ? run() : whileLocked(options.checkpoint, 'checkpoint', run)
}

async function tuneText(options: TuneOptions, plan: TunePlan): Promise<Tuned> {
  const reader = await TextReader.open(options.text, { directory: options.model, length: plan.length, signal: options.signal })
  const kept = new EvenChoice<number[]>(plan.steps * plan.batch + (plan.heldOut ?? mostHeldOut))
  for await (const { tokens } of reader.read()) if (tokens.length === plan.length) kept.add(tokens)
  const texts = kept.items
  if (texts.length < 2) throw rangeError(`Expected a text of at least two chunks of ${plan.length} tokens for \`text\` but received ${reader.tokens} tokens`)
  const heldOut = plan.heldOut ?? Math.min(mostHeldOut, Math.max(1, Math.floor(texts.length / 10)))
  if (heldOut >= texts.length) throw rangeError(`Expected fewer than ${texts.length} chunks, all that is kept of the text, for \`heldOut\` but received ${heldOut}`)
  const own = typeof options.codebook === 'string'
  const codebook = typeof options.codebook === 'string' ? await Codebook.load(options.codebook) : options.codebook
  if (!(codebook instanceof Codebook)) throwExpected('a Codebook or the path of one', 'codebook', codebook)
  try {
    using model = await DecoderModel.load(options.model, options.threads === undefined ? {} : { threads: options.threads })
    return await tuneChunks({ model, codebook, texts, heldOut, text: reader.hash }, plan, options)
  } finally {
    if (own) codebook.dispose()
  }
}

export interface TuneSource {
  /** In full precision. */
  model: DecoderModel
  codebook: Codebook
  /** Chunks of equal length; the last `heldOut` of them are kept apart to judge by. */
  texts: readonly (readonly number[])[]
  heldOut: number
  /** Hash of the text that they are of. */
  text: string
}

/** {@link tune} on chunks that somebody has already. */
export async function tuneChunks({ model: reference, codebook, texts, heldOut, text }: TuneSource, plan: TunePlan,
  options: Pick<TuneOptions, 'checkpoint' | 'threads' | 'signal' | 'onProgress'>): Promise<Tuned> {
  const { shape, fingerprint } = reference
  codebook.check({ layers: shape.layers, kvHeads: shape.kvHeads, headDim: shape.headDim, rotary: shape.rotary, model: fingerprint })
  const { sinks, window } = plan
  using model = await CodedGradientModel.load(reference.file, { codebook, sinks, window, ...(options.threads !== undefined && { threads: options.threads }) })
  const start = createHash('sha256').update(codebook.toBuffer()).digest('hex')
  const settings: TuneSettings = { model: fingerprint, codebook: start, text, ...plan, levels: Number(plan.levels), heldOut }
  delete settings['patience'] // whoever resumes may have more of it
  const tuning = new Tuning({ model, codebook, batches: new Batches(reference, texts, heldOut, plan), plan, settings })
  const state = await tuning.run(options)
  return { codebook: tuning.codebook(text, state), steps: state.step, bestStep: state.bestStep, before: state.before, after: state.best }
}

type PlanName = 'length' | 'batch' | 'together' | 'steps' | 'rate' | 'window' | 'sinks' | 'checkEvery' | 'patience' | 'levels' | 'seed'

export type TunePlan = Required<Pick<TuneOptions, PlanName>> & { heldOut?: number }

/** Options with their defaults. */
export function checkTune(options: Omit<TuneOptions, 'model' | 'codebook' | 'text'>): TunePlan {
  const { length = 512, batch = 4, steps = 280, rate = 0.02, window = 32, sinks = 4, checkEvery = 20, patience = 7, levels = true, seed = 0, heldOut } = options
  const { together = batch } = options
  requireInteger(length, 'length', 2)
  requireInteger(batch, 'batch', 1)
  requireInteger(together, 'together', 1, batch)
  if (batch % together !== 0) throwExpected(`a divisor of ${batch}`, 'together', together, true)
  requireInteger(steps, 'steps', 1)
  requireInteger(window, 'window', 0)
  requireInteger(sinks, 'sinks', 0)
  requireInteger(checkEvery, 'checkEvery', 1)
  requireInteger(patience, 'patience', 1)
  requireBoolean(levels, 'levels')
  requireInteger(seed, 'seed', 0)
  if (heldOut !== undefined) requireInteger(heldOut, 'heldOut', 1)
  if (typeof rate !== 'number' || !(rate > 0 && rate <= 1)) throwExpected('a number above 0, at most 1', 'rate', rate, typeof rate === 'number')
  requireCallOptions(options)
  if (options.checkpoint !== undefined && typeof options.checkpoint !== 'string') throwExpected('a path', 'checkpoint', options.checkpoint)
  return { length, batch, together, steps, rate, window, sinks, checkEvery, patience, levels, seed, ...(heldOut !== undefined && { heldOut }) }
}

/** Chunks in the order in which steps take them, with the logits that they are to have. */
class Batches {
  readonly #model: DecoderModel
  readonly #texts: readonly (readonly number[])[]
  readonly #learned: number
  readonly #plan: TunePlan
  readonly #logits = new Map<number, Float32Array>()
  #logitBytes = 0

  constructor(model: DecoderModel, texts: readonly (readonly number[])[], heldOut: number, plan: TunePlan) {
    this.#model = model
    this.#texts = texts
    this.#learned = texts.length - heldOut
    this.#plan = plan
  }

  /** Of equally many chunks; a function of the step alone, so that an interrupted tuning goes on with the chunks that it had not seen. */
  async* ofStep(step: number, signal: AbortSignal | undefined): AsyncGenerator<CodedBatch> {
    const { batch, together, seed } = this.#plan
    for (let first = (step - 1) * batch; first < step * batch; first += together) {
      const places = Array.from({ length: together }, (_, i) => first + i)
      yield this.#make(places.map((place) => shuffled(this.#learned, seed, Math.floor(place / this.#learned))[place % this.#learned]!), signal)
    }
  }

  async* heldOut(signal: AbortSignal | undefined): AsyncGenerator<CodedBatch> {
    for (let first = this.#learned; first < this.#texts.length; first += this.#plan.together) {
      const count = Math.min(this.#plan.together, this.#texts.length - first)
      yield this.#make(Array.from({ length: count }, (_, i) => first + i), signal)
    }
  }

  async #make(numbers: number[], signal: AbortSignal | undefined): Promise<CodedBatch> {
    const parts: Float32Array[] = []
    for (const number of numbers) parts.push(await this.#logitsOf(number, signal))
    const size = parts[0]!.length
    const logits = new Float32Array(size * parts.length)
    parts.forEach((part, i) => { logits.set(part, i * size) })
    return { texts: numbers.map((number) => this.#texts[number]!), logits }
  }

  async #logitsOf(number: number, signal: AbortSignal | undefined): Promise<Float32Array> {
    const known = this.#logits.get(number)
    if (known) return known
    using sequence = this.#model.sequence()
    const { logits } = await this.#model.run([{ sequence, tokens: this.#texts[number]! }], signal ? { signal } : {})
    if (this.#logitBytes + logits.byteLength <= keptLogitBytes) {
      this.#logitBytes += logits.byteLength
      this.#logits.set(number, logits)
    }
    return logits
  }
}

/** Tables on their way, and what is known of them. */
class Tuning {
  readonly #model: CodedGradientModel
  readonly #start: Codebook
  readonly #batches: Batches
  readonly #plan: TunePlan
  readonly #settings: TuneSettings
  readonly #tables: TuneTables
  /** Of every layer and side its parts, whose groups differ in size. */
  readonly #parts: Record<'key' | 'value', TablePart[][]>

  constructor({ model, codebook, batches, plan, settings }: {
    model: CodedGradientModel; codebook: Codebook; batches: Batches; plan: TunePlan; settings: TuneSettings
  }) {
    this.#model = model
    this.#start = codebook
    this.#batches = batches
    this.#plan = plan
    this.#settings = settings
    const layers = Array.from({ length: codebook.layers }, (_, layer) => layer)
    const start: Tables = { key: layers.map((layer) => codebook.keyTable(layer)), value: layers.map((layer) => codebook.valueTable(layer)) }
    this.#tables = { current: copied(start), mean: zeros(start), square: zeros(start), best: copied(start) }
    this.#parts = {
      key: layers.map((layer) => tableParts(codebook.parts(layer).map(({ keyTable, keyCodec }) => [keyTable, keyCodec]))),
      value: layers.map((layer) => tableParts(codebook.parts(layer).map(({ valueTable, valueCodec }) => [valueTable, valueCodec]))),
    }
  }

  async run({ checkpoint, signal, onProgress }: Pick<TuneOptions, 'checkpoint' | 'signal' | 'onProgress'>): Promise<TuneProgressState> {
    const { steps, checkEvery, patience } = this.#plan
    const known = checkpoint === undefined ? undefined : await readCheckpoint(checkpoint, this.#settings, this.#tables)
    const state = known ?? await this.#begin(signal)
    while (state.step < steps && state.step - state.bestStep < patience * checkEvery) {
      const loss = await this.#step(state.step + 1, signal)
      state.step++
      const judged = state.step % checkEvery === 0 || state.step === steps
      if (judged) await this.#judge(state, signal)
      if (judged && checkpoint !== undefined) await writeCheckpoint(checkpoint, this.#settings, state, this.#tables)
      onProgress?.({ done: state.step, total: steps, loss, before: state.before, best: state.best })
    }
    return state
  }

  /** The best tables. `text`: hash of what they were tuned on. */
  codebook(text: string, { bestStep }: TuneProgressState): Codebook {
    const { codecs, kvHeads, headDim, metadata, transforms: names } = this.#start
    const transforms = Object.fromEntries(names.map((name) => [name, codecs.map((_, layer) => this.#start.transform(name, layer)!)]))
    const { window, sinks, levels: isOnLevels } = this.#plan
    const levels = isOnLevels ? levelsOf(codecs) : bestStep > 0 ? { levels: undefined } : {}
    const tuned = bestStep > 0 && { tuned: { steps: bestStep, window, sinks, text } }
    const learned = metadata.learned && { ...metadata.learned, ...levels, ...tuned }
    const { key, value } = this.#tables.best
    return Codebook.fromTables({ keyTables: key, valueTables: value, codecs, transforms, kvHeads, headDim, metadata: { ...metadata, learned } })
  }

  async #begin(signal: AbortSignal | undefined): Promise<TuneProgressState> {
    const tables = this.#usable()
    const before = await this.#heldOutLoss(tables, signal)
    this.#keep(tables)
    return { step: 0, before, best: before, bestStep: 0 }
  }

  async #step(step: number, signal: AbortSignal | undefined): Promise<number> {
    const { current, mean, square } = this.#tables
    const gradients = zeros(current)
    const pieces = this.#plan.batch / this.#plan.together
    let loss = 0
    for await (const piece of this.#batches.ofStep(step, signal)) loss += await this.#model.run(piece, current, { gradients, signal }) / pieces
    for (const table of pieces > 1 ? [...gradients.key, ...gradients.value] : []) table.forEach((gradient, i) => { table[i] = gradient / pieces })
    const rate = (this.#plan.rate * (1 + Math.cos((Math.PI * (step - 1)) / this.#plan.steps))) / 2
    for (const side of sides) {
      current[side].forEach((table, layer) => {
        for (const { begin, end, spreads } of this.#parts[side][layer]!) {
          const own = (array: Float32Array): Float32Array => array.subarray(begin, end)
          const state = { mean: own(mean[side][layer]!), square: own(square[side][layer]!) }
          adamStep(own(table), own(gradients[side][layer]!), state, { step, rate, spreads })
        }
      })
    }
    return loss
  }

  async #judge(state: TuneProgressState, signal: AbortSignal | undefined): Promise<void> {
    const tables = this.#usable()
    const loss = await this.#heldOutLoss(tables, signal)
    if (!(loss < state.best)) return
    state.best = loss
    state.bestStep = state.step
    this.#keep(tables)
  }

  /** The current tables as a cache would have them. */
  #usable(): Tables {
    const { key, value } = this.#tables.current
    const { codecs, headDim } = this.#start
    return this.#plan.levels ? { key, value: value.map((table, layer) => onLevels(table, sideParts(codecs[layer]!, 'value'), headDim)) } : { key, value }
  }

  #keep(tables: Tables): void {
    for (const side of sides) this.#tables.best[side].forEach((table, layer) => { table.set(tables[side][layer]!) })
  }

  async #heldOutLoss(tables: Tables, signal: AbortSignal | undefined): Promise<number> {
    let sum = 0
    let texts = 0
    for await (const batch of this.#batches.heldOut(signal)) {
      sum += await this.#model.run(batch, tables, { signal }) * batch.texts.length
      texts += batch.texts.length
    }
    return sum / texts
  }
}

const copied = ({ key, value }: Tables): Tables => ({ key: key.map((table) => table.slice()), value: value.map((table) => table.slice()) })
const zeros = ({ key, value }: Tables): Tables =>
  ({ key: key.map((table) => new Float32Array(table.length)), value: value.map((table) => new Float32Array(table.length)) })

/** Place of a part in the table of its layer and side, and the spreads of its groups. */
interface TablePart {
  begin: number
  end: number
  spreads: Float64Array
}

function tableParts(parts: readonly [table: Float32Array, codec: Codec][]): TablePart[] {
  let end = 0
  return parts.map(([table, { centroids, groupChannels }]) => {
    const begin = end
    end += table.length
    return { begin, end, spreads: groupSpreads(table, centroids, groupChannels) }
  })
}

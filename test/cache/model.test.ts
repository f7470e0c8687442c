// Random append, attend, fork, truncate, reset, abort and dispose against plain arrays (model.ts).
import assert from 'node:assert/strict'
import fc from 'fast-check'

import type { Sequence, Step } from '../../lib/cache'
import { Cache } from '../../lib/cache'
import type { DeviceName } from '../../lib/device'
import { codeOf } from '../../lib/errors'
import { describeOn } from '../device/devices'
import type { CacheShape, LayerInput } from './model'
import { ModelSequence, codebook, expectedBytes, newTokens, random, rotary, shape } from './model'

/** Of values up to 2 in size; a GPU takes queries of a prefill and their keys with the 10 bits of tf32. */
const toleranceOn = (device: DeviceName): number => (device === 'cpu' ? 2e-5 : 4e-3)

const pick = fc.nat(1000)
const action = fc.oneof(
  { weight: 2, arbitrary: fc.record({ kind: fc.constant('create' as const) }) },
  { weight: 2, arbitrary: fc.record({ kind: fc.constant('fork' as const), pick }) },
  { weight: 2, arbitrary: fc.record({ kind: fc.constant('truncate' as const), pick, share: fc.double({ min: 0, max: 1, noNaN: true }) }) },
  { weight: 1, arbitrary: fc.record({ kind: fc.constant('reset' as const), pick }) },
  { weight: 1, arbitrary: fc.record({ kind: fc.constant('dispose' as const), pick }) },
  {
    weight: 8,
    arbitrary: fc.record({
      kind: fc.constant('step' as const),
      rows: fc.array(fc.record({ pick, tokens: fc.oneof({ weight: 3, arbitrary: fc.nat(3) }, fc.nat(80)) }), { minLength: 1, maxLength: 3 }),
      prefill: fc.constantFrom('exact' as const, 'coded' as const),
      how: fc.constantFrom('attend' as const, 'attendSync' as const, 'append' as const, 'appendSync' as const),
      end: fc.constantFrom('commit' as const, 'commit' as const, 'commit' as const, 'abort' as const, 'half' as const),
      reverse: fc.boolean(),
    }),
  },
)
type Action = typeof action extends fc.Arbitrary<infer Value> ? Value : never
type StepAction = Extract<Action, { kind: 'step' }>

interface Entry {
  sequence: Sequence
  model: ModelSequence
}

class Run {
  readonly entries: Entry[] = []
  readonly cache: Cache
  readonly #next: () => number

  constructor(readonly config: CacheShape, seed: number, readonly memory: number | undefined, readonly device: DeviceName) {
    this.cache = new Cache({ ...shape, ...config, codebook, rotary, memory, threads: 1, device })
    this.#next = random(seed)
  }

  async perform(given: Action): Promise<void> {
    if (given.kind === 'create' || this.entries.length === 0) {
      this.entries.push({ sequence: this.cache.sequence(), model: new ModelSequence(this.config) })
      return
    }
    if (given.kind === 'step') return this.#step(given)
    const index = given.pick % this.entries.length
    const { sequence, model } = this.entries[index]!
    switch (given.kind) {
      case 'fork':
        this.entries.push({ sequence: sequence.fork(), model: model.fork() })
        break
      case 'truncate': {
        const tokens = Math.round(given.share * model.tokens.length)
        sequence.truncate(tokens)
        model.truncate(tokens)
        break
      }
      case 'reset':
        sequence.reset()
        model.truncate(0)
        break
      case 'dispose':
        sequence.dispose()
        this.entries.splice(index, 1)
        break
    }
  }

  async #step({ rows: wanted, prefill, how, end, reverse }: StepAction): Promise<void> {
    const chosen = new Map(wanted.map(({ pick, tokens }) => [this.entries[pick % this.entries.length]!, tokens]))
    const rows = [...chosen].map(([entry, tokens]) => ({ ...entry, tokens, input: newTokens(tokens, this.#next), after: entry.model.fork() }))
    const before = this.cache.statistics()
    let step: Step
    try {
      step = this.cache.begin(rows, { prefill })
    } catch (error) {
      if (this.memory === undefined || codeOf(error) !== 'ERR_COUPLET_CACHE_FULL') throw error
      assert.deepEqual(this.cache.statistics(), before)
      return
    }
    for (const { sequence } of rows) assert.throws(() => sequence.reset(), { code: 'ERR_COUPLET_BUSY' })
    const expected = rows.map(({ after, input, tokens }) => after.advance(input, tokens, prefill))
    const order = Array.from({ length: shape.layers }, (_, layer) => (reverse ? shape.layers - 1 - layer : layer))
    for (const layer of end === 'half' ? order.slice(1) : order) {
      const outputs = await this.#layer(step, layer, how, rows.map(({ input }) => input[layer]!))
      const tolerance = toleranceOn(this.device)
      outputs?.forEach((output, row) => {
        expected[row]![layer]!.forEach((value, i) => assert.ok(Math.abs(value - output[i]!) <= tolerance, `row ${row}, layer ${layer}: ${output[i]}, not ${value}`))
      })
    }
    if (end === 'commit') {
      step.commit()
      for (const { sequence, after } of rows) this.entries.find((entry) => entry.sequence === sequence)!.model = after
    } else if (end === 'half') {
      assert.throws(() => step.commit(), { code: 'ERR_COUPLET_INVALID_ARGUMENT', layer: order[0] })
      step[Symbol.dispose]()
    } else {
      step.abort()
    }
    step.abort()
    assert.throws(() => step.commit(), { code: 'ERR_COUPLET_DISPOSED' })
  }

  async #layer(step: Step, layer: number, how: StepAction['how'], rows: LayerInput[]): Promise<Float32Array[] | undefined> {
    switch (how) {
      case 'attend': return step.attend(layer, rows)
      case 'attendSync': return step.attendSync(layer, rows)
      case 'append': await step.append(layer, rows); return undefined
      case 'appendSync': step.appendSync(layer, rows); return undefined
    }
  }

  compare(): void {
    const statistics = this.cache.statistics()
    for (const { sequence, model } of this.entries) assert.equal(sequence.length, model.tokens.length)
    const tokens = this.entries.reduce((sum, { model }) => sum + model.tokens.length, 0)
    const codedTokens = this.entries.reduce((sum, { model }) => sum + model.codedEnd - this.config.sinks, 0)
    const bytes = statistics.pageBytes + statistics.rawBytes
    const { sequences, rawTokens, budgetBytes, bitsPerChannel } = statistics
    assert.deepEqual({ sequences, tokens: statistics.tokens, codedTokens: statistics.codedTokens, rawTokens, budgetBytes }, {
      sequences: this.entries.length, tokens, codedTokens, rawTokens: tokens - codedTokens, budgetBytes: this.memory ?? Infinity,
    })
    assert.ok(bytes <= statistics.peakBytes && statistics.peakBytes <= statistics.budgetBytes)
    // Forks share: together they take at most what they would take apart.
    const apart = this.entries.reduce((sum, { model }) => sum + expectedBytes(model), 0)
    if (this.entries.length === 1) assert.equal(bytes, apart)
    else assert.ok(bytes <= apart, `${bytes} bytes, ${apart} without sharing`)
    const channels = tokens * shape.layers * 2 * shape.kvHeads * shape.headDim
    assert.equal(bitsPerChannel, tokens === 0 ? 0 : (8 * (bytes + statistics.codebookBytes)) / channels)
  }

  end(): void {
    for (const { sequence } of this.entries) sequence.dispose()
    const { pageBytes, rawBytes } = this.cache.statistics()
    assert.deepEqual({ pageBytes, rawBytes }, { pageBytes: 0, rawBytes: 0 })
    this.cache.dispose()
  }
}

describeOn('all', 'cache against a model of plain arrays', (device) => {
  const configs = [
    { sinks: 4, window: 32 }, { sinks: 0, window: 0 }, { sinks: 4, window: 0 }, { sinks: 0, window: 7 }, { sinks: 20, window: 3 },
    { sinks: 70, window: 16 }, { sinks: 1, window: Infinity },
  ]
  for (const config of configs)
    it(`sinks ${config.sinks}, window ${config.window}`, async function () {
      this.timeout(120_000)
      await check(config, undefined, device === 'cpu' ? 12 : 3)
    })
  it('within a byte budget', async function () {
    this.timeout(120_000)
    await check({ sinks: 4, window: 8 }, 60_000, device === 'cpu' ? 40 : 5)
  })

  async function check(config: CacheShape, memory: number | undefined, numRuns: number): Promise<void> {
    await fc.assert(
      fc.asyncProperty(fc.array(action, { minLength: 4, maxLength: 16 }), fc.integer(), async (actions, seed) => {
        const run = new Run(config, seed, memory, device)
        for (const given of actions) {
          await run.perform(given)
          run.compare()
        }
        run.end()
      }),
      { numRuns },
    )
  }
})

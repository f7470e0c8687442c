import assert from 'node:assert/strict'
import { existsSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

import { calibrate } from '../../lib/calibrate'
import { Codebook } from '../../lib/codebook'
import { codeOf } from '../../lib/errors'
import { shuffled } from '../../lib/shuffle'
import type { TuneOptions } from '../../lib/tune'
import { tune } from '../../lib/tune'
import { temporaryFolder, tinyLlama } from '../onnx/files'

describe('tune', function () {
  this.timeout(60_000)
  const folder = temporaryFolder()
  const text = [...readFileSync(join(__dirname, '../../docs/api.md'))].slice(0, 64 * 40)
  let codebook: Codebook
  let options: TuneOptions
  before(async () => {
    const learned = { text: text.slice(0, 1024), length: 128, codec: 'cq-8c3b', iterations: 5 }
    codebook = (await calibrate({ model: tinyLlama, ...learned, heldOut: 0, weights: 'attention', threads: 1 })).codebook
    options = { model: tinyLlama, codebook, text, length: 64, batch: 4, steps: 8, checkEvery: 4, heldOut: 4, window: 0, sinks: 0, rate: 0.05, threads: 1 }
  })
  after(() => { codebook.dispose() })

  const tablesOf = (book: Codebook) => Array.from({ length: book.layers }, (_, layer) => [...book.keyTable(layer), ...book.valueTable(layer)])

  it('brings held-out text nearer to the full-precision model, and says how', async () => {
    const told: number[] = []
    const result = await tune({ ...options, onProgress: ({ done, total, loss, best, before }) => {
      assert.ok(total === 8 && loss > 0 && best <= before)
      told.push(done)
    } })
    assert.deepEqual(told, [1, 2, 3, 4, 5, 6, 7, 8])
    assert.ok(result.after < 0.95 * result.before, `${result.before} -> ${result.after}`)
    assert.equal(result.steps, 8)
    const { learned, ...rest } = result.codebook.metadata
    const { tuned, ...before } = learned!
    assert.deepEqual({ ...rest, learned: before }, codebook.metadata)
    assert.equal(tuned?.steps, result.bestStep)
    assert.deepEqual(Codebook.fromBuffer(result.codebook.toBuffer()).metadata, result.codebook.metadata)
  })

  it('goes on from its checkpoint as if it had not been interrupted', async () => {
    const whole = await tune(options)
    const checkpoint = join(folder.path, 'tuning')
    const controller = new AbortController()
    const onProgress = ({ done }: { done: number }) => { if (done === 6) controller.abort(new Error('enough')) }
    await assert.rejects(tune({ ...options, checkpoint, signal: controller.signal, onProgress }), /enough/)
    assert.ok(existsSync(checkpoint))
    const told: number[] = []
    const resumed = await tune({ ...options, patience: 9, checkpoint, onProgress: ({ done }) => told.push(done) })
    assert.deepEqual(told, [5, 6, 7, 8])
    assert.deepEqual({ ...resumed, codebook: tablesOf(resumed.codebook) }, { ...whole, codebook: tablesOf(whole.codebook) })

    await assert.rejects(tune({ ...options, rate: 0.01, checkpoint }), (error: Error) => {
      assert.equal(codeOf(error), 'ERR_COUPLET_INVALID_ARGUMENT')
      assert.match(error.message, /rate was 0\.05 and is 0\.01$/)
      return true
    })
    writeFileSync(checkpoint, readFileSync(checkpoint).subarray(0, 5000))
    await assert.rejects(tune({ ...options, checkpoint }), { code: 'ERR_COUPLET_INVALID_ARGUMENT' })
  })

  it('runs fewer chunks at once for less memory, and gives the same but for rounding', async () => {
    const [whole, parts] = [await tune(options), await tune({ ...options, together: 2 })]
    assert.ok(Math.abs(parts.after / whole.after - 1) < 1e-3, `${whole.after} ${parts.after}`)
    for (const [layer, table] of tablesOf(whole.codebook).entries()) {
      const other = tablesOf(parts.codebook)[layer]!
      const distance = Math.hypot(...table.map((x, i) => x - other[i]!)) / Math.hypot(...table)
      assert.ok(distance < 0.01, `layer ${layer}: ${distance}`)
    }
    await assert.rejects(tune({ ...options, together: 3 }), /a divisor of 4 for `together`/)
    await assert.rejects(tune({ ...options, together: 5 }), { name: 'RangeError' })
  })

  it('keeps evenly spread chunks of a text that is longer than all steps', async () => {
    const told: number[] = []
    const { after, before } = await tune({ ...options, steps: 2, heldOut: 2, checkEvery: 2, onProgress: ({ done }) => told.push(done) })
    assert.ok(after <= before)
    assert.deepEqual(told, [1, 2])
  })

  it('ends early, with the tables to begin with, when nothing gets better', async () => {
    const { bestStep, steps, before, after, codebook: same } = await tune({ ...options, rate: 1, checkEvery: 1, patience: 2 })
    assert.deepEqual([bestStep, steps, after], [0, 2, before])
    assert.deepEqual(tablesOf(same), tablesOf(codebook))
    assert.equal(same.metadata.learned?.tuned, undefined)
  })

  it('refuses what it cannot work with', async () => {
    await assert.rejects(tune({ ...options, text: text.slice(0, 100) }), /at least two chunks of 64 tokens/)
    await assert.rejects(tune({ ...options, heldOut: 40 }), /fewer than 40 chunks/)
    await assert.rejects(tune({ ...options, rate: 0 }), { name: 'RangeError' })
    await assert.rejects(tune({ ...options, codebook: 'no/such/file' }), { code: 'ENOENT' })
    const other = Codebook.fromTables({
      keyTables: [new Float32Array(1024)], valueTables: [new Float32Array(1024)], keyCodec: 'cq-8c3b', valueCodec: 'cq-8c3b', kvHeads: 2, headDim: 64,
    })
    await assert.rejects(tune({ ...options, codebook: other }), { code: 'ERR_COUPLET_CODEBOOK_MISMATCH' })
  })

  it('takes every chunk once a round, in another order each', () => {
    const rounds = [0, 1, 2].map((round) => [...shuffled(50, 7, round)])
    for (const round of rounds) assert.deepEqual([...round].sort((a, b) => a - b), Array.from({ length: 50 }, (_, i) => i))
    assert.notDeepEqual(rounds[0], rounds[1])
    assert.notDeepEqual(rounds[1], rounds[2])
    assert.deepEqual([...shuffled(50, 7, 1)], rounds[1])
    assert.notDeepEqual([...shuffled(50, 8, 1)], rounds[1])
  })
})

import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, readdirSync, readFileSync, truncateSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

import { calibrate, type CalibrateOptions, type CalibrationProgress } from '../../lib/calibrate'
import { removeCheckpoint } from '../../lib/calibrate/checkpoint'
import { codeOf } from '../../lib/errors'
import { temporaryFolder, tinyLlama } from '../onnx/files'

describe('a calibration with a checkpoint', function () {
  this.timeout(120_000)
  const folder = temporaryFolder()
  const text = readFileSync(join(__dirname, '../../docs/api.md'), 'utf8').slice(0, 24 * 128)
  const options = {
    // More tokens than points, so that slots of the sample are written again and again.
    model: tinyLlama, text: [text.slice(0, 1500), text.slice(1500)], length: 128, points: 1000, codec: { key: 'cq-8c4b', value: 'cq-4c3b' },
    weights: 'attention', iterations: 5, seed: 3, threads: 1,
  } satisfies CalibrateOptions
  const place = (name: string) => join(folder.path, name)
  const bytesOf = async (more: Partial<CalibrateOptions> = {}) => {
    const { codebook, report } = await calibrate({ ...options, ...more })
    return { bytes: Buffer.from(codebook.toBuffer()).toString('base64'), report }
  }
  let whole: Awaited<ReturnType<typeof bytesOf>>
  before(async () => { whole = await bytesOf() })

  function child(checkpoint: string, killedAt: readonly (string | number)[] = []) {
    const out = place('child.safetensors')
    const argv = ['--import', 'tsx', join(__dirname, 'child.ts'), JSON.stringify({ ...options, checkpoint }), out, ...killedAt.map(String)]
    const { signal, status, stdout, stderr } = spawnSync(process.execPath, argv, { encoding: 'utf8', cwd: join(__dirname, '../..') })
    assert.ok(status === 0 || signal === 'SIGKILL', stderr)
    return { signal, lines: stdout.trim().split('\n'), out }
  }

  it('gives the same codebook and report as one without', async () => {
    assert.deepEqual(await bytesOf({ checkpoint: place('plain') }), whole)
  })

  it('goes on after SIGKILL, and gives the same byte for byte', () => {
    const checkpoint = place('killed')
    const killings = [['capture', 128], ['capture', 1500], ['learn', 0.5], ['learn', 4.2], ['predict', 1]] as const
    for (const killedAt of killings) assert.equal(child(checkpoint, killedAt).signal, 'SIGKILL', killedAt.join(' '))
    const { lines, out } = child(checkpoint)
    assert.ok(!lines.some((line) => line.startsWith('capture')), 'the text had been run')
    assert.equal(readFileSync(out).toString('base64'), whole.bytes)
    assert.deepEqual(JSON.parse(lines.at(-1)!.slice('report '.length)), whole.report)
    assert.ok(!readdirSync(checkpoint).some((name) => name.endsWith('.partial')), 'nothing half written')
  })

  it('learns no layer twice, and runs no chunk that is on the disk', async () => {
    const checkpoint = place('half')
    const stop = new AbortController()
    const told: CalibrationProgress[] = []
    const abortAt = (phase: string, done: number) => (progress: CalibrationProgress) => {
      told.push(progress)
      if (progress.phase === phase && progress.done >= done) stop.abort(new Error('enough'))
    }
    await assert.rejects(calibrate({ ...options, checkpoint, signal: stop.signal, onProgress: abortAt('learn', 3.5) }), /enough/)
    const tables = readdirSync(checkpoint).filter((name) => name.endsWith('.table')).length // the report and the end of a side have no order
    assert.ok(tables === 3 || tables === 4, `${tables} tables`)
    assert.deepEqual(told.filter(({ phase }) => phase === 'capture').map(({ done, total }) => done === text.length ? total : 0).at(-1), text.length)
    const resumed: CalibrationProgress[] = []
    assert.deepEqual(await bytesOf({ checkpoint, onProgress: (progress) => resumed.push(progress) }), whole)
    assert.ok(!resumed.some(({ phase }) => phase === 'capture'))
    assert.deepEqual(resumed.filter(({ phase }) => phase === 'learn').slice(0, tables).map(({ done }) => done), [1, 2, 3, 4].slice(0, tables))
  })

  it('is refused for another model, text or options, which are named', async () => {
    const checkpoint = place('plain')
    const refused: [Partial<CalibrateOptions>, RegExp][] = [
      [{ codec: 'cq-8c4b' }, /value was cq-4c3b and is cq-8c4b$/],
      [{ seed: 4, iterations: 6 }, /seed was 3 and is 4, iterations was 5 and is 6$/],
      [{ weights: 'uniform' }, /weights was attention and is uniform/],
      [{ points: 999 }, /points was 1000 and is 999/],
      [{ heldOut: 0 }, /heldOut was 0\.1 and is 0/],
      [{ text }, /it is of another text/],
      [{ text: [options.text[0]!, options.text[1]!.replace('the', 'The')] }, /it is of another text/],
      [{ text: [...options.text, 'and more'] }, /it is of another text/],
      [{ text: options.text[0]! }, /it is of another text/],
    ]
    for (const [more, reason] of refused) {
      await assert.rejects(calibrate({ ...options, ...more, checkpoint }), (error: Error) => {
        assert.equal(codeOf(error), 'ERR_COUPLET_INVALID_ARGUMENT')
        assert.match(error.message, /^Expected a checkpoint of this calibration for `checkpoint`/)
        assert.match(error.message, reason)
        return true
      })
    }
    const state = readFileSync(join(checkpoint, 'state.json'), 'utf8')
    writeFileSync(join(checkpoint, 'state.json'), state.replace(/sha256:[0-9a-f]+/, 'sha256:0'))
    await assert.rejects(calibrate({ ...options, checkpoint }), /model was sha256:0 and is sha256:/)
    writeFileSync(join(checkpoint, 'state.json'), state)
    assert.deepEqual(await bytesOf({ checkpoint }), whole, 'what was refused has changed nothing')
  })

  it('is refused when it is damaged, or none', async () => {
    const checkpoint = place('damaged')
    await calibrate({ ...options, checkpoint })
    const attempt = () => calibrate({ ...options, checkpoint })
    truncateSync(join(checkpoint, 'layers.2.key.table'), 100)
    await assert.rejects(attempt(), /the table of layer 2, keys, has 100 bytes and not 8192/)
    truncateSync(join(checkpoint, 'layers.2.key.table'), 8192)
    truncateSync(join(checkpoint, 'sample.layers.3.value.rows'), 1024)
    await assert.rejects(attempt(), /"sample\.layers\.3\.value\.rows" has 1024 bytes and not 512000/)
    for (const text of ['{', '[]', '{"format":"couplet.tune"}']) {
      writeFileSync(join(checkpoint, 'state.json'), text)
      await assert.rejects(attempt(), { code: 'ERR_COUPLET_INVALID_ARGUMENT' })
    }
    mkdirSync(place('photos'))
    writeFileSync(join(place('photos'), 'cat.jpg'), 'a cat')
    await assert.rejects(calibrate({ ...options, checkpoint: place('photos') }), /it has files, and no state\.json among them/)
    await assert.rejects(calibrate({ ...options, checkpoint: 5 as unknown as string }), { name: 'TypeError', code: 'ERR_COUPLET_INVALID_ARGUMENT' })
  })

  it('is removed with its own files alone', async () => {
    const checkpoint = place('removed')
    await calibrate({ ...options, checkpoint })
    writeFileSync(join(checkpoint, 'notes.txt'), 'mine')
    await removeCheckpoint(checkpoint)
    assert.deepEqual(readdirSync(checkpoint), ['notes.txt'])
    await calibrate({ ...options, checkpoint: place('gone') })
    await removeCheckpoint(place('gone'))
    assert.ok(!existsSync(place('gone')))
    await removeCheckpoint(place('gone'))
  })
})

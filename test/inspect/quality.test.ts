import assert from 'node:assert/strict'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { hash } from '../../bench/quality/results'
import type { QualityPoint } from '../../lib'
import { readQualityResults, textHash } from '../../lib/inspect/quality'
import { lowerEdge } from '../../lib/inspect/quality-page'

const results = join(__dirname, '../../bench/results/2026-11-24-quality.json')

describe('figures of other methods', () => {
  let folder = ''
  before(() => { folder = mkdtempSync(join(tmpdir(), 'couplet-quality-')) })
  after(() => { rmSync(folder, { recursive: true }) })
  const write = (name: string, text: string) => {
    const file = join(folder, name)
    writeFileSync(file, text)
    return file
  }
  const { subject, rows } = JSON.parse(readFileSync(results, 'utf8')) as { subject: { model: string; text: string; length: number }; rows: unknown[] }

  it('are read as the benchmark wrote them', async () => {
    const points = await readQualityResults(results, subject)
    assert.equal(points.length, rows.length)
    const plain = points.find(({ name, window }) => name === 'cq-8c8b:attention' && window === 0)!
    assert.deepEqual([plain.bits, plain.sinks, plain.isSubject], [1, 0, undefined])
    assert.ok(plain.perplexity > 4 && plain.perplexity < 4.1)
  })

  it('know a text by the hash that the benchmark gives it', () => {
    const bytes = Uint8Array.from([1, 0, 0, 0, 1, 0, 0, 0, 1])
    assert.equal(textHash([1, 256, 65536]), hash(bytes))
    assert.notEqual(textHash([1]), textHash([256]))
  })

  it('of another model, text or length are refused, and so is another kind of file', async () => {
    const refused = { code: 'ERR_COUPLET_INVALID_ARGUMENT' }
    for (const name of ['model', 'text', 'length'] as const) {
      await assert.rejects(readQualityResults(results, { ...subject, [name]: name === 'length' ? 64 : 'other' }), { ...refused, message: new RegExp(name) })
    }
    for (const text of ['text', 'null', '{}', JSON.stringify({ subject, rows: [{ method: 'm', bits: '1' }] })]) {
      await assert.rejects(readQualityResults(write('other.json', text), subject), refused, text)
    }
    await assert.rejects(readQualityResults(join(folder, 'nowhere.json'), subject), { code: 'ENOENT' })
  })
})

describe('the lower edge', () => {
  const point = (bits: number, perplexity: number): QualityPoint => ({ name: `${bits}`, bits, perplexity, sinks: 0, window: 0 })

  it('has what nothing with as few bits beats', () => {
    const points = [point(4, 3.9), point(1, 5), point(2, 4.2), point(2, 4.1), point(3, 4.1), point(1, 6), point(5, 3.95)]
    assert.deepEqual(lowerEdge(points).map(({ bits, perplexity }) => [bits, perplexity]), [[1, 5], [2, 4.1], [4, 3.9]])
    assert.deepEqual(lowerEdge([]), [])
  })
})

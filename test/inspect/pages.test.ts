import assert from 'node:assert/strict'
import { spawnSync } from 'node:child_process'
import { join } from 'node:path'
import type { QualityPoint } from '../../lib'
import { inspectionPage, plan, planPage, qualityPage } from '../../lib'
import { renderPage } from '../../lib/inspect/page'
import type { Seen } from './browser'
import { usingBrowser, views } from './browser'
import { madeUpInspection } from './inspections'

const root = join(__dirname, '../..')

/** What every page has to be. */
function checkPage(seen: Seen, { charts, marks }: { charts: number; marks: number }): void {
  const { errors, requests, overflow, cut, tiny, faint } = seen
  assert.deepEqual({ errors, requests, overflow, cut, tiny, faint }, { errors: [], requests: [], overflow: 0, cut: [], tiny: [], faint: [] })
  assert.equal(seen.charts, charts)
  assert.ok(seen.marks >= marks, `${seen.marks} marks`)
  // A variable that no style sets would be black, or nothing at all.
  assert.deepEqual(seen.colors.filter((color) => color === 'rgb(0, 0, 0)' || color === 'none' || color === 'rgba(0, 0, 0, 0)'), [])
}

describe('pages in a browser', function () {
  this.timeout(60_000)
  const look = usingBrowser()

  for (const view of views) {
    const where = `${view.width} pixels wide, ${view.scheme}`

    it(`an inspection is readable, ${where}`, async () => {
      const seen = await look(await inspectionPage(madeUpInspection(), { name: 'made-up <model>' }), view, 'inspection')
      // 4 of entropy and 1 over layers, 8 of correlation, 2 + 1 of errors, 2 + 2 of usage, 2 of attention
      checkPage(seen, { charts: 22, marks: 8 * 32 + 24 + 30 })
      assert.match(seen.text, /made-up <model>/)
      assert.match(seen.text, /Codes lose most in the keys of layer 3, kv head 1: 50 % of their variance/)
      assert.match(seen.text, /Codes change the attention of layer 3, kv head 0 most: by 6\.0 % of its square/)
      assert.match(seen.text, /With 4 sinks and a window of 32, 41 % of attention falls on codes; most in layer 3: 5[23] %/)
      assert.equal(seen.background, view.scheme === 'light' ? 'rgb(255, 255, 255)' : 'rgb(20, 23, 27)')
    })

    it(`so is one of many layers and heads, ${where}`, async () => {
      const seen = await look(await inspectionPage(madeUpInspection({ layers: 48, kvHeads: 16, codeBits: 10 })), view, 'large')
      checkPage(seen, { charts: 22, marks: 8 * 32 + 48 + 48 })
      assert.match(seen.text, /48 layers, 64 query heads, 16 kv heads of 128 channels/)
    })
  }

  for (const view of views) {
    const where = `${view.width} pixels wide, ${view.scheme}`

    it(`perplexities are readable, ${where}`, async () => {
      const points = [0, 32].flatMap((window) => ['int', 'kivi', 'cq'].flatMap((family, i) => [0.75, 1, 2, 4].map((bits): QualityPoint => {
        const isSubject = window > 0 && family === 'cq'
        return {
          name: isSubject ? `book ${bits}` : `${family}-${bits}b`, bits: bits + (2 - i) / 8, perplexity: 4 + (3 - i) ** 3 / bits ** 2 / 20 + (isSubject ? 0 : 0.001),
          sinks: window / 8, window, divergence: 0.01, agreement: 0.9, isSubject,
        }
      })))
      const seen = await look(await qualityPage({ name: 'made-up', perplexity: 4, tokens: 8176, length: 512, points }), view, 'quality')
      checkPage(seen, { charts: 2 + 2 * 2, marks: 2 * 12 + 2 * 8 })
      assert.match(seen.text, /Every token coded: cq-0\.75b at 0\.75 bits has 4\.090, 0\.090 above full precision/)
      assert.match(seen.text, /4 sinks and a window of 32 in full precision: book 0\.75 at 0\.75 bits has 4\.089/)
    })

    it(`a plan is readable, ${where}`, async () => {
      const shape = { layers: 32, kvHeads: 8, headDim: 128, context: 32768, sequences: 16, budget: 24e9, sinks: 4, window: 32 }
      const seen = await look(await planPage(plan(shape), { name: 'made-up', ...shape }), view, 'plan')
      checkPage(seen, { charts: 2, marks: 8 + 3 * 5 + 2 * 8 })
      assert.match(seen.text, /cq-8c8b takes 4\.647 GB where float16 takes 68\.72 GB: 14\.79 times less; 6 of 8 fit 24\.00 GB/)
      assert.match(seen.text, /In 24\.00 GB, cq-16c12b reaches 220,064 tokens and float16 11,444/)
    })
  }

  it('a page of one point, and of none, is a page', async () => {
    const report = { name: 'one', perplexity: 4, tokens: 100, length: 50 }
    const one = await qualityPage({ ...report, points: [{ name: 'book', bits: 1, perplexity: 3.9, sinks: 0, window: 0, isSubject: true }] })
    const seen = await look(one, views[0]!, 'one')
    checkPage(seen, { charts: 1, marks: 2 })
    assert.match(seen.text, /book at 1 bit has 3\.900, 0\.100 below full precision\n/)
    checkPage(await look(await qualityPage({ ...report, points: [] }), views[0]!, 'none'), { charts: 0, marks: 0 })
  })

  it('an inspection without a codebook says what is missing', async () => {
    const seen = await look(await inspectionPage(madeUpInspection({ coded: false })), views[0]!, 'uncoded')
    checkPage(seen, { charts: 15, marks: 8 * 32 })
    assert.match(seen.text, /--codebooks FILE/)
  })

  it('texts are text, whatever is in them', async () => {
    const hostile = '<script>console.log(1)</script>"\'&'
    const section = { title: hostile, notes: [hostile], table: { head: [hostile], rows: [[hostile]] }, legend: [{ color: 'red', label: hostile }] }
    const seen = await look(await renderPage({ title: hostile, lead: hostile, sections: [section] }), views[0]!, 'hostile')
    assert.deepEqual(seen.errors, [])
    assert.equal(seen.text.split(hostile).length - 1, 7)
  })
})

describe('pages', function () {
  this.timeout(60_000)

  it('name no address, and no name twice', async () => {
    const html = await inspectionPage(madeUpInspection())
    assert.doesNotMatch(html, /https?:|<script|<link (?!rel="icon" href="data:,")|@import|src=/)
    const ids = [...html.matchAll(/ id="([^"]+)"/g)].map(([, id]) => id)
    assert.deepEqual(ids, [...new Set(ids)])
  })

  it('are the same for the same figures', async () => {
    assert.equal(await inspectionPage(madeUpInspection()), await inspectionPage(madeUpInspection()))
  })

  it('say what to install where vega is missing, and nothing else of couplet needs it', () => {
    const hook = `export async function resolve(name, context, next) {
      if (/^vega(-lite)?$/.test(name)) throw Object.assign(new Error('Cannot find package'), { code: 'ERR_MODULE_NOT_FOUND' })
      return next(name, context)
    }`
    const code = `import { register } from 'node:module'
      register(${JSON.stringify(`data:text/javascript,${encodeURIComponent(hook)}`)})
      const { default: { inspectionPage, CoupletError } } = await import(${JSON.stringify(join(root, 'lib/index.ts'))})
      const { default: { madeUpInspection } } = await import(${JSON.stringify(join(root, 'test/inspect/inspections.ts'))})
      const error = await inspectionPage(madeUpInspection()).catch((error) => error)
      console.log(error instanceof CoupletError, error.code, error.message)`
    const { stdout, stderr } = spawnSync(process.execPath, ['--import', 'tsx', '--input-type=module', '-e', code], { cwd: root, encoding: 'utf8' })
    assert.match(stdout, /^true ERR_COUPLET_MISSING_PACKAGE .*npm install vega vega-lite/, stderr)
  })
})

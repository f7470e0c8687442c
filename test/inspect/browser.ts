/** A headless Chromium that looks at pages; tests that need it say why they skip where there is none, and fail in CI. */
import { existsSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { delimiter, join } from 'node:path'
import { pathToFileURL } from 'node:url'
import type { Browser } from 'puppeteer-core'

const names = ['chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable']
const folders = (process.env['PATH'] ?? '').split(delimiter)
const executablePath = folders.flatMap((folder) => names.map((name) => join(folder, name))).find((path) => existsSync(path))

export interface View {
  width: number
  scheme: 'light' | 'dark'
}

export interface Seen {
  /** Script errors and lines on the console. */
  errors: string[]
  /** Addresses asked for, the page's own file left out. */
  requests: string[]
  charts: number
  /** Shapes that data made: bars and cells, lines, points, rules, labels. */
  marks: number
  /** CSS pixels that the page is wider than its window. */
  overflow: number
  /** Texts of charts that stick out of their chart, that are lower than 8 CSS pixels, or that have a contrast below 3 to what they stand on. */
  cut: string[]
  tiny: string[]
  faint: string[]
  /** Computed colours of all marks. */
  colors: string[]
  background: string
  text: string
}

export const views: readonly View[] = ([390, 1280] as const).flatMap((width) => (['light', 'dark'] as const).map((scheme) => ({ width, scheme })))

/** Starts a browser before the tests of the suite that calls this, and ends it after them. */
export function usingBrowser(): (html: string, view: View, name: string) => Promise<Seen> {
  let browser: Browser | undefined
  let folder = ''
  before(async function () {
    if (executablePath === undefined) {
      if (process.env['CI']) throw new Error('CI needs Chromium: apt-get install chromium')
      console.log('    not run: there is no Chromium on PATH (apt-get install chromium)')
      this.skip()
    }
    this.timeout(60_000)
    folder = mkdtempSync(join(tmpdir(), 'couplet-pages-'))
    const { launch } = await import('puppeteer-core')
    // Neither a sanitizer that is loaded into Node, nor the user's own settings.
    const env: NodeJS.ProcessEnv = { ...process.env, HOME: folder }
    delete env['LD_PRELOAD']
    browser = await launch({ executablePath, args: ['--no-sandbox', '--disable-gpu', '--disable-dev-shm-usage'], userDataDir: join(folder, 'profile'), env })
  })
  after(async () => {
    await browser?.close()
    if (folder) rmSync(folder, { recursive: true, force: true, maxRetries: 5 })
  })
  return async (html, view, name) => {
    const file = join(folder, `${name}.html`)
    writeFileSync(file, html)
    return look(browser!, pathToFileURL(file).href, view, name)
  }
}

async function look(browser: Browser, url: string, { width, scheme }: View, name: string): Promise<Seen> {
  const page = await browser.newPage()
  const errors: string[] = []
  const requests: string[] = []
  page.on('pageerror', (error) => errors.push(String(error)))
  page.on('console', (message) => errors.push(message.text()))
  page.on('request', (request) => { if (request.url() !== url && !request.url().startsWith('data:')) requests.push(request.url()) })
  await page.setViewport({ width, height: 844 })
  await page.emulateMediaFeatures([{ name: 'prefers-color-scheme', value: scheme }])
  await page.goto(url)
  const seen = await page.evaluate(inPage) as Omit<Seen, 'errors' | 'requests'>
  const screenshots = process.env['COUPLET_SCREENSHOTS']
  if (screenshots) {
    mkdirSync(screenshots, { recursive: true })
    await page.screenshot({ path: join(screenshots, `${name}-${width}-${scheme}.png`), fullPage: true }) // to be looked at
  }
  await page.close()
  return { errors, requests, ...seen }
}

/** Runs in the page, as text: the types of a browser are not this project's. */
const inPage = String.raw`(() => {
  const root = document.documentElement
  const background = getComputedStyle(document.body).backgroundColor
  const cut = [], tiny = [], faint = []
  const luminance = (color) => {
    const [r, g, b] = color.match(/[\d.]+/g).slice(0, 3).map((part) => part / 255).map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
  }
  const contrast = (a, b) => (Math.max(luminance(a), luminance(b)) + 0.05) / (Math.min(luminance(a), luminance(b)) + 0.05)
  const ground = (svg, x, y) => {
    const under = [...svg.querySelectorAll('.mark-rect path')].filter((path) => {
      const box = path.getBoundingClientRect()
      const fill = getComputedStyle(path).fill
      return fill !== 'none' && !/, 0\)$/.test(fill) && box.left <= x && x <= box.right && box.top <= y && y <= box.bottom
    })
    return under.length > 0 ? getComputedStyle(under.at(-1)).fill : background
  }
  for (const svg of document.querySelectorAll('svg')) {
    const frame = svg.getBoundingClientRect()
    for (const text of svg.querySelectorAll('text')) {
      const box = text.getBoundingClientRect()
      // A text with an outline is the halo of another.
      if (box.width === 0 || getComputedStyle(text).opacity === '0' || getComputedStyle(text).stroke !== 'none') continue
      if (box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 1 || box.bottom > frame.bottom + 1) cut.push(text.textContent)
      if (parseFloat(getComputedStyle(text).fontSize) * frame.width / svg.viewBox.baseVal.width < 8) tiny.push(text.textContent)
      if (contrast(getComputedStyle(text).fill, ground(svg, box.left + box.width / 2, box.top + box.height / 2)) < 3) faint.push(text.textContent)
    }
  }
  const shapes = [...document.querySelectorAll('.role-mark path, .role-mark line, .role-mark text')]
  const colorOf = (shape) => { const { fill, stroke } = getComputedStyle(shape); return fill === 'none' || fill === 'rgba(0, 0, 0, 0)' ? stroke : fill }
  return {
    charts: document.querySelectorAll('svg').length, marks: shapes.length, overflow: root.scrollWidth - root.clientWidth,
    cut, tiny, faint, colors: shapes.map(colorOf), background, text: document.body.innerText,
  }
})()`

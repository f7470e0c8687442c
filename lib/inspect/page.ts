/** A page of pictures: one HTML file without scripts, fonts or links, for a phone and for a desktop, light and dark. */
import { loadDrawing } from './draw'
import type { ChartSpec } from './draw'

export interface Figure {
  /** Stands above it. */
  title?: string | undefined
  spec: ChartSpec
  /** For those who do not see it. */
  description: string
  /** 'half': two beside one another even on a phone. Default 'full'. */
  width?: 'half' | 'full' | undefined
}

/** What a colour or a line stands for. */
export interface LegendEntry {
  /** A CSS colour. */
  color: string
  label: string
  /** Default 'dot'. */
  mark?: 'dot' | 'line' | 'dashed' | 'square' | undefined
}

/** A strip of colours from the least to the greatest value. */
export interface Ramp {
  colors: readonly string[]
  from: string
  to: string
}

export interface Table {
  head: readonly string[]
  /** The first cell of a row is its name. */
  rows: readonly (readonly string[])[]
  /** Stands behind a line to open it. */
  folded?: string | undefined
}

export interface Section {
  /** What the pictures show. */
  title: string
  figures?: readonly Figure[] | undefined
  legend?: readonly LegendEntry[] | undefined
  ramp?: Ramp | undefined
  table?: Table | undefined
  /** How to read it, a paragraph each. */
  notes?: readonly string[] | undefined
}

export interface Page {
  title: string
  /** What was measured, on what. */
  lead: string
  sections: readonly Section[]
}

/** Colours that a CSS variable names; the ramps are of one hue, and of two for signed numbers. Told apart by people who confuse red and green. */
export const palette = {
  ink: 'var(--ink)', muted: 'var(--muted)', rule: 'var(--rule)', key: 'var(--key)', value: 'var(--value)',
  series: Array.from({ length: 8 }, (_, i) => `var(--s${i})`),
  sequential: Array.from({ length: 9 }, (_, i) => `var(--q${i})`),
  diverging: Array.from({ length: 11 }, (_, i) => `var(--d${i})`),
} as const

const light = {
  paper: '#ffffff', ink: '#1b1f24', muted: '#57606a', rule: '#afb8c1', grid: '#e7ebef', key: '#0072b2', value: '#d55e00',
  s: ['#0072b2', '#d55e00', '#009e73', '#cc79a7', '#8a6d00', '#56b4e9', '#e69f00', '#6e7781'],
  q: ['#f1f5fa', '#dce7f3', '#c2d7eb', '#9fc3e0', '#73aad2', '#478fc2', '#2373ae', '#0b5795', '#083b70'],
  d: ['#9b3a00', '#c75f18', '#e08d4f', '#efb98e', '#f8dfca', '#f6f7f8', '#cfe2f0', '#98c3e0', '#5a9dcb', '#2475ae', '#084f86'],
}
const dark = {
  paper: '#14171b', ink: '#e6e9ec', muted: '#a2abb4', rule: '#535b64', grid: '#272c32', key: '#56b4e9', value: '#f28e3c',
  s: ['#56b4e9', '#f28e3c', '#2fc397', '#e59cc5', '#e3c94f', '#8f9bff', '#e69f00', '#8b949e'],
  q: ['#1b2026', '#1d2c3b', '#203b53', '#244d6f', '#2b628d', '#377aab', '#4f95c8', '#7cb5e0', '#b9daf4'],
  d: ['#ffb27d', '#ee8f4b', '#c46d2d', '#8f4f22', '#56351f', '#20252b', '#1e3a50', '#265a80', '#347db0', '#5aa4d6', '#97cdf2'],
}

function variables(colors: typeof light): string {
  return Object.entries(colors)
    .flatMap(([name, value]) => typeof value === 'string' ? [`--${name}:${value}`] : value.map((color, i) => `--${name}${i}:${color}`))
    .join(';')
}

const style = `
:root{color-scheme:light dark;${variables(light)}}
@media (prefers-color-scheme:dark){:root{${variables(dark)}}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:1080px;margin:0 auto;padding:20px 16px 48px}
h1{font-size:1.5rem;line-height:1.25;margin:.2em 0}
h2{font-size:1.15rem;line-height:1.3;margin:2.4em 0 .5em}
p{margin:.5em 0;max-width:74ch}
.lead,.note{color:var(--muted)}
.note{font-size:.9rem}
.figures{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,380px),1fr));gap:16px 24px}
.halves{grid-template-columns:repeat(auto-fill,minmax(min(44%,220px),1fr))}
figure{margin:0;min-width:0}
figure .mark-rect path{shape-rendering:crispEdges}
figcaption{font-size:.85rem;font-weight:600}
figure svg{display:block;width:100%;height:auto}
.legend{display:flex;flex-wrap:wrap;gap:4px 16px;margin:.5em 0;padding:0;list-style:none;font-size:.85rem;color:var(--muted)}
.legend li{display:flex;align-items:center;gap:6px}
.legend i{display:inline-block;width:10px;height:10px;border-radius:50%;background:currentColor}
.legend .square{border-radius:2px}
.legend .line,.legend .dashed{width:18px;height:0;border-radius:0;background:none;border-top:2px solid}
.legend .dashed{border-top-style:dashed}
.ramp i{width:18px;border-radius:0;margin:0 -6px 0 0}
.ramp i:last-of-type{margin-right:0}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.85rem;margin:.8em 0}
th,td{padding:3px 10px;text-align:right;border-bottom:1px solid var(--grid);white-space:nowrap;font-variant-numeric:tabular-nums}
th:first-child,td:first-child{text-align:left;padding-left:0}
th{color:var(--muted);font-weight:600}
summary{cursor:pointer;color:var(--muted);font-size:.9rem;margin:.8em 0}
`.trim()

/** @throws {CoupletError} `ERR_COUPLET_MISSING_PACKAGE` */
export async function renderPage({ title, lead, sections }: Page): Promise<string> {
  const draw = await loadDrawing()
  const parts: string[] = []
  for (const section of sections) parts.push(await renderSection(section, draw))
  return `<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>${escape(title)}</title>
<link rel="icon" href="data:,">
<style>
${style}
</style>
</head>
<body>
<main>
<h1>${escape(title)}</h1>
<p class="lead">${escape(lead)}</p>
${parts.join('\n')}
</main>
</body>
</html>
`
}

async function renderSection(section: Section, draw: (spec: ChartSpec) => Promise<string>): Promise<string> {
  const { title, figures = [], legend = [], ramp, table, notes = [] } = section
  const lines = ['<section>', `<h2>${escape(title)}</h2>`]
  if (legend.length > 0) {
    const entries = legend.map(({ color, label, mark = 'dot' }) => `<li><i class="${mark}" style="color:${escape(color)}"></i>${escape(label)}</li>`)
    lines.push(`<ul class="legend">${entries.join('')}</ul>`)
  }
  if (ramp) {
    const steps = ramp.colors.map((color) => `<i class="square" style="color:${escape(color)}"></i>`).join('')
    lines.push(`<ul class="legend ramp"><li>${escape(ramp.from)}${steps}${escape(ramp.to)}</li></ul>`)
  }
  for (const width of ['full', 'half'] as const) {
    const some = figures.filter((figure) => (figure.width ?? 'full') === width)
    if (some.length === 0) continue
    lines.push(`<div class="figures${width === 'half' ? ' halves' : ''}">`)
    for (const { title: caption, spec, description } of some) {
      const head = caption === undefined ? '' : `<figcaption>${escape(caption)}</figcaption>`
      lines.push(`<figure>${head}${framed(await draw(spec), description)}</figure>`)
    }
    lines.push('</div>')
  }
  if (table) lines.push(renderTable(table))
  lines.push(...notes.map((note) => `<p class="note">${escape(note)}</p>`), '</section>')
  return lines.join('\n')
}

/** As wide as its place, but for drawings that would become coarse. */
function framed(svg: string, description: string): string {
  const width = Number(/ width="([\d.]+)"/.exec(svg)?.[1] ?? 0)
  return svg.replace('<svg', `<svg role="img" aria-label="${escape(description)}" style="max-width:${Math.round(1.35 * width)}px"`)
}

function renderTable({ head, rows, folded }: Table): string {
  const cells = (row: readonly string[], tag: 'th' | 'td') => `<tr>${row.map((cell) => `<${tag}>${escape(cell)}</${tag}>`).join('')}</tr>`
  const table = `<div class="scroll"><table><thead>${cells(head, 'th')}</thead><tbody>${rows.map((row) => cells(row, 'td')).join('')}</tbody></table></div>`
  return folded === undefined ? table : `<details><summary>${escape(folded)}</summary>${table}</details>`
}

const entities: Record<string, string> = { '&': '&amp;', '<': '&lt;', '>': '&gt;', '"': '&quot;', "'": '&#39;' }

export function escape(text: string): string {
  return text.replace(/[&<>"']/g, (character) => entities[character]!)
}

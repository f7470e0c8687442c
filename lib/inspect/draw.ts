/** From a Vega-Lite specification to SVG text. vega and vega-lite are optional: loaded when something is drawn. */
import type { parse, View } from 'vega'
import type { compile, TopLevelSpec } from 'vega-lite'
import { codeOf, CoupletError } from '../errors'

export type ChartSpec = TopLevelSpec

/** What charts have in common. Colours are the page's variables, so that one drawing serves light and dark. */
const config = {
  aria: false, // the page describes each picture as a whole
  background: 'transparent',
  font: 'system-ui, sans-serif',
  padding: 2,
  view: { stroke: null },
  axis: {
    labelColor: 'var(--muted)', titleColor: 'var(--muted)', domainColor: 'var(--rule)', tickColor: 'var(--rule)', gridColor: 'var(--grid)',
    labelFontSize: 11, titleFontSize: 11, titleFontWeight: 'normal', labelFont: 'system-ui, sans-serif', titleFont: 'system-ui, sans-serif',
    tickSize: 3, titlePadding: 6,
  },
  text: { font: 'system-ui, sans-serif', fontSize: 11, fill: 'var(--ink)' },
} as const

/**
 * Loads vega and vega-lite.
 * @returns draws a chart as an `<svg>` element without a colour of its own
 * @throws {CoupletError} `ERR_COUPLET_MISSING_PACKAGE`, saying what to install
 */
export async function loadDrawing(): Promise<(spec: ChartSpec) => Promise<string>> {
  const vega = await importVega()
  let drawn = 0
  return async (spec) => {
    const { spec: compiled } = vega.compile({ ...spec, config: { ...config, ...spec.config } })
    const view = new vega.View(vega.parse(compiled), { renderer: 'none' })
    const svg = await view.toSVG()
    view.finalize()
    // Clip paths and gradients are named alike in every drawing, but a page has one name space.
    const prefix = `chart${drawn++}-`
    return svg
      .replace(/ id="([^"]+)"/g, ` id="${prefix}$1"`)
      .replace(/url\(#([^)]+)\)/g, `url(#${prefix}$1)`)
      .replace(/ xmlns(:xlink)?="[^"]*"/g, '') // inline in HTML, an svg element needs none
      .replace(/ fill="transparent"\/>/g, ' fill="none"/>')
  }
}

async function importVega(): Promise<{ View: typeof View; parse: typeof parse; compile: typeof compile }> {
  try {
    const [vega, vegaLite] = await Promise.all([import('vega'), import('vega-lite')])
    return { View: vega.View, parse: vega.parse, compile: vegaLite.compile }
  } catch (cause) {
    if (codeOf(cause) !== 'ERR_MODULE_NOT_FOUND') throw cause
    throw new CoupletError('ERR_COUPLET_MISSING_PACKAGE', 'Pictures are drawn by vega and vega-lite. Install them with `npm install vega vega-lite`', { cause })
  }
}

/** Charts that pages are made of: data to Vega-Lite specifications. */
import type { ChartSpec } from './draw'
import { palette } from './page'

type Values = Record<string, number | string>[]

/** A number beside another: what an axis says. */
export interface Axis {
  title: string
  domain?: readonly [number, number] | undefined
  /** d3's notation, such as '.0%'. */
  format?: string | undefined
  /** Values that have a tick. */
  values?: readonly number[] | undefined
  log?: boolean | undefined
}

export interface Line {
  color: string
  dashed?: boolean | undefined
  /** A mark at each point, hollow where there is no line. */
  dots?: 'circle' | 'diamond' | 'triangle-down' | undefined
  noLine?: boolean | undefined
  filled?: boolean | undefined
  /** Square pixels of a dot; default 24. */
  size?: number | undefined
  /** From point to point along the axes: what holds until something better comes. */
  stepped?: boolean | undefined
  points: readonly (readonly [x: number, y: number])[]
}

export interface Label {
  at: readonly [x: number, y: number]
  text: string
  color: string
  side: 'left' | 'right' | 'above' | 'below'
}

export interface LineChart {
  x: Axis
  y: Axis
  lines: readonly Line[]
  /** A vertical line, and a horizontal one. */
  markX?: number | undefined
  markY?: number | undefined
  /** Beside points. */
  labels?: readonly Label[] | undefined
  width?: number | undefined
  height?: number | undefined
}

const axisOf = ({ title, format = '~g', values, domain }: Axis) => {
  const shown = values?.filter((value) => !domain || (value >= domain[0] && value <= domain[1]))
  // An expression, since d3's own format of a logarithmic scale leaves labels out.
  return { title, labelExpr: `format(datum.value, '${format}')`, ...(shown ? { values: shown } : { tickCount: 5 }), labelOverlap: shown === undefined }
}
const scaleOf = ({ domain, log }: Axis) =>
  ({ ...(log ? { type: 'log' as const, base: 2 } : {}), ...(domain ? { domain: [...domain], nice: false } : {}), ...(log || domain ? {} : { zero: true }) })

/** Of text that stands on lines. */
const halo = { stroke: 'var(--paper)', strokeWidth: 3, strokeJoin: 'round' as const, fill: 'var(--paper)' }

/** Lines over a common pair of axes, in their order. */
export function lineChart({ x, y, lines, markX, markY, labels = [], width = 320, height = 190 }: LineChart): ChartSpec {
  const values: Values = lines.flatMap(({ points }, line) => points.map(([px, py]) => ({ line, x: px, y: py })))
  const encoding = {
    x: { field: 'x', type: 'quantitative' as const, axis: { ...axisOf(x), grid: false }, scale: scaleOf(x) },
    y: { field: 'y', type: 'quantitative' as const, axis: { ...axisOf(y), domain: false, ticks: false }, scale: scaleOf(y) },
  }
  const only = (line: number) => [{ filter: `datum.line === ${line}` }]
  const layer = lines.flatMap(({ color, dashed, dots, noLine, filled = !noLine, size = 24, stepped }, line) => [
    ...(noLine ? [] : [{
      transform: only(line), encoding, mark: { type: 'line' as const, color, strokeWidth: dashed ? 1.4 : 1.9, ...(dashed && { strokeDash: [4, 3] }),
        ...(stepped && { interpolate: 'step-after' as const }),
      },
    }]),
    ...(dots ? [{ transform: only(line), encoding, mark: { type: 'point' as const, shape: dots, color, filled, size, opacity: 1, strokeWidth: 1.2 } }] : []),
  ])
  const rule = (channel: 'x' | 'y', at: number) => ({
    data: { values: [{ [channel]: at }] }, mark: { type: 'rule' as const, color: palette.muted, strokeDash: [2, 2], strokeWidth: 1 },
    encoding: { [channel]: encoding[channel] },
  })
  const write = ({ at: [px, py], text, color, side }: Label) => {
    const place = {
      right: { align: 'left', dx: 7 }, left: { align: 'right', dx: -7 }, above: { align: 'center', dy: -11 }, below: { align: 'center', dy: 12 },
    } as const
    const mark = { type: 'text' as const, fontSize: 10, ...place[side] }
    return {
      data: { values: [{ x: px, y: py, text }] }, encoding: { ...encoding, text: { field: 'text' } },
      layer: [{ mark: { ...mark, ...halo } }, { mark: { ...mark, fill: color } }],
    }
  }
  return {
    width, height, data: { values },
    layer: [...(markX === undefined ? [] : [rule('x', markX)]), ...(markY === undefined ? [] : [rule('y', markY)]), ...layer, ...labels.map(write)],
  }
}

export interface Matrix {
  rows: number
  columns: number
  /** [rows][columns] numbers of classes. */
  classes: ArrayLike<number>
  colors: readonly string[]
  rowTitle: string
  columnTitle: string
  /** Written into the cells, [rows][columns]. */
  labels?: readonly string[] | undefined
  /** Of a cell. */
  cell: { width: number; height: number }
}

/** Coloured cells; neighbours of one class in a row are one rectangle, unless they have labels. */
export function matrixChart({ rows, columns, classes, colors, rowTitle, columnTitle, labels, cell }: Matrix): ChartSpec {
  const values: Values = []
  for (let row = 0; row < rows; row++) {
    for (let from = 0; from < columns;) {
      const own = classes[row * columns + from]!
      let to = from + 1
      while (!labels && to < columns && classes[row * columns + to] === own) to++
      values.push({ from, to, row, below: row + 1, own, label: labels?.[row * columns + from] ?? '' })
      from = to
    }
  }
  // Ticks name cells, so that they stand in their middle.
  const axis = (count: number, name: string) => {
    const step = Math.max(1, 2 ** Math.ceil(Math.log2(count / 8)))
    const at = Array.from({ length: Math.ceil(count / step) }, (_, i) => i * step + 0.5)
    return { title: name, values: at, labelExpr: 'format(datum.value - 0.5, "d")', grid: false, domain: false, ticks: false, labelPadding: 3 }
  }
  const quantitative = (field: string, count: number) =>
    ({ field, type: 'quantitative' as const, scale: { domain: [0, count], nice: false, zero: false } })
  const x = { ...quantitative('from', columns), axis: axis(columns, columnTitle) }
  const y = { field: 'row', type: 'quantitative' as const, scale: { domain: [0, rows], nice: false, zero: false, reverse: true }, axis: axis(rows, rowTitle) }
  return {
    width: columns * cell.width, height: rows * cell.height, data: { values },
    layer: [
      {
        mark: { type: 'rect' },
        encoding: {
          x, x2: { field: 'to' }, y, y2: { field: 'below' },
          color: { field: 'own', type: 'ordinal', legend: null, scale: { domain: colors.map((_, i) => i), range: [...colors] } },
        },
      },
      ...(labels ? [{
        transform: [{ calculate: '(datum.from + datum.to) / 2', as: 'middle' }, { calculate: 'datum.row + 0.5', as: 'centre' }],
        mark: { type: 'text' as const, fontSize: 10 },
        encoding: {
          x: { ...quantitative('middle', columns), axis: x.axis }, y: { ...y, field: 'centre' }, text: { field: 'label' },
          // The ramps begin near the paper's colour and end near the ink's.
          color: { condition: { test: `datum.own > ${Math.floor(colors.length / 2)}`, value: 'var(--paper)' }, value: palette.ink },
        },
      }] : []),
    ],
  }
}

export interface Bars {
  x: Axis
  /** Top to bottom. */
  bars: readonly { name: string; parts: readonly { value: number; color: string }[]; label?: string | undefined }[]
  /** A vertical line. */
  markX?: number | undefined
  nameTitle?: string | undefined
  width?: number | undefined
}

/** Horizontal bars of parts, and a label at the end of each. */
export function barChart({ x, bars, markX, nameTitle, width = 280 }: Bars): ChartSpec {
  const colors = [...new Set(bars.flatMap(({ parts }) => parts.map(({ color }) => color)))]
  const values: Values = bars.flatMap(({ name, parts }) => {
    let end = 0
    return parts.map(({ value, color }) => ({ name, color, from: end, to: (end += value) }))
  })
  const ends: Values = bars.map(({ name, parts, label }) => ({ name, to: parts.reduce((sum, { value }) => sum + value, 0), label: label ?? '' }))
  const names = bars.map(({ name }) => name)
  const bare = { domain: false, ticks: false }
  const y = {
    field: 'name', type: 'nominal' as const, scale: { domain: names, paddingInner: 0.3, paddingOuter: 0.15 },
    axis: { title: nameTitle ?? null, labelLimit: 120, ...bare },
  }
  const along = (field: string) => ({ field, type: 'quantitative' as const, axis: { ...axisOf(x), ...bare }, scale: scaleOf(x) })
  return {
    width, height: { step: 22 },
    layer: [
      {
        data: { values }, mark: { type: 'bar' },
        encoding: {
          y, x: along('from'), x2: { field: 'to' }, color: { field: 'color', type: 'nominal', legend: null, scale: { domain: colors, range: colors } },
        },
      },
      ...(markX === undefined ? [] : [{
        data: { values: [{ to: markX }] }, mark: { type: 'rule' as const, color: palette.ink, strokeDash: [3, 2] }, encoding: { x: along('to') },
      }]),
      ...[halo, {}].map((outline) => ({
        data: { values: ends }, mark: { type: 'text' as const, align: 'left' as const, dx: 4, ...outline },
        encoding: { y, x: along('to'), text: { field: 'label' } },
      })),
    ],
  }
}

import type { Label, Line } from './charts'
import { lineChart } from './charts'
import { count, percent, round } from './format'
import type { Figure, Section, Table } from './page'
import { palette, renderPage } from './page'
import type { QualityPoint } from './quality'

export interface QualityReport {
  /** Of the model. */
  name: string
  /** In full precision. */
  perplexity: number
  /** Predictions, and tokens of a chunk. */
  tokens: number
  length: number
  points: readonly QualityPoint[]
}

/**
 * A page of perplexity against bits, one picture for each choice of sinks and window: one HTML file that opens from disk. Needs the
 * packages vega and vega-lite.
 *
 * @throws {CoupletError} `ERR_COUPLET_MISSING_PACKAGE` when they are not installed
 */
export function qualityPage(report: QualityReport): Promise<string> {
  const { name, perplexity, tokens, length, points } = report
  const kept = [...new Map(points.map(({ sinks, window }) => [`${sinks} ${window}`, { sinks, window }])).values()]
  kept.sort((a, b) => a.window - b.window || a.sinks - b.sinks)
  return renderPage({
    title: `Perplexity by bits: ${name}`,
    lead: `${count(tokens)} predictions in chunks of ${length} tokens; in full precision the perplexity is ${perplexity.toFixed(3)}.`,
    sections: kept.flatMap(({ sinks, window }) => sectionsOf(report, points.filter((point) => point.sinks === sinks && point.window === window))),
  })
}

const colors = { subject: palette.value, couplet: palette.key, rival: palette.muted } as const

/** Of a method's name: what stands before its numbers. */
const familyOf = ({ name, isSubject }: QualityPoint): string => (isSubject ? 'measured here' : /^[a-z]*/.exec(name)?.[0] ?? name)
const isCouplet = (point: QualityPoint): boolean => point.isSubject === true || familyOf(point) === 'cq'
const colorOf = (point: QualityPoint): string => point.isSubject ? colors.subject : isCouplet(point) ? colors.couplet : colors.rival
const familyNames: Record<string, string> = {
  int: 'integers', nf: 'NormalFloat', kvquant: 'KVQuant', kivi: 'KIVI', kitty: 'Kitty', vidkv: 'VidKV', calibquant: 'CalibQuant', turboquant: 'TurboQuant',
  nsnquant: 'NSNQuant', vecinfer: 'VecInfer',
}

/** Perplexities closer to full precision than this share of it are drawn at the lower edge: a text of some thousand tokens tells no better. */
const leastExcess = 0.001

function sectionsOf({ perplexity }: QualityReport, points: readonly QualityPoint[]): Section[] {
  const { sinks, window } = points[0]!
  const floor = leastExcess * perplexity
  const excess = (point: QualityPoint) => Math.max(point.perplexity - perplexity, floor)
  const placed = points.map((point): Placed => ({ point, at: [point.bits, excess(point)] }))
  const rivals = placed.filter(({ point }) => !isCouplet(point))
  const own = placed.filter(({ point }) => isCouplet(point))
  const hasBoth = rivals.length > 0 && own.length > 0
  const axes = {
    x: { title: 'bits per channel of a coded token', log: true, domain: bitsDomain(points), values: [0.5, 0.75, 1, 1.5, 2, 3, 4, 6, 8], format: '~g' },
    y: {
      title: 'perplexity above full precision', log: true, domain: [0.8 * floor, 1.5 * Math.max(10 * floor, ...points.map(excess))] as const,
      values: decades, format: '~g',
    },
  }
  const marks = (some: readonly Placed[]) => dots(some, floor)
  const whole: Figure = {
    description: 'Perplexity against bits per channel, all methods',
    spec: lineChart({
      ...axes, ...wholeSize, lines: [edgeLine(placed, axes.x.domain[1]), ...marks(rivals), ...marks(own)],
      labels: labelsOf(placed, axes.x.domain, axes.y.domain),
    }),
  }
  const families = hasBoth ? [...new Set(rivals.map(({ point }) => familyOf(point)))] : []
  const small = families.map((family): Figure => ({
    width: 'half', title: familyNames[family] ?? family, description: `Perplexity against bits per channel: ${family} beside couplet`,
    spec: lineChart({
      x: { ...axes.x, title: 'bits', values: [1, 2, 4] }, y: { ...axes.y, title: 'excess' }, width: 150, height: 120,
      lines: [edgeLine(own, axes.x.domain[1]), ...marks(rivals.filter(({ point }) => familyOf(point) === family))],
    }),
  }))
  const title = window === 0 && sinks === 0 ? 'Every token coded' : `${sinks} sinks and a window of ${window} in full precision`
  const atFloor = placed.filter(({ at }) => at[1] === floor).length
  return [{
    title: `${title}: ${finding(points, perplexity)}`,
    legend: [
      ...(points.some(({ isSubject }) => isSubject) ? [{ color: colors.subject, label: 'measured here', mark: 'square' as const }] : []),
      ...(own.some(({ point }) => !point.isSubject) ? [{ color: colors.couplet, label: 'couplet, from the figures given' }] : []),
      ...(rivals.length > 0 ? [{ color: colors.rival, label: 'other methods' }] : []),
      { color: palette.muted, label: 'lowest so far', mark: 'line' },
    ],
    figures: [whole, ...(families.length > 1 ? small : [])],
    table: tableOf(points),
    notes: [
      'Lower and further left is better; both axes are logarithmic. Bits are those of a coded token with every overhead that is stored for it; tokens '
      + `in full precision and tables that all sequences share are not in them.${atFloor > 0 ? ` Triangles: within ${percent(leastExcess, 1)} of full precision, or below it.` : ''}`,
      ...(families.length > 1 ? ['Below the large picture each other method by itself; the line is the lowest perplexity of couplet’s own points.'] : []),
    ],
  }]
}

/** A point, and where it is drawn. */
interface Placed {
  point: QualityPoint
  at: readonly [bits: number, excess: number]
}

const decades = [0.001, 0.01, 0.1, 1, 10, 100, 1000, 10000]
const wholeSize = { width: 350, height: 260 }

function tableOf(points: readonly QualityPoint[]): Table {
  const sorted = [...points].sort((a, b) => a.bits - b.bits || a.perplexity - b.perplexity)
  const rows = sorted.map(({ name, bits, perplexity, divergence, agreement }) => [
    name, bits.toFixed(3), perplexityText(perplexity), divergence?.toFixed(4) ?? '', agreement === undefined ? '' : percent(agreement, 1),
  ])
  return { folded: 'All methods in numbers', head: ['', 'bits', 'perplexity', 'KL', 'top-1'], rows }
}

const perplexityText = (perplexity: number): string => (perplexity < 1000 ? perplexity.toFixed(3) : perplexity.toExponential(1))

/** Points that nothing with as few bits beats, by bits. */
export function lowerEdge(points: readonly QualityPoint[]): QualityPoint[] {
  const sorted = [...points].sort((a, b) => a.bits - b.bits || a.perplexity - b.perplexity)
  return sorted.filter((point, i) => sorted.slice(0, i).every((earlier) => earlier.perplexity > point.perplexity))
}

function bitsDomain(points: readonly QualityPoint[]): readonly [number, number] {
  const bits = points.map((point) => point.bits)
  return [Math.min(...bits) * 0.88, Math.max(...bits, Math.min(...bits) * 2) * 1.12]
}

function edgeLine(placed: readonly Placed[], most: number): Line {
  const edge = lowerEdge(placed.map(({ point }) => point))
  const points = placed.filter(({ point }) => edge.includes(point)).map(({ at }) => at).sort((a, b) => a[0] - b[0])
  const last = points.at(-1)
  return { color: palette.rule, stepped: true, points: last ? [...points, [most, last[1]]] : [] }
}

function dots(placed: readonly Placed[], floor: number): Line[] {
  const kinds = [...new Set(placed.map(({ point }) => colorOf(point)))].flatMap((color) => [false, true].map((isFloor) => ({ color, isFloor })))
  return kinds.map(({ color, isFloor }): Line => ({
    color, noLine: true, filled: color !== colors.rival, dots: isFloor ? 'triangle-down' : color === colors.subject ? 'diamond' : 'circle',
    size: color === colors.subject ? 60 : 26,
    points: placed.filter(({ point, at }) => colorOf(point) === color && (at[1] === floor) === isFloor).map(({ at }) => at),
  }))
}

interface Box { left: number; right: number; top: number; bottom: number }

/** Names beside points: what was measured here first, then the edge, as far as there is room. */
function labelsOf(placed: readonly Placed[], bits: readonly [number, number], excess: readonly [number, number]): Label[] {
  const { width, height } = wholeSize
  const along = (value: number, [from, to]: readonly [number, number]) => Math.log(value / from) / Math.log(to / from)
  const pixel = ({ at }: Placed) => ({ x: width * along(at[0], bits), y: height * (1 - along(at[1], excess)) })
  const edge = lowerEdge(placed.map(({ point }) => point))
  const wanted = [...placed.filter(({ point }) => point.isSubject), ...placed.filter(({ point }) => !point.isSubject && edge.includes(point))]
  const taken: Box[] = placed.map(pixel).map(({ x, y }) => ({ left: x - 3, right: x + 3, top: y - 3, bottom: y + 3 }))
  const labels: Label[] = []
  for (const one of wanted) {
    const { x, y } = pixel(one)
    const { name } = one.point
    const length = 5.4 * name.length
    const box = (left: number, top: number): Box => ({ left, right: left + length, top, bottom: top + 12 })
    const boxes = { right: box(x + 6, y - 6), left: box(x - 6 - length, y - 6), above: box(x - length / 2, y - 17), below: box(x - length / 2, y + 5) }
    const isFree = ({ left, right, top, bottom }: Box) => left >= 0 && right <= width && top >= 0 && bottom <= height
      && taken.every((other) => right < other.left || left > other.right || bottom < other.top || top > other.bottom)
    const side = (['right', 'above', 'below', 'left'] as const).find((candidate) => isFree(boxes[candidate]))
    if (!side) continue
    taken.push(boxes[side])
    labels.push({ at: one.at, text: name, color: isCouplet(one.point) ? colorOf(one.point) : palette.ink, side })
  }
  return labels
}

/** Of what was measured here (else of couplet's), the one of fewest bits, beside the best rival of as few. */
function finding(points: readonly QualityPoint[], perplexity: number): string {
  const own = points.filter(({ isSubject }) => isSubject)
  const candidates = own.length > 0 ? own : points.filter(isCouplet)
  const subject = best(candidates.filter(({ bits }) => bits <= Math.min(...candidates.map((point) => point.bits)) * 1.05))
  if (!subject) return `the lowest perplexity is ${best(points)!.perplexity.toFixed(3)}, by ${best(points)!.name}`
  const rival = best(points.filter((point) => !isCouplet(point) && point.bits <= subject.bits * 1.05))
  const above = subject.perplexity - perplexity
  const reached = `${subject.name} at ${round(subject.bits)} bit${subject.bits === 1 ? '' : 's'} has ${perplexityText(subject.perplexity)}, `
    + `${Math.abs(above).toFixed(3)} ${above >= 0 ? 'above' : 'below'} full precision`
  return rival ? `${reached}; the best other method of as few bits, ${rival.name}, ${perplexityText(rival.perplexity)}` : reached
}

function best(points: readonly QualityPoint[]): QualityPoint | undefined {
  return [...points].sort((a, b) => a.perplexity - b.perplexity)[0]
}

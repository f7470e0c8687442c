/** The file of figures, and the tables made of it. */
import { createHash } from 'node:crypto'
import { existsSync, readdirSync, readFileSync, renameSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { machine } from '../report'
import type { Kept } from './attention'
import type { Figures } from './evaluate'
import type { Method } from './methods/method'

export interface ResultRow extends Figures {
  method: string
  width: number
  /** Not a setting of the paper, but the paper's formula at another width. */
  extended: boolean
  sinks: number
  window: number
  /** Of everything that the figures depend on; see {@link keyOf}. */
  key: string
}

/** What was evaluated. */
export interface Subject {
  /** Fingerprint. */
  model: string
  /** SHA-256 of the token ids. */
  calibration: string
  text: string
  calibrationTokens: number
  tokens: number
  length: number
  /** Perplexity in full precision. */
  perplexity: number
}

export interface ResultFile {
  machine: Record<string, unknown>
  subject: Subject
  rows: ResultRow[]
}

export const hash = (...parts: (string | Uint8Array)[]): string => {
  const sum = createHash('sha256')
  for (const part of parts) sum.update(part).update('\0')
  return sum.digest('hex').slice(0, 16)
}

/** Source that figures of every method depend on, and that of the methods that are built of it. */
const harness = ['layers.ts', 'attention.ts', 'calibration.ts', 'evaluate.ts', 'methods/method.ts', 'methods/product.ts']

const sources = new Map<string, Uint8Array>()

/** Equal keys: same code of the method and of what evaluates it, same model, texts, sinks and window. */
export function keyOf(method: Method & { identity?: string }, { sinks, window }: Kept, subject: Subject): string {
  const { model, calibration, text, length } = subject
  const code = [...harness, `methods/${method.file}`].map((file) => {
    const known = sources.get(file) ?? readFileSync(join(__dirname, file))
    sources.set(file, known) // as it was when this process began, whatever is edited while it runs
    return known
  })
  const identity = method.identity === undefined ? [] : [method.identity]
  return hash(method.name, ...identity, String(sinks), String(window), model, calibration, text, String(length), ...code)
}

/** Rows of the newest file of figures in a folder, and of `path` itself. */
export function earlierRows(folder: string, path: string): Map<string, ResultRow> {
  const newest = existsSync(folder) ? readdirSync(folder).filter((name) => name.endsWith('-quality.json')).sort().at(-1) : undefined
  const files = [...(newest === undefined ? [] : [join(folder, newest)]), path].filter((file) => existsSync(file))
  return new Map(files.flatMap((file) => (JSON.parse(readFileSync(file, 'utf8')) as ResultFile).rows).map((row) => [row.key, row]))
}

/** Rows of a file of figures of the same model and texts, by methods that this run leaves alone. */
export function otherRows(path: string, subject: Subject, measured: readonly string[]): ResultRow[] {
  if (!existsSync(path)) return []
  const file = JSON.parse(readFileSync(path, 'utf8')) as ResultFile
  const isSame = (['model', 'calibration', 'text', 'length'] as const).every((name) => file.subject[name] === subject[name])
  return isSame ? file.rows.filter(({ method }) => !measured.includes(method)) : []
}

/** Whole or not at all: a run that is stopped leaves the rows before. */
export function saveResults(path: string, subject: Subject, rows: ResultRow[]): void {
  const round = (_: string, value: unknown) => typeof value === 'number' ? Number(value.toPrecision(7)) : value
  writeFileSync(`${path}.part`, `${JSON.stringify({ machine: machine('cpu'), subject, rows } satisfies ResultFile, round, 1)}\n`)
  renameSync(`${path}.part`, path)
}

/** A row of the table: the same method without and with tokens in full precision. */
interface Pair { plain: ResultRow; kept: ResultRow | undefined }

/** One table for each width, the lowest perplexity first, and what stands out. */
export function toMarkdown(subject: Subject, rows: readonly ResultRow[], widths: readonly number[]): string {
  const pairs: Pair[] = rows.filter(({ sinks, window }) => sinks === 0 && window === 0)
    .map((plain) => ({ plain, kept: rows.find((row) => row.method === plain.method && row.window > 0) }))
  const lines = [`Full precision: perplexity ${subject.perplexity.toFixed(4)}.`]
  for (const width of widths) {
    const table = pairs.filter(({ plain }) => plain.width === width).sort((a, b) => a.plain.perplexity - b.plain.perplexity)
    if (table.length === 0) continue
    lines.push('', `### ${width} bit`, '',
      '| method | bits | perplexity | KL | top-1 | perplexity, kept | KL | top-1 | shared |', '|---|---:|---:|---:|---:|---:|---:|---:|---:|')
    lines.push(...table.map(({ plain, kept }) => `| ${[
      `${plain.method}${plain.extended ? ' *' : ''}`, plain.bits.toFixed(3), ...figures(plain), ...(kept ? figures(kept) : ['', '', '']), kilobytes(plain.tableBytes),
    ].join(' | ')} |`))
    lines.push('', ...standOuts(width, table))
  }
  return lines.join('\n')
}

const figures = ({ perplexity, divergence, agreement }: ResultRow): string[] =>
  [perplexity < 1000 ? perplexity.toFixed(3) : perplexity.toExponential(1), divergence.toFixed(4), `${(100 * agreement).toFixed(1)} %`]

const kilobytes = (bytes: number): string => bytes === 0 ? '0' : `${Math.max(1, Math.round(bytes / 1024))} KiB`

/** Lowest perplexity of all, and of those whose bits keep to the width but for 5 %. */
function standOuts(width: number, table: readonly Pair[]): string[] {
  const lowest = (pairs: readonly Pair[], of: (pair: Pair) => number) => [...pairs].sort((a, b) => of(a) - of(b))[0]
  const within = table.filter(({ plain }) => plain.bits <= width * 1.05)
  const name = (pair: Pair | undefined) => pair ? `${pair.plain.method} (${pair.plain.bits.toFixed(2)} bits)` : 'none'
  const sentence = (title: string, of: (pair: Pair) => number) =>
    `${title}: ${name(lowest(table, of))}; of those within ${(width * 1.05).toFixed(2)} bits, ${name(lowest(within, of))}.`
  return [
    sentence('Lowest perplexity, every token coded', ({ plain }) => plain.perplexity),
    '', sentence('Lowest perplexity with sinks and window', ({ kept }) => kept?.perplexity ?? Infinity),
    '', sentence('Least divergence, every token coded', ({ plain }) => plain.divergence),
    '', sentence('Least divergence with sinks and window', ({ kept }) => kept?.divergence ?? Infinity),
  ]
}

/** Replaces what stands between the markers of a document. */
export function replaceBlock(path: string, name: string, text: string): void {
  const [begin, end] = [`<!-- ${name}: written by the benchmark -->`, `<!-- end of ${name} -->`]
  const document = readFileSync(path, 'utf8')
  const [before, rest] = document.split(begin)
  const after = rest?.split(end)[1]
  if (before === undefined || after === undefined) throw new Error(`${path} lacks the markers of ${name}`)
  writeFileSync(path, `${before}${begin}\n\n${text}\n\n${end}${after}`)
}

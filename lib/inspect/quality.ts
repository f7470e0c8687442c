/** Figures of quality from several sources, side by side: this evaluation's and those that bench/quality wrote. */
import { createHash } from 'node:crypto'
import { readFile } from 'node:fs/promises'
import { CoupletError } from '../errors'

/** A way to keep the cache, and what it costs and gives on one text. */
export interface QualityPoint {
  /** Such as `cq-8c8b:attention`, or a codebook's file. */
  name: string
  /** Bits of a coded token, a channel, with every overhead of the token; tokens in full precision and shared tables are apart. */
  bits: number
  perplexity: number
  /** Mean KL divergence from full precision, nats. */
  divergence?: number | undefined
  /** Share of predictions whose likeliest token is that of full precision. */
  agreement?: number | undefined
  sinks: number
  window: number
  /** What the page is about; otherwise it stands beside it. */
  isSubject?: boolean | undefined
}

/** What was evaluated: figures of another text or model have no place beside it. */
export interface QualitySubject {
  /** Fingerprint of the model. */
  model: string
  /** {@link textHash} */
  text: string
  /** Tokens of a chunk. */
  length: number
}

/** Of token ids, as bench/quality has it: 64 bits of a SHA-256, in hexadecimal digits. */
export function textHash(tokens: ArrayLike<number>): string {
  const bytes = Uint8Array.from(Array.from(tokens).flatMap((token) => [token & 255, (token >> 8) & 255, token >> 16]))
  return createHash('sha256').update(bytes).update('\0').digest('hex').slice(0, 16)
}

/**
 * Reads a file of figures that `npm run bench:quality` wrote.
 * @throws {CoupletError} `ERR_COUPLET_INVALID_ARGUMENT` for another kind of file, and for figures of another model, text or length of chunks
 */
export async function readQualityResults(path: string, expected: QualitySubject): Promise<QualityPoint[]> {
  const { subject, rows } = parseResults(await readFile(path, 'utf8'), path)
  const others = (['model', 'text', 'length'] as const).filter((name) => subject[name] !== expected[name])
  if (others.length > 0) {
    const side = (of: QualitySubject) => others.map((name) => `${name} ${of[name]}`).join(', ')
    throw invalid(`Expected figures of ${side(expected)} but "${path}" has those of ${side(subject)}`)
  }
  return rows.map(({ method: name, bits, perplexity, divergence, agreement, sinks, window }) => (
    { name, bits, perplexity, divergence, agreement, sinks, window }
  ))
}

interface Results {
  subject: QualitySubject
  rows: (Omit<QualityPoint, 'name'> & { method: string })[]
}

function parseResults(text: string, path: string): Results {
  try {
    const results = JSON.parse(text) as Partial<Results> | null
    const isRow = (row: Partial<Results['rows'][number]>) =>
      typeof row.method === 'string' && [row.bits, row.perplexity, row.sinks, row.window].every((value) => Number.isFinite(value))
    if (typeof results?.subject?.model === 'string' && Array.isArray(results.rows) && results.rows.every(isRow)) return results as Results
  } catch (cause) {
    throw Object.assign(invalid(`"${path}" is not JSON: ${(cause as Error).message}`), { cause })
  }
  throw invalid(`Expected a file of figures that npm run bench:quality wrote but "${path}" has neither \`subject\` nor \`rows\``)
}

const invalid = (message: string): CoupletError => new CoupletError('ERR_COUPLET_INVALID_ARGUMENT', message)

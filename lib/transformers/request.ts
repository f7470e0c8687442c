import { TokenList } from './tokens'
import type { OrtTensor } from './types'
import { invalid } from './errors'

/** What a step's past holds: the text of every row, and how many columns of the attention mask it takes. */
export interface Past {
  readonly texts: readonly TokenList[]
  readonly columns: number
}

/** One row of a batch: the text it stands for after the step, padding left out. */
export interface Row {
  readonly text: TokenList
  /** Tokens of `text` that this step brought. */
  readonly fresh: number
  /** Logits are asked of this many last tokens of `text`. */
  readonly wanted: number
}

/** What the feeds of one run() ask for. */
export interface Request {
  readonly rows: readonly Row[]
  /** Columns of input_ids. */
  readonly columns: number
  /** Columns of the logits: the last ones of input_ids. */
  readonly logitColumns: number
  /** [batch][columns]: 1 where input_ids holds a token, 0 where it holds padding. */
  readonly filled: Uint8Array
}

/**
 * Reads the feeds of a decoder step as transformers.js makes them. input_ids: int64 [batch, columns], the tokens which the
 * past does not hold; attention_mask: int64 [batch, past columns + columns], 0 for padding, all ones when absent;
 * num_logits_to_keep: int64 scalar, 1 inside generate(), 0 for all; position_ids: int64 [batch, columns], only checked.
 */
export function readRequest(feeds: Record<string, OrtTensor>, past: Past | undefined): Request {
  const ids = integers(feeds, 'input_ids')
  if (!ids || ids.dims.length !== 2) throw invalid('input_ids', 'int64 tensor [batch, tokens]', describe(feeds.input_ids))
  const [batch = 0, columns = 0] = ids.dims
  const pastColumns = past?.columns ?? 0
  if (past && past.texts.length !== batch) {
    throw invalid('input_ids', `${past.texts.length} rows, as past_key_values has`, String(batch))
  }
  const mask = integers(feeds, 'attention_mask')
  if (mask && (mask.dims[0] !== batch || mask.dims[1] !== pastColumns + columns)) {
    throw invalid('attention_mask', `int64 tensor [${batch}, ${pastColumns + columns}]`, describe(feeds.attention_mask))
  }
  const keep = Number(integers(feeds, 'num_logits_to_keep')?.data[0] ?? 0n)
  const logitColumns = keep > 0 ? Math.min(keep, columns) : columns
  const filled = new Uint8Array(batch * columns)
  const rows = Array.from({ length: batch }, (_, row): Row => {
    const before = past?.texts[row] ?? TokenList.of()
    const maskRow = mask?.data.subarray(row * (pastColumns + columns), (row + 1) * (pastColumns + columns))
    if (maskRow && count(maskRow.subarray(0, pastColumns)) !== before.length) {
      throw invalid('attention_mask', `${before.length} ones over the past of row ${row}, as when it was run`, String(count(maskRow.subarray(0, pastColumns))))
    }
    const fresh: number[] = []
    let wanted = 0
    for (let column = 0; column < columns; column += 1) {
      if (maskRow && maskRow[pastColumns + column] === 0n) continue
      filled[row * columns + column] = 1
      fresh.push(Number(ids.data[row * columns + column]))
      if (column >= columns - logitColumns) wanted += 1
    }
    if (keep === 1 && wanted === 0) {
      throw invalid('attention_mask', 'a token in the last column of every row (pad on the left: tokenizer.padding_side = "left")', `padding in row ${row}`)
    }
    checkPositions(integers(feeds, 'position_ids'), { row, columns, first: before.length, filled })
    return { text: before.append(fresh), fresh: fresh.length, wanted }
  })
  return { rows, columns, logitColumns, filled }
}

/** Tokens stand one after another from 0; some models (gemma3) count from 1, which rotary embedding cannot tell apart. */
function checkPositions(
  positions: Integers | undefined,
  { row, columns, first, filled }: { row: number; columns: number; first: number; filled: Uint8Array },
): void {
  if (!positions) return
  let expected = first
  let shift: number | undefined
  for (let column = 0; column < columns; column += 1) {
    if (!filled[row * columns + column]) continue
    const found = Number(positions.data[row * columns + column] ?? -1n)
    shift ??= found - expected
    if (found - expected !== shift || (shift !== 0 && shift !== 1)) {
      throw invalid('position_ids', `consecutive positions from ${first} in row ${row}`, `${found} in column ${column}`)
    }
    expected += 1
  }
}

/**
 * Logits as a graph returns them, [batch][logitColumns][vocabulary], from those of the rows that ran.
 * ran: [row of the batch]: index in `logits`, or -1; logits: [rows that ran][columns][vocabulary], aligned at the end.
 */
export function spreadLogits(
  request: Request, ran: readonly number[], logits: Float32Array, columns: number, vocabulary: number,
): Float32Array {
  const { rows, logitColumns } = request
  const straight = columns === logitColumns && rows.every((row, index) => row.wanted === logitColumns && ran[index] === index)
  if (straight) return logits
  const out = new Float32Array(rows.length * logitColumns * vocabulary)
  for (const [row, source] of ran.entries()) {
    let from = (source + 1) * columns
    for (let column = request.columns - 1; column >= request.columns - logitColumns; column -= 1) {
      if (!request.filled[row * request.columns + column]) continue
      from -= 1
      const to = row * logitColumns + column - (request.columns - logitColumns)
      out.set(logits.subarray(from * vocabulary, (from + 1) * vocabulary), to * vocabulary)
    }
  }
  return out
}

interface Integers {
  readonly dims: readonly number[]
  readonly data: BigInt64Array
}

function integers(feeds: Record<string, OrtTensor>, name: string): Integers | undefined {
  const tensor = feeds[name]
  if (!tensor) return undefined
  if (!(tensor.data instanceof BigInt64Array)) throw invalid(name, 'int64 tensor', describe(tensor))
  return { dims: tensor.dims, data: tensor.data }
}

function describe(tensor: OrtTensor | undefined): string {
  return tensor ? `${tensor.type} [${tensor.dims.join(', ')}]` : 'nothing'
}

function count(mask: BigInt64Array): number {
  let ones = 0
  for (const bit of mask) if (bit !== 0n) ones += 1
  return ones
}

/** The inputs of a decoder graph for a batch of rows, padded on the left to a common number of columns. */
import type { NativeFeed } from '../native/onnxruntime'
import { firstLogitInput } from './logits'
import { DataType } from './proto'
import type { MeasuredPast } from './rewrite'

export interface BatchRow {
  /** Tokens that the sequence has already. */
  readonly past: number
  readonly tokens: ArrayLike<number | bigint>
}

/** Inputs that couplet knows how to feed; a graph with another one is refused. */
export const knownInputs: readonly string[] = ['input_ids', 'attention_mask', 'position_ids', 'num_logits_to_keep']

/** What a graph has to be fed. */
export interface GraphInputs {
  /** Of knownInputs, and firstLogitInput. */
  readonly names: readonly string[]
  readonly measuredPasts: readonly MeasuredPast[]
  readonly kvHeads: number
}

/** Feeds of all inputs of a graph. `lastOnly`: only the logits of the last column are wanted. */
export function feedsOf({ names, measuredPasts, kvHeads }: GraphInputs, rows: readonly BatchRow[], lastOnly: boolean): NativeFeed[] {
  const columns = Math.max(...rows.map(({ tokens }) => tokens.length))
  const pastColumns = Math.max(...rows.map(({ past }) => past))
  const makers: Record<string, () => Pick<NativeFeed, 'dims' | 'data'>> = {
    input_ids: () => matrix(rows, columns, ({ tokens }, data, end) => {
      for (let i = 0; i < tokens.length; i++) data[end - tokens.length + i] = BigInt(tokens[i]!)
    }),
    // Past and new tokens both end where their columns end, so that the ones of a row count its tokens.
    attention_mask: () => matrix(rows, pastColumns + columns, ({ past, tokens }, data, end) => {
      data.fill(1n, end - tokens.length, end)
      data.fill(1n, end - columns - past, end - columns)
    }),
    // Padding stands at position 0: it is looked up like any other, and then read by nobody.
    position_ids: () => matrix(rows, columns, ({ past, tokens }, data, end) => {
      for (let i = 0; i < tokens.length; i++) data[end - tokens.length + i] = BigInt(past + i)
    }),
    num_logits_to_keep: () => ({ dims: [], data: BigInt64Array.of(lastOnly ? 1n : 0n) }),
    [firstLogitInput]: () => ({ dims: [1], data: BigInt64Array.of(lastOnly ? BigInt(columns - 1) : 0n) }),
  }
  return [
    ...names.map((name) => ({ name, type: DataType.int64, ...makers[name]!() })),
    ...measuredPasts.map(({ name, elementType }) => ({ name, type: elementType, dims: [rows.length, kvHeads, pastColumns, 0], data: new BigInt64Array(0) })),
  ]
}

/** int64 [rows][columns], zero but for what `fill` writes in each row; `end` is the index after the row's last element. */
function matrix(
  rows: readonly BatchRow[],
  columns: number,
  fill: (row: BatchRow, data: BigInt64Array, end: number) => void,
): Pick<NativeFeed, 'dims' | 'data'> {
  const data = new BigInt64Array(rows.length * columns)
  rows.forEach((row, index) => fill(row, data, (index + 1) * columns))
  return { dims: [rows.length, columns], data }
}

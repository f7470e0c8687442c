import type { Codec } from '../codec'
import { codesBytes, decodeSync, encodeSync, type DecodeSyncOptions } from '../codes'
import { float32FromFloat16, float16FromFloat32 } from '../float16'
import { throwExpected } from '../errors'
import { inverseOrder } from '../rotary-pairs'
import { reorderRows } from '../transform/apply'
import type { Rotation, RowsShape } from './rotation'
import { empty, Rows, type Elements } from './rows'

/** Tokens of one page of codes, COUPLET_PAGE_TOKENS: entries code whole pages. */
const PAGE_TOKENS = 64
/** Pages coded or decoded by one call: bounds the float32 copy of the rows, and prepares the tables once for many tokens. */
const PAGES_AT_ONCE = 16

/** A tensor of @huggingface/transformers, as a cache meets it. */
export interface CacheTensor {
  readonly type: string
  readonly dims: readonly number[]
  readonly data: unknown
  readonly location: string
  dispose(): void
}
export type CacheTensorClass = new (type: string, data: Elements, dims: readonly number[]) => CacheTensor

/** Neighbouring heads that share a codec. */
export interface EntryPart {
  readonly firstHead: number
  readonly heads: number
  readonly codec: Codec
  /** float32 [heads][groups][centroids][groupChannels] */
  readonly table: Float32Array
  /** What is near, float32 [heads][groups][groupChannels][groupChannels]; undefined: the plain distance. */
  readonly metric: Float32Array | undefined
}

/** How the rows of an entry are coded. */
export interface EntryCoding {
  /** They cover all heads. */
  readonly parts: readonly EntryPart[]
  /** Of key rows that the graph hands out rotated. */
  readonly rotation: Rotation | undefined
  /** Of channels, once they are not rotated: channel order[c] is coded at place c; undefined: as they come. */
  readonly order: Int32Array | undefined
  readonly sinks: number
  readonly window: number
  /** Tokens of left padding of each row of the batch. */
  readonly padding: readonly number[]
  readonly threads: number | undefined
}

/**
 * One entry of a past_key_values, [batch, kvHeads, tokens, headDim]: sinks and last tokens as they came, pages of codes between.
 *
 * The graph returns past and new rows together. Rows that become codes are replaced by what the codes stand for right in
 * that tensor, and the tensor is the next step's past for as long as anybody holds it - inside generate() always - so
 * a step decodes nothing. Once it is collected, the codes alone remain, and the next read decodes them.
 */
export class CodedEntry {
  readonly #coding: EntryCoding
  readonly #shape: { batch: number; heads: number; channels: number; type: string }
  readonly #sinks: Rows
  readonly #tail: Rows
  /** Of the heads of each part. */
  readonly #pageBytes: readonly number[]
  /** For each row of the batch and each part [pages][heads][page bytes], the first #pages of them in use. */
  readonly #codes: Uint8Array[][]
  #pages = 0
  #length = 0
  #class: CacheTensorClass
  #tensor: WeakRef<CacheTensor> | undefined

  constructor(name: string, first: CacheTensor, coding: EntryCoding) {
    const [batch = 0, heads = 0, , channels = 0] = first.dims
    const like = elements(name, first)
    this.#coding = coding
    this.#shape = { batch, heads, channels, type: first.type }
    this.#sinks = new Rows(like, batch * heads, channels)
    this.#tail = new Rows(like, batch * heads, channels)
    this.#pageBytes = coding.parts.map((part) => codesBytes({ codec: part.codec, tokens: PAGE_TOKENS, kvHeads: part.heads, headDim: channels }))
    this.#codes = Array.from({ length: batch }, () => coding.parts.map(() => new Uint8Array(0)))
    this.#class = first.constructor as CacheTensorClass
  }

  get length(): number {
    return this.#length
  }

  get codedTokens(): number {
    return this.#pages * PAGE_TOKENS
  }

  get channels(): number {
    return this.#shape.batch * this.#shape.heads * this.#shape.channels
  }

  get bytes(): number {
    return this.#codes.flat().reduce((sum, codes) => sum + codes.byteLength, this.#sinks.bytes + this.#tail.bytes)
  }

  /** Takes the tensor that a step returned: all rows so far and the new ones behind them. */
  update(name: string, tensor: CacheTensor): void {
    const { batch, heads, channels, type } = this.#shape
    const [rows, kvHeads, tokens = 0, headDim] = tensor.dims
    if (rows !== batch || kvHeads !== heads || headDim !== channels || tensor.type !== type || tokens < this.#length) {
      throwExpected(`${type} [${batch}, ${heads}, at least ${this.#length}, ${channels}]`, name, `${tensor.type} [${tensor.dims.join(', ')}]`)
    }
    const data = elements(name, tensor)
    const { sinks, window } = this.#coding
    const before = this.#length
    if (before < sinks) this.#sinks.push(data, tokens, before, Math.min(sinks, tokens))

    const coded = sinks + this.codedTokens
    const pages = Math.max(0, Math.floor((tokens - window - coded) / PAGE_TOKENS))
    const codedNow = coded + pages * PAGE_TOKENS
    for (let page = 0; page < pages; page += PAGES_AT_ONCE) {
      this.#encode(data, tokens, coded + page * PAGE_TOKENS, Math.min(PAGES_AT_ONCE, pages - page))
    }
    this.#tail.drop(Math.min(this.#tail.length, codedNow - coded))
    const from = Math.max(before, codedNow)
    if (tokens > from) this.#tail.push(data, tokens, from, tokens)

    this.#length = tokens
    this.#class = tensor.constructor as CacheTensorClass
    this.#tensor = new WeakRef(tensor)
  }

  /** All rows, as the next step's past. */
  read(): CacheTensor {
    const kept = this.#tensor?.deref()
    if (kept) return kept
    const { batch, heads, channels, type } = this.#shape
    const data = empty(type === 'float32' ? new Float32Array(0) : new Uint16Array(0), batch * heads * this.#length * channels)
    const { sinks } = this.#coding
    this.#sinks.copyTo(data, this.#length, 0)
    for (let row = 0; row < batch; row += 1) {
      for (let page = 0; page < this.#pages; page += PAGES_AT_ONCE) {
        this.#decode(data, this.#length, row, page, Math.min(PAGES_AT_ONCE, this.#pages - page))
      }
    }
    this.#tail.copyTo(data, this.#length, sinks + this.codedTokens)
    const tensor = new this.#class(type, data, [batch, heads, this.#length, channels])
    this.#tensor = new WeakRef(tensor)
    return tensor
  }

  /** Codes `pages` pages of `data`, [batch][kvHeads][tokens][channels], from token `first` on, and puts their meaning in their place. */
  #encode(data: Elements, tokens: number, first: number, pages: number): void {
    const { batch, heads, channels } = this.#shape
    const { rotation, order, padding } = this.#coding
    for (let row = 0; row < batch; row += 1) {
      const shape = { heads, tokens: pages * PAGE_TOKENS, channels }
      const place = { rows: data, offset: (row * heads * tokens + first) * channels, headStride: tokens * channels }
      let { headStride } = place
      let rows = data.subarray(place.offset)
      if (rotation || order) {
        headStride = shape.tokens * channels
        const unrotated = new Float32Array(heads * headStride)
        copyRows(place, { rows: unrotated, offset: 0, headStride }, shape)
        rotation?.undo(unrotated, shape, first - (padding[row] ?? 0))
        if (order) reorderRows(unrotated, order)
        rows = unrotated
      }
      for (const part of this.#parts(row, this.#pages, pages)) {
        encodeSync(rows.subarray(part.firstHead * headStride), { ...part.call, headStride, out: part.codes })
      }
      this.#decode(data, tokens, row, this.#pages, pages)
    }
    this.#pages += pages
  }

  /** Writes what `pages` pages of codes stand for to their place in `data`, [batch][kvHeads][tokens][channels]. */
  #decode(data: Elements, tokens: number, row: number, page: number, pages: number): void {
    const { heads, channels } = this.#shape
    const { rotation, order, padding, sinks } = this.#coding
    const first = sinks + page * PAGE_TOKENS
    const shape = { heads, tokens: pages * PAGE_TOKENS, channels }
    const place = { rows: data, offset: (row * heads * tokens + first) * channels, headStride: tokens * channels }
    const decodeTo = (rows: Elements, headStride: number): void => {
      for (const { firstHead, codes, call } of this.#parts(row, page, pages)) {
        decodeSync(codes, { ...call, headStride, out: rows.subarray(firstHead * headStride) })
      }
    }
    if (!rotation && !order) {
      decodeTo(data.subarray(place.offset), place.headStride)
      return
    }
    const headStride = shape.tokens * channels
    const rows = new Float32Array(heads * headStride)
    decodeTo(rows, headStride)
    if (order) reorderRows(rows, inverseOrder(order))
    rotation?.apply(rows, shape, first - (padding[row] ?? 0))
    copyRows({ rows, offset: 0, headStride }, place, shape)
  }

  /** `pages` pages of a row of the batch from page `first` on, by part: their codes, with room made for them, and what encode and decode have in common. */
  #parts(row: number, first: number, pages: number): { firstHead: number; codes: Uint8Array; call: Omit<DecodeSyncOptions, 'out'> }[] {
    const { channels } = this.#shape
    const { parts, threads } = this.#coding
    return parts.map(({ firstHead, heads, codec, table, metric }, index) => {
      const [begin, end] = [first * this.#pageBytes[index]!, (first + pages) * this.#pageBytes[index]!]
      const codes = this.#codes[row]![index] = grown(this.#codes[row]![index]!, end)
      const call = { tables: table, metric, codec, tokens: pages * PAGE_TOKENS, kvHeads: heads, headDim: channels, tokenStride: channels, threads }
      return { firstHead, codes: codes.subarray(begin, end), call }
    })
  }
}

/** The elements of a tensor; float16 as its bits, also where Node has Float16Array. */
function elements(name: string, tensor: CacheTensor): Elements {
  if (tensor.location !== 'cpu') throwExpected('a tensor in main memory (load the model with { device: "cpu" })', name, tensor.location)
  const { data, type } = tensor
  if (type === 'float32' && data instanceof Float32Array) return data
  if (type === 'float16' && ArrayBuffer.isView(data)) return new Uint16Array(data.buffer, data.byteOffset, data.byteLength / 2)
  return throwExpected('a float32 or float16 tensor', name, type)
}

/** Where [heads][tokens][channels] lie in a buffer whose heads are headStride elements apart. */
interface Place {
  readonly rows: Elements
  readonly offset: number
  readonly headStride: number
}

function copyRows(from: Place, to: Place, { heads, tokens, channels }: RowsShape): void {
  for (let head = 0; head < heads; head += 1) {
    const start = from.offset + head * from.headStride
    to.rows.set(converted(from.rows.subarray(start, start + tokens * channels), to.rows), to.offset + head * to.headStride)
  }
}

/** `rows` with elements of the kind that `like` has. */
function converted(rows: Elements, like: Elements): Elements {
  if (rows instanceof Float32Array) return like instanceof Float32Array ? rows : float16FromFloat32(rows)
  return like instanceof Float32Array ? float32FromFloat16(rows) : rows
}

/** `codes`, or a copy of it with room for `bytes`. */
function grown(codes: Uint8Array, bytes: number): Uint8Array {
  if (codes.length >= bytes) return codes
  const larger = new Uint8Array(bytes + (bytes >> 2))
  larger.set(codes)
  return larger
}

/** Texts of any length and from anywhere, as chunks of token ids: what is held of them at a time is one piece. */
import { createHash } from 'node:crypto'
import { createReadStream } from 'node:fs'
import { stat } from 'node:fs/promises'

import { throwExpected, typeError } from '../errors'
import type { TextTokenizer } from '../tokenizer'
import { loadTokenizer } from '../tokenizer'

/** A text: itself, its token ids, a UTF-8 file, or a stream such as `process.stdin`. */
export type TextInput = string | ArrayLike<number> | { readonly file: string } | AsyncIterable<string | Uint8Array>

/** One text, or several: no chunk reaches from one into the next. */
export type Texts = TextInput | readonly TextInput[]

export interface Chunk {
  readonly tokens: number[]
  /** Chunks, and tokens, of all texts before it. */
  readonly index: number
  readonly first: number
}

/**
 * Characters that are tokenized at a time, cut where a line ends: a token or two may come out differently there. Where the cuts
 * are depends on the text alone, not on how a stream delivers it.
 */
const pieceCharacters = 2 ** 14

interface Piece {
  ids: ArrayLike<number>
  /** Bytes of text that it came from, or tokens where these were given. */
  units: number
}

export interface ReadOptions {
  /** Where the tokenizer lies; needed unless all texts are token ids. */
  directory: string | undefined
  /** Tokens of a chunk; the last one of each text may be shorter. */
  length: number
  signal?: AbortSignal | undefined
}

interface Document {
  isText: boolean
  /** All of it; undefined for a stream. */
  units: number | undefined
  pieces: () => Iterable<Piece> | AsyncIterable<Piece>
}

/** Reads texts once, from the first to the last. */
export class TextReader {
  readonly #documents: readonly Document[]
  readonly #length: number
  readonly #signal: AbortSignal | undefined
  readonly #hash = createHash('sha256')
  /** What was read and what is left, texts in bytes; a stream makes what is left NaN. */
  readonly #text = { tokens: 0, bytes: 0, bytesLeft: 0 }
  readonly #given = { tokens: 0, tokensLeft: 0 }
  #tokens = 0
  #chunks = 0

  private constructor(documents: readonly Document[], length: number, signal: AbortSignal | undefined) {
    this.#documents = documents
    this.#length = length
    this.#signal = signal
    for (const { isText, units = NaN } of documents) {
      if (isText) this.#text.bytesLeft += units
      else this.#given.tokensLeft += units
    }
  }

  static async open(texts: Texts, { directory, length, signal }: ReadOptions): Promise<TextReader> {
    const inputs: readonly TextInput[] = isSeveral(texts) ? texts : [texts]
    let tokenizer: Promise<TextTokenizer> | undefined
    const documents: Document[] = []
    for (const input of inputs) {
      if (isTokenIds(input)) {
        documents.push({ isText: false, units: input.length, pieces: () => [{ ids: input, units: input.length }] })
        continue
      }
      if (typeof input !== 'string' && !isFile(input) && !isStream(input)) throwExpected('a string, an array of token ids, a file or a stream', 'text', input)
      if (directory === undefined) throw typeError('Expected token ids for `text`, or the `directory` of a tokenizer, but received a text alone')
      const known = await (tokenizer ??= loadTokenizer(directory))
      const units = typeof input === 'string' ? Buffer.byteLength(input) : isFile(input) ? (await stat(input.file)).size : undefined
      const parts = () => typeof input === 'string' ? [input] : isFile(input) ? createReadStream(input.file) : input
      documents.push({ isText: true, units, pieces: () => tokenized(parts(), (text) => known.encode(text)) })
    }
    return new TextReader(documents, length, signal)
  }

  /** All of them; once. */
  async* read(): AsyncGenerator<Chunk> {
    for (const { pieces, isText } of this.#documents) {
      let rest: number[] = []
      const take = (tokens: number[]): Chunk => {
        const chunk = { tokens, index: this.#chunks++, first: this.#tokens }
        this.#hash.update(Uint32Array.from(tokens))
        this.#tokens += tokens.length
        return chunk
      }
      for await (const { ids, units } of pieces()) {
        this.#signal?.throwIfAborted()
        this.#count(ids.length, units, isText)
        let start = this.#length - rest.length
        if (ids.length >= start) {
          yield take(rest.concat(slice(ids, 0, start)))
          for (; start + this.#length <= ids.length; start += this.#length) yield take(slice(ids, start, start + this.#length))
          rest = slice(ids, start, ids.length)
        } else rest = rest.concat(slice(ids, 0, ids.length))
      }
      if (rest.length > 0) yield take(rest)
    }
  }

  /** Whether another reader of the same texts would read the same: not so of a stream. */
  get isRepeatable(): boolean {
    return this.#documents.every(({ units }) => units !== undefined)
  }

  /** Chunks so far. */
  get chunks(): number {
    return this.#chunks
  }

  /** Tokens of the chunks so far. */
  get tokens(): number {
    return this.#tokens
  }

  /** SHA-256 of these, uint32 little-endian, in hexadecimal digits. */
  get hash(): string {
    return this.#hash.copy().digest('hex')
  }

  /** About how many tokens there will be in all; undefined for a stream, until it has ended. */
  get expectedTokens(): number | undefined {
    const { tokens, bytes, bytesLeft } = this.#text
    const expected = this.#given.tokens + this.#given.tokensLeft + tokens + Math.round(bytesLeft === 0 ? 0 : bytesLeft * (bytes === 0 ? 0.25 : tokens / bytes))
    return Number.isNaN(expected) ? undefined : expected
  }

  #count(tokens: number, units: number, isText: boolean): void {
    if (isText) {
      this.#text.tokens += tokens
      this.#text.bytes += units
      this.#text.bytesLeft = Math.max(0, this.#text.bytesLeft - units) // a file may have grown
    } else {
      this.#given.tokens += tokens
      this.#given.tokensLeft -= units
    }
  }
}

async function* tokenized(parts: Iterable<string> | AsyncIterable<string | Uint8Array>, encode: (text: string) => number[]): AsyncGenerator<Piece> {
  const decoder = new TextDecoder('utf-8', { ignoreBOM: true })
  const piece = (text: string): Piece => ({ ids: encode(text), units: Buffer.byteLength(text) })
  let text = ''
  for await (const part of parts) {
    text += typeof part === 'string' ? part : decoder.decode(part, { stream: true })
    let start = 0
    while (text.length - start > pieceCharacters) {
      const end = cut(text, start)
      yield piece(text.slice(start, end))
      start = end
    }
    if (start > 0) text = text.slice(start)
  }
  text += decoder.decode()
  if (text.length > 0) yield piece(text)
}

/** End of the piece that begins at `start`: behind a line end, else before a blank, else wherever no character is split. */
function cut(text: string, start: number): number {
  const most = start + pieceCharacters
  const least = start + pieceCharacters / 2
  const isBlank = (place: number): boolean => /\s/.test(text[place]!)
  for (let end = most; end > least; end--) if (text[end - 1] === '\n' && !isBlank(end)) return end
  for (let end = most; end > least; end--) if (isBlank(end) && !isBlank(end - 1)) return end
  return /[\uD800-\uDBFF]/.test(text[most - 1]!) ? most - 1 : most
}

/** At most `most` chunks of two or more tokens, evenly spread over texts that are read through for it. */
export async function evenChunks(texts: Texts, options: ReadOptions, most: number): Promise<readonly (readonly number[])[]> {
  const choice = new EvenChoice<readonly number[]>(most)
  for await (const { tokens } of (await TextReader.open(texts, options)).read()) if (tokens.length > 1) choice.add(tokens)
  return choice.items
}

/** At most so many items of a list whose length nobody knows, evenly spread. */
export class EvenChoice<Item> {
  readonly #most: number
  #items: Item[] = []
  #stride = 1
  #seen = 0

  constructor(most: number) {
    this.#most = most
  }

  get items(): readonly Item[] {
    return this.#items
  }

  add(item: Item): void {
    const place = this.#seen++
    if (this.#items.length === this.#most && place % this.#stride === 0) {
      this.#items = this.#items.filter((_, i) => i % 2 === 0)
      this.#stride *= 2
    }
    if (place % this.#stride === 0) this.#items.push(item)
  }
}

/** Token ids of a whole text: as they are, or by the tokenizer of a model directory. */
export async function tokenIds(text: string | ArrayLike<number>, directory: string | undefined): Promise<ArrayLike<number>> {
  if (typeof text !== 'string') {
    if (!isTokenIds(text)) throwExpected('a string or an array of token ids', 'text', text)
    return text
  }
  if (directory === undefined) throw typeError('Expected token ids for `text`, or the `directory` of a tokenizer, but received a text alone')
  return (await loadTokenizer(directory)).encode(text)
}

/** SHA-256 of token ids, uint32 little-endian, in hexadecimal digits. */
export function hashTokens(tokens: ArrayLike<number>): string {
  return createHash('sha256').update(Uint32Array.from(tokens)).digest('hex')
}

function isSeveral(texts: Texts): texts is readonly TextInput[] {
  return Array.isArray(texts) && texts.length > 0 && typeof texts[0] !== 'number'
}

function isTokenIds(input: unknown): input is ArrayLike<number> {
  return ArrayBuffer.isView(input) || (Array.isArray(input) && (input.length === 0 || typeof input[0] === 'number'))
}

function isFile(input: unknown): input is { readonly file: string } {
  return typeof input === 'object' && input !== null && 'file' in input && typeof input.file === 'string'
}

function isStream(input: unknown): input is AsyncIterable<string | Uint8Array> {
  return typeof input === 'object' && input !== null && Symbol.asyncIterator in input
}

function slice(ids: ArrayLike<number>, start: number, end: number): number[] {
  return Array.prototype.slice.call(ids, start, end) as number[]
}

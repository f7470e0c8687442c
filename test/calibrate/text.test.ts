import assert from 'node:assert/strict'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'

import type { Chunk, Texts } from '../../lib/calibrate/text'
import { evenChunks, EvenChoice, hashTokens, TextReader } from '../../lib/calibrate/text'
import { temporaryFolder, tinyLlama } from '../onnx/files'

const open = (texts: Texts, length = 100) => TextReader.open(texts, { directory: tinyLlama, length })

async function allOf(texts: Texts, length = 100): Promise<{ reader: TextReader; chunks: Chunk[]; tokens: number[] }> {
  const reader = await open(texts, length)
  const chunks: Chunk[] = []
  for await (const chunk of reader.read()) chunks.push(chunk)
  return { reader, chunks, tokens: chunks.flatMap(({ tokens }) => tokens) }
}

/** Delivers a text in pieces of odd sizes, characters split. */
async function* stream(text: string): AsyncGenerator<Uint8Array> {
  const bytes = Buffer.from(text)
  for (let start = 0, size = 1; start < bytes.length; start += size, size = (size * 7 + 3) % 1021 + 1) {
    await Promise.resolve()
    yield bytes.subarray(start, start + size)
  }
}

describe('texts to learn from', () => {
  const folder = temporaryFolder()
  // Longer than two pieces, lines of many lengths, characters of one to four bytes.
  const text = Array.from({ length: 3000 }, (_, i) => `${'wörd 🙂 '.repeat(i % 11)}${i}\n${i % 7 === 0 ? '\n' : ''}`).join('')

  it('are the same tokens from a string, a file and a stream', async () => {
    const file = join(folder.path, 'text')
    writeFileSync(file, text)
    assert.ok(text.length > 2 * 2 ** 14)
    const expected = [...Buffer.from(text)]
    for (const given of [text, { file }, stream(text), [text], expected, Uint8Array.from(expected)]) {
      const { tokens, reader, chunks } = await allOf(given)
      assert.deepEqual(tokens, expected)
      assert.deepEqual([reader.tokens, reader.hash, reader.chunks], [expected.length, hashTokens(expected), Math.ceil(expected.length / 100)])
      assert.deepEqual(chunks.map(({ index, first }) => [index, first]), chunks.map((_, i) => [i, 100 * i]))
    }
  })

  it('are several, and no chunk reaches from one into the next', async () => {
    const { chunks, reader } = await allOf(['x'.repeat(250), [1, 2, 3], stream('y'.repeat(101)), ''])
    assert.deepEqual(chunks.map(({ tokens }) => tokens.length), [100, 100, 50, 3, 100, 1])
    assert.deepEqual(chunks.map(({ first }) => first), [0, 100, 200, 250, 253, 353])
    assert.equal(reader.tokens, 354)
  })

  it('a line of any length is cut before a blank, or anywhere but in a character', async () => {
    for (const long of ['word '.repeat(40_000), '🙂'.repeat(80_000), `a${'🙂'.repeat(80_000)}`]) {
      assert.deepEqual((await allOf(long, 4096)).tokens, [...Buffer.from(long)])
    }
  })

  it('say about how long they are, unless they are streams', async () => {
    const file = join(folder.path, 'long')
    writeFileSync(file, text)
    const reader = await open([{ file }, text, [1, 2, 3]])
    const bytes = Buffer.byteLength(text)
    for await (const { index } of reader.read()) if (index === 0) assert.equal(reader.expectedTokens, 2 * bytes + 3)
    assert.equal(reader.expectedTokens, reader.tokens)
    assert.ok(reader.isRepeatable)
    const streamed = await open([stream(text), [1]])
    for await (const chunk of streamed.read()) assert.ok(chunk.index >= 0 && streamed.expectedTokens === undefined)
    assert.ok(!streamed.isRepeatable)
  })

  it('are read as they are used: a stream of any length is one piece ahead', async () => {
    let given = 0
    const endless = async function* () {
      for (;;) {
        await Promise.resolve()
        given += 1000
        yield 'a line of text\n'.repeat(1000 / 15).padEnd(1000, '.')
      }
    }
    const reader = await open(endless(), 512)
    let ahead = 0
    for await (const chunk of reader.read()) {
      ahead = Math.max(ahead, given - chunk.first)
      if (chunk.index === 4000) break
    }
    assert.ok(ahead <= 2 ** 14 + 2000, `${ahead} characters ahead`)
  })

  it('stop when their signal fires', async () => {
    const controller = new AbortController()
    const reader = await TextReader.open([text, text], { directory: tinyLlama, length: 10, signal: controller.signal })
    await assert.rejects(async () => {
      for await (const { index } of reader.read()) if (index === 3) controller.abort(new Error('enough'))
    }, /enough/)
  })

  it('are refused when they are none', async () => {
    for (const none of [5, null, {}, [{ file: 3 }], [true]]) {
      await assert.rejects(open(none as unknown as Texts), { code: 'ERR_COUPLET_INVALID_ARGUMENT' })
    }
    await assert.rejects(TextReader.open('text', { directory: undefined, length: 10 }), /the `directory` of a tokenizer/)
    await assert.rejects(open([text, { file: join(folder.path, 'nowhere') }]), { code: 'ENOENT' })
  })

  it('give a few chunks from everywhere', async () => {
    const chosen = await evenChunks([Array.from({ length: 4000 }, (_, i) => i), [7]], { directory: undefined, length: 10 }, 8)
    assert.ok(chosen.length >= 5 && chosen.length <= 8, String(chosen.length))
    const firsts = chosen.map(([first]) => first!)
    assert.deepEqual(firsts, firsts.map((_, i) => i * firsts[1]!))
    assert.ok(firsts.at(-1)! > 2500)
    for (const count of [1, 7, 8, 9, 16, 17, 1000]) {
      const choice = new EvenChoice<number>(8)
      for (let i = 0; i < count; i++) choice.add(i)
      assert.ok(choice.items.length >= Math.min(count, 5) && choice.items.length <= 8, `${choice.items.length} of ${count}`)
    }
  })
})

// Files that somebody else wrote, badly or with intent: refused with a stable code, in little time and little memory.
import assert from 'node:assert/strict'
import { execFileSync } from 'node:child_process'
import { mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

import fc from 'fast-check'

import { Codebook } from '../../lib'
import { parseJson } from '../../lib/json'
import { fileOf, headerOf, sampleCodebook, withHeader } from './samples'

const invalid = { name: 'CoupletError', code: 'ERR_COUPLET_CODEBOOK_INVALID' }
const sound = sampleCodebook().toBuffer()
const one = (tensor: string): string => `{"__metadata__":{"couplet":"{}"},"t":${tensor}}`

const cases: [string, Uint8Array, RegExp][] = [
  ['an empty file', new Uint8Array(0), /0 bytes/],
  ['less than the length field', sound.slice(0, 7), /7 bytes/],
  ['a header length beyond the file', fileOf('{}', undefined, 3n), /claims 3 bytes/],
  ['a header length of 2^64 - 1', fileOf('{}', undefined, 2n ** 64n - 1n), /claims 18446744073709551615 bytes/],
  ['a header length of 2^53', fileOf('{}', undefined, 2n ** 53n), /claims/],
  ['no header at all', fileOf(''), /not JSON/],
  ['a header that is not JSON', fileOf('hello'), /not JSON/],
  ['a header that is not UTF-8', Buffer.concat([fileOf('..').subarray(0, 8), Buffer.from([0xff, 0xfe])]), /not JSON/],
  ['a header that is an array', fileOf('[]'), /not a JSON object/],
  ['a header that nests without end', fileOf('[' .repeat(100000)), /levels/],
  ['a key that occurs twice', fileOf('{"a":{},"a":{}}'), /second "a"/],
  ['a tensor that occurs twice', withHeader(sound, (header) => header.replace('layers.1.key', 'layers.0.key')), /second "layers.0.key"/],
  ['a tensor named __proto__', fileOf('{"__proto__":{"dtype":"F32"}}'), /"__proto__"/],
  ['a tensor that is a number', fileOf('{"t":1}'), /not an object/],
  ['metadata that is not text', fileOf('{"__metadata__":{"couplet":{}}}'), /not a string/],
  ['a tensor with another member', fileOf(one('{"dtype":"F32","shape":[],"data_offsets":[0,4],"x":1}'), new Uint8Array(4)), /more or less/],
  ['a shape with a fraction', fileOf(one('{"dtype":"F32","shape":[0.5],"data_offsets":[0,2]}'), new Uint8Array(2)), /more or less/],
  ['a negative shape', fileOf(one('{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}'), new Uint8Array(4)), /more or less/],
  ['three offsets', fileOf(one('{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}'), new Uint8Array(4)), /more or less/],
  ['an unknown dtype', fileOf(one('{"dtype":"F33","shape":[1],"data_offsets":[0,4]}'), new Uint8Array(4)), /F33/],
  ['a shape larger than 2^53', fileOf(one('{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,4]}'), new Uint8Array(4)), /needs/],
  ['a shape that wraps around 2^64 to 4 bytes', fileOf(one('{"dtype":"U8","shape":[4294967297,4294967292],"data_offsets":[0,4]}'), new Uint8Array(4)), /needs/],
  ['offsets beyond the file', fileOf(one('{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'), new Uint8Array(4)), /8 bytes and the file has 4/],
  ['offsets that go backwards', fileOf(one('{"dtype":"F32","shape":[1],"data_offsets":[4,0]}'), new Uint8Array(4)), /needs 4 bytes/],
  ['data that no tensor claims', Buffer.concat([sound, Buffer.alloc(4)]), /bytes of data/],
  ['data cut short', sound.slice(0, -4), /bytes of data/],
  ['overlapping tensors', withHeader(sound, (header) => header.replace('[1024,1536]', '[1020,1532]')), /begins at byte 1020/],
  ['a hole between tensors', withHeader(sound, (header) => header.replace('[1024,1536]', '[1028,1540]')), /begins at byte 1028/],
  ['no metadata of couplet', withHeader(sound, (header) => header.replace('"couplet":', '"another":')), /has no "couplet"/],
  ['metadata that is not JSON', withHeader(sound, (header) => header.replace('"couplet":"{', '"couplet":"')), /Bad JSON/],
  ['a key that occurs twice in the metadata', edit('\\"layers\\":2', '\\"layers\\":2,\\"layers\\":2'), /second "layers"/],
  ['a fractional number of layers', edit('\\"layers\\":2', '\\"layers\\":2.5'), /`layers`/],
  ['a thousand million layers', edit('\\"layers\\":2', '\\"layers\\":1000000000'), /`layers`/],
  ['more layers than tensors', edit('\\"layers\\":2', '\\"layers\\":3'), /4 tensors, not 6, for 3 layers/],
  ['fewer layers than tensors', edit('\\"layers\\":2', '\\"layers\\":1'), /4 tensors, not 2, for 1 layers/],
  ['another head size', edit('\\"headDim\\":16', '\\"headDim\\":32'), /shape/],
  ['a codec that does not fit', edit('cq-4c3b', 'cq-3c3b'), /headDim 16/],
  ['an unknown codec', edit('cq-4c3b', 'pq-4c3b'), /pq-4c3b/],
  ['another codec than the tensors have', edit('cq-4c3b', 'cq-4c4b'), /shape/],
  ['a missing tensor', withHeader(sound, (header) => header.replace('layers.1.key', 'layers.2.key')), /no tensor "layers.1.key"/],
  ['a dtype that is not for centroids', withHeader(sound, (header) => header.replaceAll('F32', 'I32')), /I32, not F16 or F32/],
  ['a NaN among the centroids', patched(sound.length - 4, [0, 0, 0xc0, 0x7f]), /"layers.1.value" has a NaN/],
  ['an infinity among the centroids', patched(sound.length - 4, [0, 0, 0x80, 0x7f]), /infinity/],
]

/** The sound file with a change in its JSON (which is a string in the header's JSON). */
function edit(from: string, to: string): Uint8Array {
  return withHeader(sound, (header) => {
    assert.ok(header.includes(from), from)
    return header.replace(from, to)
  })
}

function patched(at: number, bytes: number[]): Uint8Array {
  const file = sound.slice()
  file.set(bytes, at)
  return file
}

describe('a hostile codebook file', () => {
  let folder: string
  before(() => {
    folder = mkdtempSync(join(tmpdir(), 'couplet-hostile-'))
  })
  after(() => rmSync(folder, { recursive: true }))

  for (const [what, bytes, message] of cases)
    it(`with ${what} is refused`, async () => {
      const path = join(folder, 'file')
      writeFileSync(path, bytes)
      assert.throws(() => Codebook.fromBuffer(bytes), { ...invalid, message })
      assert.throws(() => Codebook.loadSync(path), { ...invalid, message })
      await assert.rejects(Codebook.load(path), { ...invalid, message })
    })

  it('of another format version is a mismatch that names both', () => {
    const message = 'Expected a codebook of format version 1, 2, 3 or 4 but received one of format version 5'
    assert.throws(() => Codebook.fromBuffer(edit('\\"formatVersion\\":1', '\\"formatVersion\\":5')), { code: 'ERR_COUPLET_CODEBOOK_MISMATCH', message })
  })

  it('of a terabyte is refused without reading it', async () => {
    const path = join(folder, 'large')
    const header = `{"__metadata__":{"couplet":"{}"},"t":{"dtype":"U8","shape":[${2 ** 40}],"data_offsets":[0,${2 ** 40}]}}`
    writeFileSync(path, fileOf(header))
    truncateSync(path, 8 + header.length + 2 ** 40) // sparse: takes no room on the disk
    const before = process.memoryUsage().arrayBuffers
    assert.throws(() => Codebook.loadSync(path), invalid)
    await assert.rejects(Codebook.load(path), invalid)
    assert.ok(process.memoryUsage().arrayBuffers - before < 2 ** 20)
  })

  it('that is a folder, a device or a pipe is refused', async () => {
    const pipe = join(folder, 'pipe')
    execFileSync('mkfifo', [pipe])
    for (const path of [folder, pipe, '/dev/zero']) {
      const message = `${path} is not a codebook that couplet can read: it is not a file`
      assert.throws(() => Codebook.loadSync(path), { ...invalid, message })
      await assert.rejects(Codebook.load(path), { ...invalid, message })
    }
    await assert.rejects(Codebook.load(join(folder, 'absent')), { code: 'ENOENT' })
  })

  const refusal = /^ERR_COUPLET_CODEBOOK_(INVALID|MISMATCH)$/
  function opensOrRefuses(bytes: Uint8Array): void {
    try {
      const codebook = Codebook.fromBuffer(bytes)
      assert.ok(codebook.keyTable(0).every(Number.isFinite))
    } catch (error) {
      assert.match(String((error as { code?: string }).code), refusal, (error as Error).stack)
    }
  }

  it('with any flipped bytes opens or is refused', () => {
    const flip = fc.record({ at: fc.nat(sound.length - 1), with: fc.integer({ min: 1, max: 255 }) })
    const headerFlip = fc.record({ at: fc.nat(7 + headerOf(sound).length), with: fc.integer({ min: 1, max: 255 }) })
    fc.assert(
      fc.property(fc.array(fc.oneof(flip, headerFlip), { minLength: 1, maxLength: 8 }), (flips) => {
        const file = sound.slice()
        for (const { at, with: mask } of flips) file[at] = (file[at] ?? 0) ^ mask
        opensOrRefuses(file)
      }),
      { numRuns: 2000 },
    )
  })

  it('of every truncated length is refused', () => {
    for (let length = 0; length < sound.length; length++) assert.throws(() => Codebook.fromBuffer(sound.subarray(0, length)), { code: refusal }, String(length))
  })

  it('with parts inserted, repeated or removed opens or is refused', () => {
    fc.assert(
      fc.property(fc.nat(sound.length), fc.nat(64), fc.uint8Array({ maxLength: 32 }), (at, removed, inserted) => {
        opensOrRefuses(Buffer.concat([sound.subarray(0, at), inserted, sound.subarray(at + removed)]))
      }),
      { numRuns: 1000 },
    )
  })

  it('with any JSON as its header is refused', () => {
    fc.assert(
      fc.property(fc.json(), (json) => {
        assert.throws(() => Codebook.fromBuffer(fileOf(json)), invalid)
      }),
      { numRuns: 500 },
    )
  })

  it('with any numbers for shapes and offsets is refused', () => {
    const number = fc.oneof(fc.maxSafeNat(), fc.nat(2048), fc.double(), fc.maxSafeInteger())
    const dtype = fc.constantFrom('F16', 'F32', 'F64', 'U8')
    const tensor = fc.record({ dtype, shape: fc.array(number, { maxLength: 5 }), data_offsets: fc.tuple(number, number) })
    const metadata = (JSON.parse(headerOf(sound)) as { __metadata__: object }).__metadata__
    fc.assert(
      fc.property(fc.dictionary(fc.constantFrom('layers.0.key', 'layers.0.value', 'x'), tensor), (tensors) => {
        assert.throws(() => Codebook.fromBuffer(fileOf(JSON.stringify({ __metadata__: metadata, ...tensors }), new Uint8Array(1536))), invalid)
      }),
      { numRuns: 500 },
    )
  })
})

describe('parseJson', () => {
  const plain = (json: unknown): unknown =>
    json instanceof Map ? Object.fromEntries([...json].map(([key, value]) => [key, plain(value)])) : Array.isArray(json) ? json.map(plain) : json

  it('reads what JSON.parse reads', () => {
    fc.assert(
      fc.property(fc.jsonValue({ maxDepth: 5 }), fc.constantFrom(undefined, 1, '\t'), (value, indent) => {
        const text = JSON.stringify(value, null, indent)
        assert.deepEqual(plain(parseJson(text)), JSON.parse(text))
      }),
    )
  })

  it('refuses what JSON.parse refuses', () => {
    fc.assert(
      fc.property(fc.json({ maxDepth: 3 }), fc.nat(), fc.constantFrom('', ',', '}', '"', '\\', '0', ' ', '\n'), (text, at, inserted) => {
        const broken = text.slice(0, at % (text.length + 1)) + inserted + text.slice((at % (text.length + 1)) + 1)
        let accepted = true
        try {
          JSON.parse(broken)
        } catch {
          accepted = false
        }
        if (!accepted) assert.throws(() => parseJson(broken), SyntaxError)
      }),
      { numRuns: 500 },
    )
  })
})

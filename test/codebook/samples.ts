import { Codebook, codec } from '../../lib'
import type { CodebookMetadata, CodebookTables } from '../../lib'

/** Deterministic numbers in [-1, 1), of which float16 holds every one exactly. */
export function noise(length: number, seed: number): Float32Array {
  let state = seed >>> 0
  return Float32Array.from({ length }, () => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    return (state >>> 22) / 512 - 1
  })
}

export const learned: CodebookMetadata = {
  formatVersion: 1,
  rotary: { kind: 'half', dim: 16, theta: 10000 },
  model: 'sha256:0123',
  learned: { weights: 'attention', iterations: 100, seed: '18446744073709551615', tokens: 65536, text: 'ab'.repeat(32), date: '2026-01-02T03:04:05Z' },
}

/** 2 layers, 2 kv heads of 16 channels: cq-4c3b keys, cq-8c2b values. */
export function sampleTables(): CodebookTables {
  const keyCodec = codec('4c3b')
  const valueCodec = codec('8c2b')
  return {
    keyCodec,
    valueCodec,
    kvHeads: 2,
    headDim: 16,
    keyTables: [1, 2].map((seed) => noise(2 * 16 * keyCodec.centroids, seed)),
    valueTables: [3, 4].map((seed) => noise(2 * 16 * valueCodec.centroids, seed)),
    metadata: learned,
  }
}

export function sampleCodebook(): Codebook {
  return Codebook.fromTables(sampleTables())
}

/** A safetensors file of any header text, sound or not. */
export function fileOf(header: string, data: Uint8Array = new Uint8Array(0), claimed?: bigint): Uint8Array {
  const text = Buffer.from(header)
  const file = Buffer.alloc(8 + text.length + data.length)
  file.writeBigUInt64LE(claimed ?? BigInt(text.length))
  text.copy(file, 8)
  file.set(data, 8 + text.length)
  return file
}

export function headerOf(file: Uint8Array): string {
  const buffer = Buffer.from(file.buffer, file.byteOffset, file.length)
  return buffer.toString('utf8', 8, 8 + Number(buffer.readBigUInt64LE()))
}

/** A sound file with its header's text changed; the data stay. */
export function withHeader(file: Uint8Array, change: (header: string) => string): Uint8Array {
  const header = headerOf(file)
  return fileOf(change(header), file.subarray(8 + Buffer.byteLength(header)))
}

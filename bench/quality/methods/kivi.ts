/**
 * KIVI (arXiv 2402.02750) and Kitty (arXiv 2511.18643): integers between minimum and maximum, keys by channel and values by token.
 *
 * KIVI: a scale for each channel of 32 consecutive tokens of keys, and for each 32 channels of one token of values. Bits: b + 32 / 32.
 * Kitty: pages of 128 tokens; in each, the channels of a head with the largest mean magnitude of keys (12.5 % of them, or 25 % in
 * "Pro") take 4 bits and the others 2; values by token of a head at 2 bits. Bits of keys: 2 + 2 * share + 32 / 128, and 1 / 128 for the
 * map of raised channels; of values: 2 + 32 / headDim. Both keep recent tokens and Kitty the first 32 in float16, which the table's
 * sinks and window stand for. Keys after rotary embedding.
 */
import { channelRun, halfBits, type Method, pieces, type Quantizer, range, rowRun, type Rows, toIntegers } from './method'

const groupElements = 32
const pageTokens = 128

export function kivi(bits: number): Method {
  return {
    name: `kivi-${bits}b`, width: bits, file: 'kivi.ts', rotated: true,
    fit: () => Promise.resolve({
      tableBytes: 0,
      quantize: (rows, { side }) => side === 'key'
        ? keysByChannel(rows, groupElements, () => bits)
        : valuesByToken(rows, Math.min(groupElements, rows.channels), bits),
    }),
  }
}

export function kitty(name: string, share: number): Method {
  return {
    name, width: 2, file: 'kivi.ts', rotated: true,
    fit: (): Promise<Quantizer> => Promise.resolve({
      tableBytes: 0,
      quantize: (rows, { side }) => {
        if (side === 'value') return valuesByToken(rows, rows.channels, 2)
        const raised = Math.round(share * rows.channels)
        let map: Set<number>
        const bits = keysByChannel(rows, pageTokens, (channel) => map.has(channel) ? 4 : 2, (head, start) => { map = largest(rows, head, start, raised) })
        return bits + rows.heads * rows.channels * Math.ceil(rows.tokens / pageTokens)
      },
    }),
  }
}

function keysByChannel(rows: Rows, groupTokens: number, bitsOf: (channel: number) => number, begin?: (head: number, start: number) => void): number {
  let total = 0
  for (let head = 0; head < rows.heads; head++) {
    for (const { start, count } of pieces(rows.tokens, groupTokens)) {
      begin?.(head, start)
      for (let channel = 0; channel < rows.channels; channel++) {
        const run = channelRun(rows, head, channel, start, count)
        toIntegers(rows.data, run, bitsOf(channel), range(rows.data, run))
        total += bitsOf(channel) * count + 2 * halfBits
      }
    }
  }
  return total
}

function valuesByToken(rows: Rows, groupChannels: number, bits: number): number {
  let total = 0
  for (let head = 0; head < rows.heads; head++) {
    for (let token = 0; token < rows.tokens; token++) {
      for (const { start, count } of pieces(rows.channels, groupChannels)) {
        const run = rowRun(rows, head, token, start, count)
        toIntegers(rows.data, run, bits, range(rows.data, run))
        total += bits * count + 2 * halfBits
      }
    }
  }
  return total
}

/** The `count` channels of a page with the largest mean magnitude. */
function largest(rows: Rows, head: number, start: number, count: number): Set<number> {
  const magnitudes = Array.from({ length: rows.channels }, (_, channel) => {
    const { first, step, count: tokens } = channelRun(rows, head, channel, start, pageTokens)
    let sum = 0
    for (let i = 0; i < tokens; i++) sum += Math.abs(rows.data[first + i * step]!)
    return { channel, sum }
  })
  return new Set(magnitudes.sort((a, b) => b.sum - a.sum).slice(0, count).map(({ channel }) => channel))
}

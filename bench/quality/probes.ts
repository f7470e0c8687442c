/** Texts in which something is said early and asked for late, made by a seeded generator. */

/**
 * `pair`: a name and four digits, asked by the name. `word`: a word of 8 capitals,
 * asked by its first two.
 */
export type ProbeKind = 'pair' | 'word'

export const probeKinds: readonly ProbeKind[] = ['pair', 'word']

export interface Probe {
  /** What is said, `distance` characters of filler, the question, the answer. */
  readonly text: string
  /** The same length, filler, question and answer, but another thing was said. */
  readonly control: string
  /** Characters of the answer, the last ones of both texts. */
  readonly answer: number
}

const words = [
  'the', 'a', 'file', 'name', 'of', 'to', 'is', 'value', 'option', 'line', 'and', 'command', 'set', 'this', 'buffer', 'string', 'for', 'with', 'default',
  'function', 'returns', 'window', 'type', 'in', 'module', 'path', 'when', 'not', 'used', 'build', 'error', 'list', 'source', 'text', 'mode', 'key', 'if',
  'target', 'number', 'on', 'variable', 'print', 'be', 'object', 'package', 'library', 'from', 'as', 'install', 'version',
]
const wordLength = 8
const cue = 2

/** The same kind, distance and seed give the same texts. */
export function makeProbes(kind: ProbeKind, { distance, count, seed = 1 }: { distance: number; count: number; seed?: number }): Probe[] {
  const random = uniform(seed * 1000003 + distance * 31 + (kind === 'pair' ? 0 : 1))
  const pick = <T>(from: ArrayLike<T>): T => from[Math.floor(random() * from.length)]!
  const some = (letters: string, length: number): string => Array.from({ length }, () => pick(letters)).join('')
  const prose = (length: number): string => {
    let text = ''
    while (text.length < length) text += `${pick(words)}${random() < 0.1 ? '.\n' : ' '}`
    return text.slice(0, length)
  }
  const other = (said: string, make: () => string): string => {
    for (;;) {
      const made = make()
      if (made !== said) return made
    }
  }
  return Array.from({ length: count }, () => {
    const filler = prose(distance)
    if (kind === 'word') {
      const word = (): string => some('ABCDEFGHIJKLMNOPQRSTUVWXYZ', wordLength)
      const said = word()
      const rest = `${filler}\n${said}`
      return { text: `\n${said}\n${rest}`, control: `\n${other(said, word)}\n${rest}`, answer: wordLength - cue }
    }
    const name = some('abcdefghijklmnopqrstuvwxyz', 6)
    const digits = (): string => some('0123456789', 4)
    const said = digits()
    const rest = `${filler}\n${name} = ${said}`
    return { text: `\n${name} = ${said}\n${rest}`, control: `\n${name} = ${other(said, digits)}\n${rest}`, answer: 4 }
  })
}

/** Numbers in [0, 1) of a 32-bit mixing generator. */
function uniform(seed: number): () => number {
  let state = seed | 0
  return () => {
    state = (state + 0x9e3779b9) | 0
    let mixed = Math.imul(state ^ (state >>> 16), 0x21f0aaad)
    mixed = Math.imul(mixed ^ (mixed >>> 15), 0x735a2d97)
    return ((mixed ^ (mixed >>> 15)) >>> 0) / 2 ** 32
  }
}

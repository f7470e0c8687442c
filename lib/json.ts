/**
 * JSON from files that may be hostile: JSON.parse would take the last of two equal keys. Objects become Maps, so that no key
 * (`__proto__`) means anything, and nesting is bounded.
 */
export type Json = null | boolean | number | string | Json[] | Map<string, Json>

const maxDepth = 8
const space = /[ \t\n\r]*/y
const scalar = /-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null/y

/**
 * Parses one JSON text.
 * @throws {SyntaxError} for text that is not JSON, a key that occurs twice in one object, and more than 8 levels
 */
export function parseJson(text: string): Json {
  let position = 0
  const result = value(1)
  skipSpace()
  if (position !== text.length) fail('text after the value')
  return result

  function value(depth: number): Json {
    if (depth > maxDepth) fail(`more than ${maxDepth} levels`)
    skipSpace()
    if (text[position] === '{') return object(depth)
    if (text[position] === '[') return array(depth)
    if (text[position] === '"') return string()
    scalar.lastIndex = position
    const [token] = scalar.exec(text) ?? fail('no value')
    position += token.length
    return JSON.parse(token) as Json
  }

  function object(depth: number): Map<string, Json> {
    const members = new Map<string, Json>()
    position++
    if (accept('}')) return members
    do {
      skipSpace()
      const key = string()
      if (members.has(key)) fail(`a second ${JSON.stringify(key)}`)
      if (!accept(':')) fail('no colon')
      members.set(key, value(depth + 1))
    } while (accept(','))
    if (!accept('}')) fail('an object without an end')
    return members
  }

  function array(depth: number): Json[] {
    const elements: Json[] = []
    position++
    if (accept(']')) return elements
    do elements.push(value(depth + 1))
    while (accept(','))
    if (!accept(']')) fail('an array without an end')
    return elements
  }

  function string(): string {
    if (text[position] !== '"') fail('no string')
    let end = position + 1
    while (end < text.length && text[end] !== '"') end += text[end] === '\\' ? 2 : 1
    const token = text.slice(position, end + 1)
    position = end + 1
    return JSON.parse(token) as string // refuses bad escapes, control characters, and a token without its second quote
  }

  function accept(character: string): boolean {
    skipSpace()
    if (text[position] !== character) return false
    position++
    return true
  }

  function skipSpace(): void {
    space.lastIndex = position
    position += space.exec(text)?.[0].length ?? 0
  }

  function fail(what: string): never {
    throw new SyntaxError(`Bad JSON at character ${position}: ${what}`)
  }
}

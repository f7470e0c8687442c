import { InvalidArgumentError, Option } from 'commander'
import type { TextInput } from '../calibrate'
import { codec } from '../codec'

/** Readers of option values; a bad value is a usage error (exit code 2) that says what was expected. */
export function integer(least: number, most = 2 ** 31 - 1): (text: string) => number {
  return (text) => {
    const value = Number(text)
    if (text.trim() === '' || !Number.isInteger(value) || value < least || value > most) {
      throw new InvalidArgumentError(`Expected an integer from ${least} to ${most}.`)
    }
    return value
  }
}

export function positiveNumber(text: string): number {
  const value = Number(text)
  if (text.trim() === '' || !Number.isFinite(value) || value < 0) throw new InvalidArgumentError('Expected a number of at least 0.')
  return value
}

export function codecName(text: string): string {
  try {
    return codec(text).name
  } catch (error) {
    throw new InvalidArgumentError((error as Error).message)
  }
}

export const modelOption = (): Option => new Option('--model <directory>', 'directory of the model: tokenizer.json, onnx/model.onnx').makeOptionMandatory()
export const lengthOption = (): Option => new Option('--length <tokens>', 'tokens of a chunk, each a sequence of its own').default(512).argParser(integer(2))
export const deviceOption = (): Option =>
  new Option('--device <name>', 'where to compute; auto: cuda where it can be had').choices(['cpu', 'cuda', 'auto']).default('cpu')
export const deviceIndexOption = (): Option => new Option('--device-index <index>', 'which device of several').default(0).argParser(integer(0))
export const threadsOption = (): Option => new Option('--threads <count>', 'threads (default: all cores)').argParser(integer(1, 256))
export const seedOption = (): Option => new Option('--seed <integer>', 'same seed, same result').default(0).argParser(integer(0))
export const windowOption = (): Option => new Option('--window <tokens>', 'newest tokens kept in full precision').default(32).argParser(integer(0))
export const sinksOption = (): Option => new Option('--sinks <tokens>', 'first tokens kept in full precision').default(4).argParser(integer(0))

/** A file that may be named more than once. */
export function textOption(flags: string, description: string): Option {
  return new Option(flags, description).argParser((file: string, before: string[] = []) => {
    if (file === '-' && before.includes('-')) throw new InvalidArgumentError('Standard input can be read once only.')
    return [...before, file]
  })
}

/** Files, or standard input where the name is a dash. */
export function textInputs(names: readonly string[]): TextInput[] {
  return names.map((name) => (name === '-' ? process.stdin : { file: name }))
}

import { readFile } from 'node:fs/promises'
import path from 'node:path'
import { Tokenizer } from '@huggingface/tokenizers'
import { requireText } from './arguments'
import { CoupletError } from './errors'

// The declarations of this release import each other in a way that Node's module resolution does not follow, and come out untyped.
const Untyped = Tokenizer as unknown as new (definition: unknown, config: unknown) => {
  encode(text: string, options: { add_special_tokens: boolean }): { ids: number[] }
  decode(ids: number[], options: { skip_special_tokens: boolean }): string
}

/** Text to token ids and back, as the model's own `tokenizer.json` says. No special tokens are added or removed. */
export interface TextTokenizer {
  encode(text: string): number[]
  decode(ids: readonly number[]): string
}

/**
 * Reads `tokenizer.json` (and `tokenizer_config.json` when there is one) of a model directory.
 *
 * @throws {CoupletError} `ERR_COUPLET_UNSUPPORTED_MODEL` when the directory has no tokenizer that can be read.
 */
export async function loadTokenizer(directory: string): Promise<TextTokenizer> {
  requireText(directory, 'directory')
  const file = path.join(directory, 'tokenizer.json')
  let tokenizer: InstanceType<typeof Untyped>
  try {
    const config = readFile(path.join(directory, 'tokenizer_config.json'), 'utf8').catch(() => '{}')
    tokenizer = new Untyped(JSON.parse(await readFile(file, 'utf8')), JSON.parse(await config))
  } catch (error) {
    throw new CoupletError('ERR_COUPLET_UNSUPPORTED_MODEL', `Expected a tokenizer at ${file}, but: ${(error as Error).message}`, { cause: error })
  }
  return {
    encode: (text) => tokenizer.encode(text, { add_special_tokens: false }).ids,
    decode: (ids) => tokenizer.decode([...ids], { skip_special_tokens: true }),
  }
}

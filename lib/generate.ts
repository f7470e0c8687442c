import { requireInteger, requireObject, requireText } from './arguments'
import { requireModel } from './calibrate/capture'
import { rangeError, throwExpected } from './errors'
import { requireSignal } from './native/call'
import type { DecoderModel } from './onnx/model'
import { Sequence } from './cache'
import { loadTokenizer } from './tokenizer'

export interface GenerateOptions {
  /** Directory with the tokenizer. */
  directory: string
  prompt: string
  /** New tokens at most. Default 256. */
  tokens?: number
  /** 0 (the default) takes the likeliest token; otherwise softmax(logits / temperature) is sampled. */
  temperature?: number
  seed?: number
  /** Token ids that end the text. */
  stop?: readonly number[]
  /** Sequence to write on, which holds the prompt and all that was written once the text has ended; by default a fresh one that is dropped then. */
  sequence?: Sequence
  signal?: AbortSignal
}

/**
 * Writes on from a prompt; yields the text as it comes, in whole characters.
 * @throws {TypeError | RangeError} `ERR_COUPLET_INVALID_ARGUMENT`
 * @throws {CoupletError} `ERR_COUPLET_CACHE_FULL`, `ERR_COUPLET_BUSY` for a sequence that another run works on
 */
export async function* generate(model: DecoderModel, options: GenerateOptions): AsyncGenerator<string, void, void> {
  requireModel(model)
  requireObject(options, 'options')
  const { tokens: most = 256, temperature = 0, seed = 0, stop = [], signal } = options
  requireText(options.prompt, 'prompt')
  requireInteger(most, 'tokens', 0)
  requireInteger(seed, 'seed', 0, Number.MAX_SAFE_INTEGER)
  const isNumber = typeof temperature === 'number'
  if (!isNumber || !(temperature >= 0)) throwExpected('a number of at least 0', 'temperature', temperature, isNumber)
  if (!Array.isArray(stop)) throwExpected('an array of token ids', 'stop', stop)
  if (options.sequence !== undefined && !(options.sequence instanceof Sequence)) throwExpected('a Sequence', 'sequence', options.sequence)
  requireSignal(signal)
  const tokenizer = await loadTokenizer(options.directory)
  const prompt = tokenizer.encode(options.prompt)
  if (prompt.length === 0) throw rangeError('Expected a text of at least one token for `prompt` but received an empty one')
  const random = mulberry32(seed)
  const sequence = options.sequence ?? model.sequence()
  const start = sequence.length
  const run = (tokens: ArrayLike<number>) => model.run([{ sequence, tokens }], { logits: 'last', ...(signal && { signal }) })
  const written: number[] = []
  let shown = ''
  try {
    let next: ArrayLike<number> = prompt
    while (written.length < most) {
      const { logits } = await run(next)
      const token = pick(logits, temperature, random)
      if (stop.includes(token)) break
      written.push(token)
      next = [token]
      const text = tokenizer.decode(written)
      // A trailing replacement character is the beginning of a character whose other bytes are still to come.
      if (text.length > shown.length && !text.endsWith('\uFFFD')) {
        yield text.slice(shown.length)
        shown = text
      }
    }
    const rest = written.length > 0 ? tokenizer.decode(written) : ''
    if (rest.length > shown.length) yield rest.slice(shown.length)
    if (options.sequence && sequence.length < start + prompt.length + written.length) await run(next)
  } finally {
    if (!options.sequence) sequence.dispose()
  }
}

function pick(logits: Float32Array, temperature: number, random: () => number): number {
  let best = 0
  for (let i = 1; i < logits.length; i++) if ((logits[i] as number) > (logits[best] as number)) best = i
  if (temperature === 0) return best
  const highest = logits[best] as number
  const shares = Float64Array.from(logits, (logit) => Math.exp((logit - highest) / temperature))
  let left = random() * shares.reduce((a, b) => a + b, 0)
  for (let i = 0; i < shares.length; i++) if ((left -= shares[i] as number) < 0) return i
  return best
}

/** Small seeded generator (Tommy Ettinger's mulberry32), uniform in [0, 1). */
function mulberry32(seed: number): () => number {
  let state = seed >>> 0
  return () => {
    state = (state + 0x6d2b79f5) >>> 0
    let mixed = Math.imul(state ^ (state >>> 15), state | 1)
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61)
    return ((mixed ^ (mixed >>> 14)) >>> 0) / 4294967296
  }
}

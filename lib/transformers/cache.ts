import { requireInteger, requireObject } from '../arguments'
import type { RotaryOption } from '../cache'
import { Codebook, type RotarySpec } from '../codebook'
import { throwExpected } from '../errors'
import { CodedEntry, type CacheTensor } from './entry'
import { unsupported } from './errors'
import { Rotation } from './rotation'

/** Options of a `CoupledCache`. */
export interface CoupledCacheOptions {
  /** Codebooks of the model; layers are counted over those that have keys and values. */
  codebook: Codebook
  /** Last tokens that stay in full precision, at least (default 32): whole pages of 64 tokens are coded. */
  window?: number
  /** First tokens that stay in full precision (default 4). */
  sinks?: number
  /**
   * The rotary embedding inside the graph: present keys are rotated, and codes are made of keys before rotation. Default: what
   * the codebook says. `null`: the graph has none.
   */
  rotary?: RotaryOption
  /** Tokens of left padding of each row of the batch, so that positions are right (default none). */
  padding?: readonly number[]
  /** Threads of encode and decode. Default: all cores. */
  threads?: number
}

/** What a `CoupledCache` holds. */
export interface CoupledCacheStatistics {
  /** Tokens of each row, padding included. */
  tokens: number
  /** Of these, the ones that are codes. */
  codedTokens: number
  /** Bytes of codes and of tokens in full precision. */
  bytes: number
  /** 8 * bytes / channels of all keys and values. */
  bitsPerChannel: number
}

/** Keys and values of a decoder, also of the decoder in an encoder-decoder. */
const ENTRY = /^past_key_values\.(\d+)\.(?:decoder\.)?(key|value)$/

/**
 * A past_key_values for `generate()` of @huggingface/transformers that stores codes, for graphs which `attach` cannot rewrite.
 * It works beside any graph, at a price: the graph still takes and returns keys and values in full precision, so a step costs
 * what it costs with DynamicCache and memory is saved between calls of generate(), not inside one.
 *
 * Give the same cache to the next call, along with the whole text, to continue it. Entries that are no keys or values (states of
 * convolutions and of recurrent layers) pass through untouched.
 */
export class CoupledCache {
  // Whatever is an own enumerable property is fed to the graph, so everything else is private.
  readonly #options: CoupledCacheOptions & { window: number; sinks: number }
  readonly #rotation: Rotation | undefined
  readonly #entries = new Map<string, CodedEntry>()

  /** @throws {CoupletError} `ERR_COUPLET_UNSUPPORTED` when the codebook's rotary angles are scaled and `rotary` is not given */
  constructor(options: CoupledCacheOptions) {
    requireObject(options, 'options')
    const { codebook, window = 32, sinks = 4 } = options
    if (!(codebook instanceof Codebook)) throwExpected('a Codebook', 'codebook', codebook)
    if (window !== Infinity) requireInteger(window, 'window', 0)
    requireInteger(sinks, 'sinks', 0)
    const rotary = options.rotary === undefined ? known(codebook.metadata.rotary) : options.rotary
    this.#options = { ...options, window, sinks }
    this.#rotation = rotary ? new Rotation(rotary, codebook.headDim) : undefined
  }

  /** Tokens so far; transformers.js asks for it to tell which tokens are new. */
  get_seq_length(): number {
    const first = this.#entries.values().next()
    return first.done ? 0 : first.value.length
  }

  /** Takes the tensors that a step returned; called by transformers.js. */
  update(entries: Record<string, CacheTensor>): void {
    const names = Object.keys(entries).filter((name) => ENTRY.test(name))
    if (this.#entries.size === 0 && names.length > 0) this.#create(names, entries)
    for (const [name, tensor] of Object.entries(entries)) {
      const entry = this.#entries.get(name)
      if (entry) {
        entry.update(name, tensor)
        continue
      }
      const replaced = (this as Record<string, unknown>)[name] as CacheTensor | undefined
      if (replaced && replaced !== tensor && replaced.location === 'gpu-buffer') replaced.dispose()
      Object.defineProperty(this, name, { value: tensor, enumerable: true, configurable: true, writable: true })
    }
  }

  statistics(): CoupledCacheStatistics {
    const all = [...this.#entries.values()]
    const bytes = all.reduce((sum, entry) => sum + entry.bytes, 0)
    const channels = all.reduce((sum, entry) => sum + entry.length * entry.channels, 0)
    return { tokens: this.get_seq_length(), codedTokens: all[0]?.codedTokens ?? 0, bytes, bitsPerChannel: channels > 0 ? (8 * bytes) / channels : 0 }
  }

  /** Forgets everything; the cache is then empty and may be used for another text. */
  dispose(): Promise<void> {
    this[Symbol.dispose]()
    return Promise.resolve()
  }

  [Symbol.dispose](): void {
    for (const name of Object.keys(this)) delete (this as Record<string, unknown>)[name]
    this.#entries.clear()
  }

  #create(names: readonly string[], entries: Record<string, CacheTensor>): void {
    const { codebook, window, sinks, padding = [], threads } = this.#options
    const layers = [...new Set(names.map((name) => Number(ENTRY.exec(name)![1])))].sort((a, b) => a - b)
    const [, kvHeads = 0, , headDim = 0] = entries[names[0]!]!.dims
    codebook.check({ layers: layers.length, kvHeads, headDim })
    if (codebook.transforms.includes('value.mix'))
      throw unsupported('this codebook mixes values (value.mix), which CoupledCache does not do; a model that couplet can rewrite does')
    for (const name of names) {
      const [, number, side] = ENTRY.exec(name)!
      const layer = layers.indexOf(Number(number))
      const isKey = side === 'key'
      this.#entries.set(name, new CodedEntry(name, entries[name]!, {
        parts: codebook.parts(layer).map(({ firstHead, heads, ...part }) => ({
          firstHead, heads,
          ...(isKey
            ? { codec: part.keyCodec, table: part.keyTable, metric: part.keyMetric }
            : { codec: part.valueCodec, table: part.valueTable, metric: part.valueMetric }),
        })),
        rotation: isKey ? this.#rotation : undefined,
        order: isKey ? codebook.transform('key.group', layer) : undefined,
        sinks, window, padding, threads,
      }))
      // A getter: transformers.js reads it when it feeds the graph, and nothing is decoded before.
      Object.defineProperty(this, name, { get: () => this.#entries.get(name)?.read(), enumerable: true, configurable: true })
    }
  }
}

/** A rotary embedding that the codebook describes completely. */
function known(rotary: RotarySpec | null): RotaryOption {
  if (!rotary) return null
  if (rotary.theta === undefined || rotary.scaled) {
    throw unsupported('the codebook says that rotary angles are scaled, not how; pass their tables to CoupledCache as `rotary`: { kind, cos, sin }')
  }
  return { kind: rotary.kind, dim: rotary.dim, theta: rotary.theta }
}

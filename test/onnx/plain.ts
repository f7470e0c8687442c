/** The same graphs run by onnxruntime-node as they are: what pass-through has to equal. */
import * as ort from 'onnxruntime-node'

import type { Model } from '../../lib/onnx/proto'
import { encodeModel } from '../../lib/onnx/proto'
import { float32FromFloat16 } from '../../lib/float16'

/** One sequence of a decoder, its past held in tensors. */
export class PlainDecoder {
  length = 0
  #past: Record<string, ort.Tensor> = {}

  private constructor(private readonly session: ort.InferenceSession) {
    this.reset()
  }

  static async create(model: Model | string): Promise<PlainDecoder> {
    const options = { intraOpNumThreads: 1, logSeverityLevel: 3 as const }
    if (typeof model === 'string') return new PlainDecoder(await ort.InferenceSession.create(model, options))
    return new PlainDecoder(await ort.InferenceSession.create(encodeModel(model), options))
  }

  reset(): void {
    this.length = 0
    for (const input of this.session.inputMetadata) {
      if (!input.isTensor || !input.name.startsWith('past_key_values')) continue
      const [, heads, , channels] = input.shape as number[]
      const dims = [1, heads!, 0, channels!]
      const none = input.type === 'float16' ? new Uint16Array(0) : new Float32Array(0)
      this.#past[input.name] = new ort.Tensor(input.type, none, dims)
    }
  }

  /** Logits of all tokens, float32 [tokens][vocabulary]. */
  async run(tokens: number[]): Promise<Float32Array> {
    const total = this.length + tokens.length
    const integers = (values: number[]) => new ort.Tensor('int64', BigInt64Array.from(values, BigInt), [1, values.length])
    const given: Record<string, ort.Tensor> = {
      input_ids: integers(tokens),
      attention_mask: integers(Array.from({ length: total }, () => 1)),
      position_ids: integers(tokens.map((_, i) => this.length + i)),
      total: new ort.Tensor('int32', Int32Array.of(total), []),
    }
    const feeds = Object.fromEntries(this.session.inputNames.map((name) => [name, this.#past[name] ?? given[name]!]))
    const results = await this.session.run(feeds)
    for (const [name, tensor] of Object.entries(results)) if (name.startsWith('present')) this.#past[name.replace('present', 'past_key_values')] = tensor
    this.length = total
    const { data } = results.logits!
    return data instanceof Float32Array ? data : float32FromFloat16(data as Uint16Array)
  }

  async release(): Promise<void> {
    await this.session.release()
  }
}

/** The largest difference of two arrays of the same length. */
export function farthest(a: Float32Array, b: Float32Array): number {
  if (a.length !== b.length) throw new Error(`Expected ${a.length} elements but received ${b.length}`)
  return a.reduce((most, value, i) => Math.max(most, Math.abs(value - b[i]!)), 0)
}

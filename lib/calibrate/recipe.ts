/** The recipe `best`: which weights and transforms, by what the model predicts with them on chunks that nothing was learned from. */
import { rangeError } from '../errors'
import { measure } from '../evaluate'
import { DecoderModel } from '../onnx/model'
import type { TransformStep } from '../transform/learn'
import type { Captured, WeightKind } from './capture'
import type { LearnedSide, LearnOptions } from './learn'
import { codebookOf, learnSides } from './learn'

/** One way to learn a codebook, and what it came to. */
export interface TriedRecipe {
  weights: WeightKind
  transforms: readonly TransformStep[]
  /** Mean loss (natural logarithm) and perplexity on the chunks held out, with window 32 and 4 sinks. */
  loss: number
  perplexity: number
  /** The same with every token coded. */
  codedLoss: number
}

/** What can be learned with weights of a kind: a metric needs gradients. */
const candidates: Record<WeightKind, readonly (readonly TransformStep[])[]> = {
  uniform: [[], ['value.mix'], ['key.group', 'value.mix']],
  attention: [[], ['value.mix'], ['key.group', 'value.mix']],
  fisher: [[], ['key.metric', 'value.metric'], ['value.mix'], ['key.metric', 'value.mix'], ['key.group', 'key.metric', 'value.mix']],
}

export interface BestOfCapture {
  best: TriedRecipe
  tried: TriedRecipe[]
  learned: LearnedSide[]
}

/**
 * Learns every candidate of the weights that were captured, and keeps what predicts best. By loss with every token coded: with a window
 * differences are a tenth of that, and in the order of chance.
 */
export async function bestOf(captured: Captured, options: LearnOptions): Promise<BestOfCapture> {
  const chunks = captured.heldOutChunks.filter(({ length }) => length > 1)
  if (chunks.length === 0) throw rangeError('Expected a text with chunks to hold out for `recipe` "best" but received a shorter one')
  const steps = options.transforms === undefined ? candidates[captured.weights] : [options.transforms]
  const tried: BestOfCapture[] = []
  for (const [index, transforms] of steps.entries()) {
    const learned: LearnedSide[] = []
    const onProgress: LearnOptions['onProgress'] = ({ done, total, ...rest }) => {
      options.onProgress?.({ ...rest, done: index * (total ?? 0) + done, total: steps.length * (total ?? 0) })
    }
    for await (const side of learnSides(captured, { ...options, transforms, onProgress })) learned.push(side)
    using codebook = codebookOf(captured, options, learned)
    const lossWith = async (kept: { window: number; sinks: number }) => {
      using model = await DecoderModel.load(captured.model.file, { codebook, ...kept, ...(options.threads !== undefined && { threads: options.threads }) })
      return (await measure(model, chunks, options.signal)).loss
    }
    const loss = await lossWith({ window: 32, sinks: 4 })
    const one: TriedRecipe = { weights: captured.weights, transforms, loss, perplexity: Math.exp(loss), codedLoss: await lossWith({ window: 0, sinks: 0 }) }
    tried.push({ best: one, tried: [], learned })
  }
  const best = tried.reduce((a, b) => (isBetter(b.best, a.best) ? b : a))
  return { ...best, tried: tried.map((one) => one.best) }
}

export const isBetter = (one: TriedRecipe, other: TriedRecipe): boolean => one.codedLoss < other.codedLoss

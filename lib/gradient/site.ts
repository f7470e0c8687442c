/** What the rules of the reverse pass are written with. */
import { CoupletError } from '../errors'
import type { GraphIndex } from '../onnx/graph'
import type { NodeProto } from '../onnx/proto'
import type { GraphBuilder } from './builder'

/** A node that the reverse pass has come to. */
export interface Site {
  readonly node: NodeProto
  readonly build: GraphBuilder
  readonly index: GraphIndex
  /** Where the model's external data lies. */
  readonly folder: string | undefined
  /** Gradient with respect to an output; undefined when the loss does not depend on it. */
  readonly gradient: (output: number) => string | undefined
  /** Whether the gradient with respect to an input is asked for. */
  readonly wants: (input: number) => boolean
}

/** Gradients by the number of the input that they belong to: at least of those that are wanted and depend on it. */
export type Rule = (site: Site) => Record<number, string> | Promise<Record<number, string>>

/** Sums a gradient over the axes along which `value` was broadcast. */
export function unbroadcast({ build }: Site, gradient: string, value: string): string {
  const shape = build.add('Shape', [value])
  const from = build.add('Shape', [gradient])
  const missing = build.add('Sub', [build.add('Shape', [from]), build.add('Shape', [shape])])
  const aligned = build.add('Concat', [build.add('Expand', [build.integers([1]), missing]), shape], { attributes: { axis: 0 } })
  const repeated = build.add('NonZero', [build.add('Not', [build.add('Equal', [aligned, from])])])
  const axes = build.add('Reshape', [repeated, build.integers([-1])])
  const sum = build.add('ReduceSum', [gradient, axes], { attributes: { keepdims: 1, noop_with_empty_axes: 1 } })
  return build.add('Reshape', [sum, shape])
}

/** Refuses a node in a gradient pass. */
export function refuse(node: NodeProto, reason: string): never {
  const operator = node.domain === '' ? node.opType : `${node.domain}.${node.opType}`
  throw new CoupletError(
    'ERR_COUPLET_UNSUPPORTED_MODEL',
    `Cannot compute gradients through node "${node.name || node.output[0]!}" (${operator}): ${reason}; give \`gradients\` computed elsewhere, or use attention weights`,
  )
}

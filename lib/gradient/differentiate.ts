/** The reverse pass over a graph: adds the nodes that compute the gradients of a loss with respect to some of its values. */
import { CoupletError } from '../errors'
import { GraphIndex, valuesRead } from '../onnx/graph'
import type { Model, NodeProto, OperatorSet } from '../onnx/proto'
import { GraphBuilder } from './builder'
import { constantOperators, ruleOf } from './rules'
import type { Site } from './site'
import { refuse } from './site'

export interface Differentiation {
  /** Gradient of the loss with respect to a value, by the value's name: where the pass begins. */
  seeds: ReadonlyMap<string, string>
  /** Values whose gradients are wanted. A gradient also flows through one target to those before it. */
  targets: readonly string[]
  /**
   * Straight-through pairs, a value to the one that it stands for: what reaches the first is passed on to the second as if
   * the two were equal.
   */
  straightThrough?: ReadonlyMap<string, string>
  /** Where the model's external data lies. */
  folder?: string
}

/** Semantics of every operator with a rule are the same from 13 to 17; before 13, axes are attributes. */
const leastOpset = 13
/** CastLike came with 15, ScatterElements that adds up with 16. */
const usedOpset = 17n

/**
 * Adds gradient nodes to `model` and returns the name of the gradient of each target, which has the target's shape and type.
 * @throws {CoupletError} `ERR_COUPLET_UNSUPPORTED_MODEL` naming a node on the way whose operator has no rule, or a target that the loss does not depend on.
 */
export async function differentiate(model: Model, { seeds, targets, straightThrough = new Map(), folder }: Differentiation): Promise<Map<string, string>> {
  raiseOpset(model)
  const { graph } = model
  const index = new GraphIndex(model)
  const active = downstream(graph.node, targets, straightThrough)
  const build = new GraphBuilder(model, 'gradient')
  const contributions = new Map<string, string[]>(Array.from(seeds, ([value, gradient]) => [value, [gradient]]))
  const contribute = (value: string, gradient: string) => { contributions.set(value, [...(contributions.get(value) ?? []), gradient]) }
  const gradientOf = (value: string): string | undefined => {
    const parts = contributions.get(value)
    if (!parts || parts.length < 2) return parts?.[0]
    const sum = build.add('Sum', parts)
    contributions.set(value, [sum])
    return sum
  }

  for (const node of [...graph.node].reverse()) {
    for (const value of node.output) {
      const original = straightThrough.get(value)
      const gradient = original === undefined ? undefined : gradientOf(value)
      if (original !== undefined && gradient !== undefined) contribute(original, gradient)
    }
    if (!node.output.some((value) => contributions.has(value)) || !node.input.some((value) => active.has(value))) continue
    if (constantOperators.has(node.opType) && node.domain === '') continue
    const site: Site = {
      node, build, index, folder,
      gradient: (output) => (node.output[output] ? gradientOf(node.output[output]) : undefined),
      wants: (input) => active.has(node.input[input] ?? ''),
    }
    const rule = ruleOf(node) ?? refuse(node, 'couplet has no rule for its gradient')
    for (const [input, gradient] of Object.entries(await rule(site))) contribute(node.input[Number(input)]!, gradient)
  }

  const gradients = new Map(targets.map((value) => [value, gradientOf(value) ?? refuseValue(value)]))
  graph.node.push(...build.take())
  return gradients
}

function refuseValue(value: string): never {
  throw new CoupletError('ERR_COUPLET_UNSUPPORTED_MODEL', `Cannot compute the gradient of "${value}": the loss does not depend on it`)
}

/** The values that change when a target does. */
function downstream(nodes: readonly NodeProto[], targets: readonly string[], straightThrough: ReadonlyMap<string, string>): Set<string> {
  const active = new Set(targets)
  for (const node of nodes) {
    if (constantOperators.has(node.opType) && node.domain === '') continue
    if (valuesRead(node).some((value) => active.has(value))) for (const value of node.output) if (value !== '') active.add(value)
    for (const value of node.output) if (active.has(straightThrough.get(value) ?? '')) active.add(value)
  }
  return active
}

function raiseOpset({ head }: Model): void {
  const own = head.opsetImport.find(({ domain }) => domain === '' || domain === 'ai.onnx')
  if (!own || own.version < leastOpset) refuseOpset(own)
  if (own.version < usedOpset) own.version = usedOpset
}

function refuseOpset(own: OperatorSet | undefined): never {
  throw new CoupletError('ERR_COUPLET_UNSUPPORTED_MODEL', `Cannot compute gradients of a graph of operator set ${own?.version ?? 'unknown'}; ${leastOpset} or later is needed`)
}

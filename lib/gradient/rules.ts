/**
 * The gradient of each operator, as nodes of the graph. Rules know neither shapes nor element types: where a shape matters,
 * nodes ask for it at run time, so they hold for any number of axes and for float16 as for float32.
 */
import { attribute } from '../onnx/graph'
import type { NodeProto } from '../onnx/proto'
import { DataType } from '../onnx/proto'
import { activationRules } from './rules-activation'
import { layoutRules } from './rules-layout'
import { matmulRules } from './rules-matmul'
import { normRules } from './rules-norm'
import type { Rule, Site } from './site'
import { unbroadcast } from './site'

/** Operators of ONNX itself whose outputs do not change under small changes of their inputs. */
export const constantOperators = new Set([
  'ArgMax', 'ArgMin', 'Ceil', 'ConstantOfShape', 'Equal', 'Floor', 'Greater', 'GreaterOrEqual', 'IsInf', 'IsNaN', 'Less', 'LessOrEqual', 'NonZero',
  'Not', 'Round', 'Shape', 'Sign', 'Size',
])

const onlyGradient = (site: Site): string => site.gradient(0)!

/** Gradients of an operator on two broadcast inputs, from its gradient as if both had the shape of the output. */
function broadcast(gradientOf: (site: Site, input: 0 | 1) => string): Rule {
  return (site) => {
    const result: Record<number, string> = {}
    for (const input of [0, 1] as const) {
      if (!site.wants(input)) continue
      const gradient = gradientOf(site, input)
      const other = site.index.constant(site.node.input[1 - input]!)
      // A constant of one element broadcasts nothing.
      result[input] = other && other.dims.length <= 1 && other.dims.every((dim) => dim === 1n) ? gradient : unbroadcast(site, gradient, site.node.input[input]!)
    }
    return result
  }
}

const arithmeticRules: Record<string, Rule> = {
  Identity: (site) => ({ 0: onlyGradient(site) }),
  Cast: (site) => ({ 0: site.build.add('CastLike', [onlyGradient(site), site.node.input[0]!]) }),
  Neg: (site) => ({ 0: site.build.add('Neg', [onlyGradient(site)]) }),
  Add: broadcast(onlyGradient),
  Sub: broadcast((site, input) => (input === 0 ? onlyGradient(site) : site.build.add('Neg', [onlyGradient(site)]))),
  Mul: broadcast((site, input) => site.build.add('Mul', [onlyGradient(site), site.node.input[1 - input]!])),
  Div: broadcast((site, input) => {
    const quotient = site.build.add('Div', [onlyGradient(site), site.node.input[1]!])
    return input === 0 ? quotient : site.build.add('Neg', [site.build.add('Mul', [quotient, site.node.output[0]!])])
  }),
  Sum: (site) => Object.fromEntries(site.node.input.flatMap((value, input) =>
    (site.wants(input) ? [[input, unbroadcast(site, onlyGradient(site), value)]] : []))),
  // d sqrt(x) = 1 / (2 sqrt(x))
  Sqrt: ({ build, node, gradient }) => ({ 0: build.add('Div', [gradient(0)!, build.add('Add', [node.output[0]!, node.output[0]!])]) }),
  Reciprocal: ({ build, node: { output: [y = ''] }, gradient }) => ({ 0: build.add('Neg', [build.add('Mul', [gradient(0)!, build.add('Mul', [y, y])])]) }),
  Exp: ({ build, node, gradient }) => ({ 0: build.add('Mul', [gradient(0)!, node.output[0]!]) }),
  // d x^n = n x^(n - 1), for an exponent that is no function of a target
  Pow: (site) => {
    const { build, node: { input: [x = '', n = ''] } } = site
    const exponent = build.add('CastLike', [n, x])
    const lower = build.add('Pow', [x, build.add('Sub', [exponent, build.scalar(1, x)])])
    return { 0: unbroadcast(site, build.add('Mul', [onlyGradient(site), build.add('Mul', [exponent, lower])]), x) }
  },
  Where: (site) => {
    const { build, node: { input: [condition = '', ...branches] } } = site
    const zero = build.scalar(0, onlyGradient(site))
    return Object.fromEntries(branches.flatMap((value, branch) => {
      if (!site.wants(branch + 1)) return []
      const parts = branch === 0 ? [onlyGradient(site), zero] : [zero, onlyGradient(site)]
      return [[branch + 1, unbroadcast(site, build.add('Where', [condition, ...parts]), value)]]
    }))
  },
  // dx = y (g - sum(g y))
  Softmax: ({ build, node, gradient }) => {
    const axis = Number(attribute(node, 'axis')?.i ?? -1)
    const weighted = build.add('Mul', [gradient(0)!, node.output[0]!])
    return { 0: build.add('Sub', [weighted, build.add('Mul', [node.output[0]!, build.reduce('ReduceSum', weighted, [axis])])]) }
  },
  LogSoftmax: ({ build, node, gradient }) => {
    const axis = Number(attribute(node, 'axis')?.i ?? -1)
    const probability = build.add('Exp', [node.output[0]!])
    return { 0: build.add('Sub', [gradient(0)!, build.add('Mul', [probability, build.reduce('ReduceSum', gradient(0)!, [axis])])]) }
  },
  ReduceSum: (site) => ({ 0: spread(site, onlyGradient(site)) }),
  ReduceMean: (site) => {
    const { build, node } = site
    const size = (value: string) => build.cast(build.add('Size', [value]), DataType.float)
    const share = build.add('CastLike', [build.add('Div', [size(node.output[0]!), size(node.input[0]!)]), node.input[0]!])
    return { 0: build.add('Mul', [spread(site, onlyGradient(site)), share]) }
  },
}

/** Repeats the gradient of a sum along the axes that were summed over. */
function spread({ build, node }: Site, gradient: string): string {
  const [x = '', ...axes] = node.input
  const kept = node.attribute.filter(({ name }) => name !== 'keepdims')
  const attributes = Object.fromEntries(kept.map(({ name, i, ints }) => [name, ints.length > 0 ? ints.map(Number) : Number(i)]))
  const shape = build.add('Shape', [build.add(node.opType, [x, ...axes], { attributes: { ...attributes, keepdims: 1 } })])
  return build.add('Expand', [build.add('Reshape', [gradient, shape]), build.add('Shape', [x])])
}

const rules = new Map<string, Rule>([
  ...[arithmeticRules, activationRules.onnx, layoutRules, matmulRules.onnx, normRules.onnx].flatMap((group) => Object.entries(group)),
  ...[activationRules.microsoft, matmulRules.microsoft, normRules.microsoft].flatMap((group) =>
    Object.entries(group).map(([name, rule]): [string, Rule] => [`com.microsoft.${name}`, rule])),
])

/** The rule of a node's operator, if there is one. */
export function ruleOf({ domain, opType }: NodeProto): Rule | undefined {
  return rules.get(domain === '' || domain === 'ai.onnx' ? opType : `${domain}.${opType}`)
}

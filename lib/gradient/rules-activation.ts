/** Gradients of activation functions. */
import { attribute } from '../onnx/graph'
import type { GraphBuilder } from './builder'
import type { Rule, Site } from './site'

/** A rule for y = f(x) on every element, from the nodes of its derivative. */
function elementwise(derivative: (site: Site, x: string, y: string) => string): Rule {
  return (site) => ({ 0: site.build.add('Mul', [site.gradient(0)!, derivative(site, site.node.input[0]!, site.node.output[0]!)]) })
}

/** y (1 - y), of a sigmoid */
const sigmoidSlope = (build: GraphBuilder, y: string): string => build.add('Sub', [y, build.add('Mul', [y, y])])

/** s + alpha x s (1 - s) for x s with s = sigmoid(alpha x) */
function siluDerivative({ build }: Site, x: string, alpha: number): string {
  const sigmoid = build.add('Sigmoid', [alpha === 1 ? x : build.add('Mul', [x, build.scalar(alpha, x)])])
  const slope = build.add('Mul', [x, sigmoidSlope(build, sigmoid)])
  return build.add('Add', [sigmoid, alpha === 1 ? slope : build.add('Mul', [slope, build.scalar(alpha, x)])])
}

/** Phi(x) + x phi(x): the normal distribution and its density */
function geluDerivative({ build }: Site, x: string): string {
  const times = (value: string, factor: number) => build.add('Mul', [value, build.scalar(factor, x)])
  const distribution = times(build.add('Add', [build.add('Erf', [times(x, Math.SQRT1_2)]), build.scalar(1, x)]), 0.5)
  const density = times(build.add('Exp', [times(build.add('Mul', [x, x]), -0.5)]), 1 / Math.sqrt(2 * Math.PI))
  return build.add('Add', [distribution, build.add('Mul', [x, density])])
}

/** Of x (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3) */
function tanhGeluDerivative({ build }: Site, x: string): string {
  const times = (value: string, factor: number) => build.add('Mul', [value, build.scalar(factor, x)])
  const plus = (value: string, term: number) => build.add('Add', [value, build.scalar(term, x)])
  const square = build.add('Mul', [x, x])
  const scale = Math.sqrt(2 / Math.PI)
  const tanh = build.add('Tanh', [times(build.add('Mul', [x, plus(times(square, 0.044715), 1)]), scale)])
  const slope = build.add('Mul', [plus(build.add('Neg', [build.add('Mul', [tanh, tanh])]), 1), times(plus(times(square, 3 * 0.044715), 1), scale)])
  return times(build.add('Add', [plus(tanh, 1), build.add('Mul', [x, slope])]), 0.5)
}

export const activationRules: Record<'onnx' | 'microsoft', Record<string, Rule>> = {
  onnx: {
    Sigmoid: elementwise(({ build }, _, y) => sigmoidSlope(build, y)),
    Tanh: elementwise(({ build }, x, y) => build.add('Sub', [build.scalar(1, x), build.add('Mul', [y, y])])),
    Relu: elementwise(({ build }, x) => build.add('CastLike', [build.add('Greater', [x, build.scalar(0, x)]), x])),
    // 2 / sqrt(pi) exp(-x^2)
    Erf: elementwise(({ build }, x) =>
      build.add('Mul', [build.add('Exp', [build.add('Neg', [build.add('Mul', [x, x])])]), build.scalar(2 / Math.sqrt(Math.PI), x)])),
    Gelu: elementwise((site, x) =>
      (new TextDecoder().decode(attribute(site.node, 'approximate')?.s) === 'tanh' ? tanhGeluDerivative(site, x) : geluDerivative(site, x))),
  },
  microsoft: {
    Gelu: elementwise(geluDerivative),
    QuickGelu: elementwise((site, x) => siluDerivative(site, x, attribute(site.node, 'alpha')?.f ?? 1.702)),
    // Its second input is a bias, added first.
    FastGelu: (site) => {
      const { build, node: { input: [x = '', bias] } } = site
      return { 0: build.add('Mul', [site.gradient(0)!, tanhGeluDerivative(site, bias ? build.add('Add', [x, bias]) : x)]) }
    },
  },
}

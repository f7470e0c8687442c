/** Gradients of RMS normalisation, alone and with the sum of the residual stream before it. */
import { attribute } from '../onnx/graph'
import { DataType } from '../onnx/proto'
import type { Rule, Site } from './site'
import { refuse, unbroadcast } from './site'

/**
 * Gradient with respect to x of y = x r gamma, r = 1 / sqrt(mean(x^2) + epsilon), the mean over the last axis:
 * dx = r h - x r^3 mean(h x) with h = g gamma. In float32 whatever the graph's type: squares of a stream overflow float16.
 */
function rmsGradient({ build, node }: Site, gradient: string, x: string, gamma: string): string {
  const [g, wide, scale] = [gradient, x, gamma].map((value) => build.cast(value, DataType.float)) as [string, string, string]
  const times = (a: string, b: string) => build.add('Mul', [a, b])
  const mean = (value: string) => build.reduce('ReduceMean', value, [-1])
  const epsilon = build.floats(Float32Array.of(attribute(node, 'epsilon')?.f ?? 1e-5), [])
  const r = build.add('Reciprocal', [build.add('Sqrt', [build.add('Add', [mean(times(wide, wide)), epsilon])])])
  const h = times(g, scale)
  const pull = times(times(r, times(r, r)), mean(times(h, wide)))
  return build.add('CastLike', [build.add('Sub', [times(r, h), times(wide, pull)]), x])
}

function requireLastAxis({ node }: Site): void {
  const axis = Number(attribute(node, 'axis')?.i ?? -1)
  if (axis !== -1) refuse(node, `it normalizes from axis ${axis} on, not over the last one (-1)`)
}

function requireConstantScale(site: Site, input: number): void {
  if (site.wants(input)) refuse(site.node, 'its scale depends on keys or values')
}

const rmsNorm: Rule = (site) => {
  requireLastAxis(site)
  requireConstantScale(site, 1)
  const [x = '', gamma = ''] = site.node.input
  return { 0: rmsGradient(site, site.gradient(0)!, x, gamma) }
}

/** Inputs: input, skip, gamma, bias; outputs: the normalized sum, two statistics, and the sum itself. */
const skipRmsNorm: Rule = (site) => {
  const { build, node } = site
  requireConstantScale(site, 2)
  while (node.output.length < 4) node.output.push('')
  const sum = (node.output[3] ||= `${node.output[0]!}.gradient.sum`)
  const normalized = site.gradient(0)
  const passed = site.gradient(3)
  if (site.gradient(1) ?? site.gradient(2)) refuse(node, 'the loss depends on its statistics')
  const parts = [...(normalized ? [rmsGradient(site, normalized, sum, node.input[2]!)] : []), ...(passed ? [passed] : [])]
  const gradient = parts.length > 1 ? build.add('Sum', parts) : parts[0]!
  return Object.fromEntries([0, 1, 3].flatMap((input) => (site.wants(input) ? [[input, unbroadcast(site, gradient, node.input[input]!)]] : [])))
}

export const normRules: Record<'onnx' | 'microsoft', Record<string, Rule>> = {
  // onnxruntime keeps SimplifiedLayerNormalization in the domain of ONNX; RMSNormalization is ONNX's own name of it.
  onnx: { SimplifiedLayerNormalization: rmsNorm, RMSNormalization: rmsNorm },
  microsoft: { SimplifiedLayerNormalization: rmsNorm, SkipSimplifiedLayerNormalization: skipRmsNorm },
}

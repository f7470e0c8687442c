/** Gradients of matrix products. */
import { attribute } from '../onnx/graph'
import { dequantize } from './nbits'
import type { Rule, Site } from './site'
import { refuse, unbroadcast } from './site'

/** Of alpha * op(a) op(b), where op may swap the last two axes. Operands have at least two axes. */
const product: Rule = (site) => {
  const { build, node, index } = site
  for (const { name } of node.attribute) {
    if (!['transA', 'transB', 'alpha', 'transBatchA', 'transBatchB'].includes(name)) refuse(node, `couplet does not know its attribute ${name}`)
  }
  const flag = (name: string) => attribute(node, name)?.i === 1n
  if (flag('transBatchA') || flag('transBatchB')) refuse(node, 'it moves its batch axes')
  const [transA, transB, alpha] = [flag('transA'), flag('transB'), attribute(node, 'alpha')?.f ?? 1]
  const [a = '', b = ''] = node.input
  const g = site.gradient(0)!
  const result: Record<number, string> = {}
  if (site.wants(0)) {
    const gradient = transA ? build.matmul(b, g, { transA: transB, transB: true, alpha }) : build.matmul(g, b, { transB: !transB, alpha })
    // A matrix of weights broadcasts nothing: the usual case, and the one worth a shortcut.
    result[0] = index.constant(b)?.dims.length === 2 || isWeight(site, b) ? gradient : unbroadcast(site, gradient, a)
  }
  if (site.wants(1)) {
    const gradient = transB ? build.matmul(g, a, { transA: true, transB: transA, alpha }) : build.matmul(a, g, { transA: !transA, alpha })
    result[1] = unbroadcast(site, gradient, b)
  }
  return result
}

/** Whether a value is a matrix that only casts and transpositions made of a constant. */
function isWeight({ index }: Site, value: string): boolean {
  for (let current = value; ;) {
    const constant = index.constant(current)
    if (constant) return constant.dims.length === 2
    const node = index.producer(current)
    if (!node || !['Cast', 'Transpose', 'DequantizeLinear'].includes(node.opType)) return false
    current = node.input[0]!
  }
}

/** dx = g W with W float32 [N][K], decoded once when the graph is built. */
const productOfBits: Rule = async (site) => {
  const { build, node } = site
  for (const [input, value] of node.input.entries()) if (input > 0 && site.wants(input)) refuse(node, `its input "${value}" depends on keys or values`)
  const { rows, columns, matrix } = await dequantize(site)
  const weights = build.add('CastLike', [build.floats(matrix, [rows, columns]), node.input[0]!])
  return { 0: build.add('MatMul', [site.gradient(0)!, weights]) }
}

export const matmulRules: Record<'onnx' | 'microsoft', Record<string, Rule>> = {
  onnx: { MatMul: product },
  microsoft: { FusedMatMul: product, MatMulNBits: productOfBits },
}

/** Gradients of operators that move elements. */
import { attribute } from '../onnx/graph'
import { DataType } from '../onnx/proto'
import type { Rule, Site } from './site'
import { unbroadcast } from './site'

/** The gradient in the shape of the first input. */
const reshaped: Rule = ({ build, node, gradient }) => ({ 0: build.add('Reshape', [gradient(0)!, build.add('Shape', [node.input[0]!])]) })

/**
 * For an operator that picks elements, some perhaps several times: let it pick from the elements' own numbers, and add
 * each gradient up where its element came from.
 */
const picked: Rule = (site) => {
  const { build, node, gradient } = site
  const [x = '', ...others] = node.input
  const shape = build.add('Shape', [x])
  const count = build.add('Reshape', [build.add('Size', [x]), build.integers([1])])
  const numbers = build.add('Range', [build.integers([0], []), build.add('Size', [x]), build.integers([1], [])])
  const attributes = Object.fromEntries(node.attribute.map(({ name, i }) => [name, Number(i)]))
  const sources = build.add(node.opType, [build.add('Reshape', [numbers, shape]), ...others], { attributes })
  const flat = (value: string) => build.add('Reshape', [value, build.integers([-1])])
  // Adding up is in float32: there is no other kernel for it everywhere.
  const zeros = build.add('Expand', [build.floats(Float32Array.of(0), [1]), count])
  const updates = flat(build.cast(gradient(0)!, DataType.float))
  const sum = build.add('ScatterElements', [zeros, flat(sources), updates], { attributes: { axis: 0, reduction: { text: 'add' } } })
  return { 0: build.add('CastLike', [build.add('Reshape', [sum, shape]), x]) }
}

const concat: Rule = (site) => {
  const { build, node } = site
  const axis = Number(attribute(node, 'axis')?.i ?? 0)
  const lengths = node.input.map((value) => build.add('Gather', [build.add('Shape', [value]), build.integers([axis])]))
  const sizes = lengths.length > 1 ? build.add('Concat', lengths, { attributes: { axis: 0 } }) : lengths[0]!
  const parts = build.addAll('Split', [site.gradient(0)!, sizes], { attributes: { axis }, outputs: node.input.length })
  return Object.fromEntries(parts.flatMap((part, input) => (site.wants(input) ? [[input, part]] : [])))
}

const split: Rule = (site) => {
  const { build, node } = site
  const axis = Number(attribute(node, 'axis')?.i ?? 0)
  // A part that the loss does not depend on has the gradient 0; a part without a name has to get one, to tell its shape.
  const parts = node.output.map((_, output) => site.gradient(output) ?? zeroLike(site, node.output[output] ||= `${node.name}.part.${output}`))
  return { 0: build.add('Concat', parts, { attributes: { axis } }) }
}

function zeroLike({ build }: Site, value: string): string {
  return build.add('Mul', [value, build.scalar(0, value)])
}

const transpose: Rule = ({ build, node, gradient }) => {
  const order = attribute(node, 'perm')?.ints.map(Number)
  const attributes = order && { perm: order.map((_, axis) => order.indexOf(axis)) }
  return { 0: build.add('Transpose', [gradient(0)!], attributes && { attributes }) } // without an order it reverses all axes
}

/** Negative pads cut off what positive ones added. */
const pad: Rule = ({ build, node, gradient }) => {
  const [, pads = '', , axes] = node.input
  return { 0: build.add('Pad', [gradient(0)!, build.add('Neg', [pads]), ...(axes ? ['', axes] : [])]) }
}

export const layoutRules: Record<string, Rule> = {
  Reshape: reshaped,
  Flatten: reshaped,
  Squeeze: reshaped,
  Unsqueeze: reshaped,
  Transpose: transpose,
  Split: split,
  Concat: concat,
  Pad: pad,
  Expand: (site) => ({ 0: unbroadcast(site, site.gradient(0)!, site.node.input[0]!) }),
  Gather: picked,
  GatherElements: picked,
  Slice: picked,
}

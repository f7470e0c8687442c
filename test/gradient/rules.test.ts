import assert from 'node:assert/strict'
import { create } from '@bufbuild/protobuf'

import { codeOf } from '../../lib/errors'
import { GraphBuilder } from '../../lib/gradient/builder'
import { differentiate } from '../../lib/gradient/differentiate'
import { GraphSession } from '../../lib/gradient/session'
import type { Model } from '../../lib/onnx/proto'
import { DataType, GraphSchema, ModelSchema, OperatorSetSchema } from '../../lib/onnx/proto'
import { normals } from '../onnx/graphs'

interface Case {
  /** Of each input x0, x1, ...: float32. */
  inputs: number[][]
  /** Adds the nodes of the function and returns its value. */
  graph: (build: GraphBuilder, inputs: string[]) => string
  opset?: bigint
  /** Values to begin with; default standard normal. */
  spread?: (x: number) => number
  /** Of float32: the loss, and central differences of it. */
  tolerance?: number
}

function emptyModel(opset: bigint): Model {
  const head = create(ModelSchema, { irVersion: 9n, opsetImport: [{ domain: '', version: opset }].map((set) => create(OperatorSetSchema, set)) })
  return { head, graph: create(GraphSchema, { name: 'rule' }), initializers: new Map() }
}

/** The loss is sum(y * c), c random but fixed: y's gradient is c, cut to y's shape. */
async function build({ inputs, graph, opset = 17n }: Case): Promise<{ session: GraphSession; names: string[] }> {
  const model = emptyModel(opset)
  const forward = new GraphBuilder(model, 'forward')
  const names = inputs.map((dims, i) => forward.input(`x${i}`, DataType.float, dims))
  const y = graph(forward, names)
  const random = normals(5)
  const noise = forward.floats(Float32Array.from({ length: 4096 }, random), [4096])
  const count = forward.add('Reshape', [forward.add('Size', [y]), forward.integers([1])])
  const factors = forward.add('Reshape', [forward.add('Slice', [noise, forward.integers([0]), count]), forward.add('Shape', [y])])
  const loss = forward.add('ReduceSum', [forward.add('Mul', [y, factors])], { attributes: { keepdims: 0 } })
  forward.output(loss, 'loss')
  model.graph.node.push(...forward.take())
  const gradients = await differentiate(model, { seeds: new Map([[y, factors]]), targets: names })
  const outputs = new GraphBuilder(model, 'outputs')
  for (const name of names) outputs.output(gradients.get(name)!, `${name}.gradient`)
  model.graph.node.push(...outputs.take())
  return { session: await GraphSession.create(model, { threads: 1 }), names }
}

async function check(given: Case): Promise<void> {
  const { spread = (x) => x, tolerance = 2e-3 } = given
  const { session, names } = await build(given)
  const random = normals(11)
  const values = given.inputs.map((dims) => Float32Array.from({ length: dims.reduce((a, b) => a * b, 1) }, () => spread(random())))
  const run = (arrays: Float32Array[]) => session.run(arrays.map((data, i) => ({ name: names[i]!, type: DataType.float, dims: given.inputs[i]!, data })))
  const floats = (result: Awaited<ReturnType<typeof run>>, name: string) => new Float32Array(result.get(name)!.data)
  const exact = await run(values)
  for (const [i, name] of names.entries()) {
    assert.deepEqual(exact.get(`${name}.gradient`)!.dims, given.inputs[i], 'a gradient has the shape of its value')
    const gradient = floats(exact, `${name}.gradient`)
    for (let direction = 0; direction < 3; direction++) {
      const step = 2 ** -7
      const along = Float32Array.from(values[i]!, () => Math.fround(random()))
      const moved = (sign: number) => values.map((x, j) => (j === i ? x.map((value, k) => value + sign * step * along[k]!) : x))
      const at = async (sign: number) => floats(await run(moved(sign)), 'loss')[0]!
      const measured = (await at(1) - await at(-1)) / (2 * step)
      const expected = gradient.reduce((sum, g, k) => sum + g * along[k]!, 0)
      const scale = Math.hypot(...gradient.map((g, k) => g * along[k]!)) + 0.05
      assert.ok(Math.abs(measured - expected) < tolerance * scale, `${name}, direction ${direction}: gradient ${expected}, central differences ${measured}`)
    }
  }
  session.dispose()
}

const unary = (opType: string, options: Parameters<GraphBuilder['add']>[2] = {}): Pick<Case, 'inputs' | 'graph'> =>
  ({ inputs: [[2, 3, 4]], graph: (build, [x]) => build.add(opType, [x!], options) })
const binary = (opType: string, inputs: number[][]): Pick<Case, 'inputs' | 'graph'> => ({ inputs, graph: (build, [a, b]) => build.add(opType, [a!, b!]) })
const microsoft = { domain: 'com.microsoft' }
const positive = (x: number) => 0.5 + Math.abs(x)

describe('gradient rules equal central differences', () => {
  const cases: Record<string, Case> = {
    Add: binary('Add', [[2, 3, 4], [2, 3, 4]]),
    'Add, broadcast': binary('Add', [[2, 1, 4], [3, 1]]),
    'Add of a value and itself': { inputs: [[2, 3]], graph: (build, [x]) => build.add('Add', [x!, x!]) },
    Sub: binary('Sub', [[2, 3, 4], [4]]),
    Mul: binary('Mul', [[2, 3, 4], [2, 3, 4]]),
    'Mul, broadcast to a scalar': binary('Mul', [[2, 3, 4], []]),
    'Mul with a constant of one element': { inputs: [[2, 3]], graph: (build, [x]) => build.add('Mul', [x!, build.floats(Float32Array.of(-1.5), [1])]) },
    'Mul that broadcasts a constant': { inputs: [[3, 1]], graph: (build, [x]) => build.add('Mul', [build.floats(Float32Array.of(1, 2, -3), [3]), x!]) },
    Div: { ...binary('Div', [[2, 3], [2, 3]]), spread: (x) => 1 + Math.abs(x) },
    'Div, broadcast': { ...binary('Div', [[3], [2, 3]]), spread: positive },
    Sum: { inputs: [[2, 3], [3], [2, 1]], graph: (build, inputs) => build.add('Sum', inputs) },
    Neg: unary('Neg'),
    Sqrt: { ...unary('Sqrt'), spread: positive },
    Reciprocal: { ...unary('Reciprocal'), spread: positive },
    Exp: unary('Exp'),
    Pow: { inputs: [[2, 3]], graph: (build, [x]) => build.add('Pow', [x!, build.floats(Float32Array.of(3), [])]) },
    Sigmoid: unary('Sigmoid'),
    Tanh: unary('Tanh'),
    Erf: unary('Erf'),
    Relu: { ...unary('Relu'), spread: (x) => x + Math.sign(x) },
    'SiLU as Mul of Sigmoid': { inputs: [[2, 3]], graph: (build, [x]) => build.add('Mul', [x!, build.add('Sigmoid', [x!])]) },
    QuickGelu: unary('QuickGelu', microsoft),
    'QuickGelu as SiLU': unary('QuickGelu', { ...microsoft, attributes: { alpha: { float: 1 } } }),
    'com.microsoft.Gelu': unary('Gelu', microsoft),
    FastGelu: unary('FastGelu', microsoft),
    'FastGelu with a bias': { inputs: [[2, 3]], graph: (build, [x]) => build.add('FastGelu', [x!, build.floats(Float32Array.of(1, 0, -1), [3])], microsoft) },
    Gelu: { ...unary('Gelu'), opset: 20n },
    'Gelu by tanh': { ...unary('Gelu', { attributes: { approximate: { text: 'tanh' } } }), opset: 20n },
    MatMul: binary('MatMul', [[2, 3, 4], [2, 4, 5]]),
    'MatMul by a matrix': binary('MatMul', [[2, 3, 4], [4, 5]]),
    'MatMul that broadcasts': binary('MatMul', [[3, 4], [2, 4, 5]]),
    'MatMul with weights': {
      inputs: [[2, 3, 4]],
      graph: (build, [x]) => build.add('MatMul', [x!, build.add('Transpose', [build.floats(Float32Array.from({ length: 20 }, normals(3)), [5, 4])])]),
    },
    ...Object.fromEntries([[0, 0], [0, 1], [1, 0], [1, 1]].map(([a, b]): [string, Case] => [`FusedMatMul, transA ${a}, transB ${b}`, {
      inputs: [a ? [2, 4, 3] : [2, 3, 4], b ? [2, 5, 4] : [2, 4, 5]],
      graph: (build, [x, y]) => build.matmul(x!, y!, { transA: a === 1, transB: b === 1, alpha: 0.5 }),
    }])),
    SimplifiedLayerNormalization: {
      inputs: [[2, 3, 8]],
      graph: (build, [x]) => build.add('SimplifiedLayerNormalization', [x!, build.floats(Float32Array.from({ length: 8 }, normals(4)), [8])], {
        attributes: { axis: -1, epsilon: { float: 0.01 }, stash_type: 1 },
      }),
    },
    ...Object.fromEntries(([['both', [0, 3]], ['the normalized output alone', [0]], ['the sum alone', [3]]] as const).map(([what, read]): [string, Case] => [
      `SkipSimplifiedLayerNormalization, ${what}`, {
        inputs: [[2, 3, 8], [2, 3, 8]],
        graph: (build, [x, skip]) => {
          const [gamma, bias] = [4, 6].map((seed) => build.floats(Float32Array.from({ length: 8 }, normals(seed)), [8]))
          const outputs = read.includes(3 as never) ? ['y', '', '', 'sum'] : ['y']
          build.addAll('SkipSimplifiedLayerNormalization', [x!, skip!, gamma!, bias!], { ...microsoft, outputs, attributes: { epsilon: { float: 0.01 } } })
          const parts = read.map((output) => outputs[output]!)
          return parts.length > 1 ? build.add('Mul', parts) : build.add('Identity', parts)
        },
      }])),
    Softmax: unary('Softmax'),
    'Softmax over the middle axis': unary('Softmax', { attributes: { axis: 1 } }),
    'softmax cross-entropy': {
      inputs: [[3, 5]],
      graph: (build, [x]) => build.add('GatherElements', [build.add('LogSoftmax', [x!]), build.integers([4, 0, 2], [3, 1])], { attributes: { axis: 1 } }),
    },
    ReduceSum: { inputs: [[2, 3, 4]], graph: (build, [x]) => build.add('ReduceSum', [x!, build.integers([1])], { attributes: { keepdims: 0 } }) },
    ReduceMean: unary('ReduceMean', { attributes: { axes: [-1, 0] } }),
    'ReduceMean without its axes': unary('ReduceMean', { attributes: { axes: [1], keepdims: 0 } }),
    'ReduceMean of opset 18': {
      inputs: [[2, 3, 4]], opset: 18n, graph: (build, [x]) => build.add('ReduceMean', [x!, build.integers([1])], { attributes: { keepdims: 0 } }),
    },
    Reshape: { inputs: [[2, 3, 4]], graph: (build, [x]) => build.add('Reshape', [x!, build.integers([0, -1])]) },
    Squeeze: { inputs: [[2, 1, 4]], graph: (build, [x]) => build.add('Squeeze', [x!, build.integers([1])]) },
    Unsqueeze: { inputs: [[2, 4]], graph: (build, [x]) => build.add('Unsqueeze', [x!, build.integers([1])]) },
    Transpose: unary('Transpose'),
    'Transpose in an order': unary('Transpose', { attributes: { perm: [1, 2, 0] } }),
    Concat: { inputs: [[2, 3], [2, 1], [2, 2]], graph: (build, inputs) => build.add('Concat', inputs, { attributes: { axis: -1 } }) },
    Split: {
      inputs: [[2, 6]],
      graph: (build, [x]) => {
        const [a = '', , c = ''] = build.addAll('Split', [x!, build.integers([1, 4, 1])], { outputs: ['a', '', 'c'], attributes: { axis: 1 } })
        return build.add('Mul', [a, c])
      },
    },
    Slice: { inputs: [[4, 6]], graph: (build, [x]) => build.add('Slice', [x!, ...[[1], [6], [1], [2]].map((values) => build.integers(values))]) },
    Gather: { inputs: [[4, 3]], graph: (build, [x]) => build.add('Gather', [x!, build.integers([2, 0, 2, 2], [2, 2])], { attributes: { axis: 0 } }) },
    'Gather along the last axis': { inputs: [[2, 5]], graph: (build, [x]) => build.add('Gather', [x!, build.integers([-1], [])], { attributes: { axis: 1 } }) },
    Expand: { inputs: [[3, 1]], graph: (build, [x]) => build.add('Expand', [x!, build.integers([2, 3, 4])]) },
    Pad: { inputs: [[2, 3]], graph: (build, [x]) => build.add('Pad', [x!, build.integers([1, 0, 0, 2])]) },
    'Pad that cuts': { inputs: [[2, 3]], graph: (build, [x]) => build.add('Pad', [x!, build.integers([0, 0, 0, -1])]) },
    Where: {
      inputs: [[2, 3], [3]],
      graph: (build, [a, b]) => build.add('Where', [build.cast(build.integers([1, 0, 1, 0, 0, 1], [2, 3]), DataType.bool), a!, b!]),
    },
    'Cast to float16 and back': { // float16 has 11 bits
      inputs: [[2, 3]], tolerance: 0.2, graph: (build, [x]) => build.cast(build.cast(x!, DataType.float16), DataType.float),
    },
    'operators of float16': {
      inputs: [[2, 3, 8]], tolerance: 0.3,
      graph: (build, [x]) => {
        const half = build.cast(x!, DataType.float16)
        const gamma = build.cast(build.floats(new Float32Array(8).fill(2), [8]), DataType.float16)
        const normed = build.add('SimplifiedLayerNormalization', [half, gamma], { attributes: { axis: -1, epsilon: { float: 0.01 } } })
        const activated = build.add('Mul', [normed, build.add('Sigmoid', [normed])])
        const weights = build.cast(build.floats(Float32Array.from({ length: 32 }, normals(3)), [8, 4]), DataType.float16)
        return build.cast(build.add('MatMul', [build.add('Slice', [activated, ...[[0], [2], [1]].map((v) => build.integers(v))]), weights]), DataType.float)
      },
    },
  }
  for (const [name, given] of Object.entries(cases)) it(name, () => check(given))

  for (const bits of [4, 8]) {
    // onnxruntime itself takes zero points of floats with 4 bits alone.
    for (const zeros of ['none', 'packed', ...(bits === 4 ? ['plain' as const] : [])] as const) {
      it(`MatMulNBits, ${bits} bits, zero points ${zeros}`, () => {
        const [rows, columns, block] = [5, 40, 16] // the last block of a row is not full
        const blocks = Math.ceil(columns / block)
        return check({
          inputs: [[2, 3, columns]],
          graph: (build, [x]) => {
            const bytes = (length: number, seed: number, dims: number[]) => {
              const random = normals(seed)
              return build.bytes(Uint8Array.from({ length }, () => Math.abs(random() * 1e6) & 255), dims)
            }
            const codes = bytes(rows * blocks * block * bits / 8, 7, [rows, blocks, block * bits / 8])
            const scales = build.floats(Float32Array.from({ length: rows * blocks }, (_, i) => 0.01 + i / 1000), [rows * blocks])
            const points = {
              none: () => [],
              packed: () => [bytes(rows * Math.ceil(blocks * bits / 8), 8, [rows * Math.ceil(blocks * bits / 8)])],
              plain: () => [build.floats(Float32Array.from({ length: rows * blocks }, (_, i) => i % 7), [rows * blocks])],
            }
            const attributes = { K: columns, N: rows, bits, block_size: block }
            return build.add('MatMulNBits', [x!, codes, scales, ...points[zeros]()], { ...microsoft, attributes })
          },
        })
      })
    }
  }
})

describe('the reverse pass', () => {
  it('passes a gradient straight through', async () => {
    const model = emptyModel(17n)
    const forward = new GraphBuilder(model, 'forward')
    const x = forward.input('x', DataType.float, [2])
    const rounded = forward.add('Round', [x])
    const y = forward.add('Mul', [rounded, rounded])
    const seed = forward.floats(Float32Array.of(1, 1), [2])
    model.graph.node.push(...forward.take())
    const gradients = await differentiate(model, { seeds: new Map([[y, seed]]), targets: [x, rounded], straightThrough: new Map([[rounded, x]]) })
    const outputs = new GraphBuilder(model, 'outputs')
    outputs.output(gradients.get(x)!, 'x.gradient')
    outputs.output(gradients.get(rounded)!, 'rounded.gradient')
    model.graph.node.push(...outputs.take())
    using session = await GraphSession.create(model, { threads: 1 })
    const result = await session.run([{ name: 'x', type: DataType.float, dims: [2], data: Float32Array.of(1.2, 2.7) }])
    for (const name of ['x', 'rounded']) assert.deepEqual([...new Float32Array(result.get(`${name}.gradient`)!.data)], [2, 6])
  })

  const refusal = (graph: (build: GraphBuilder, x: string) => string, opset = 17n) => async () => {
    const model = emptyModel(opset)
    const forward = new GraphBuilder(model, 'forward')
    const y = graph(forward, forward.input('x', DataType.float, [2, 4]))
    model.graph.node.push(...forward.take())
    return differentiate(model, { seeds: new Map([[y, y]]), targets: ['x'] })
  }
  const refusals: [what: string, attempt: () => Promise<unknown>, reason: RegExp][] = [
    ['an operator without a rule, naming the node', refusal((build, x) =>
      build.add('CumSum', [x, build.integers([0], [])])), /node "forward\.1\.CumSum" \(CumSum\)/],
    ['an operator of another domain', refusal((build, x) => build.add('Add', [x, x], { domain: 'somebody.else' })), /somebody\.else\.Add/],
    ['normalization over several axes', refusal((build, x) =>
      build.add('SimplifiedLayerNormalization', [x, x], { attributes: { axis: 0 } })), /axis 0/],
    ['a loss that does not depend on a target', refusal((build, x) => build.add('Shape', [x])), /does not depend on it/],
    ['an operator set that is too old', refusal((build, x) => build.add('Neg', [x]), 12n), /operator set 12; 13 or later/],
    ['weights in another order', refusal((build, x) => {
      const weights = [build.bytes(new Uint8Array(8), [1, 1, 8]), build.floats(Float32Array.of(1), [1])]
      const attributes = { K: 4, N: 1, bits: 4, block_size: 16 }
      return build.add('MatMulNBits', [x, ...weights, '', build.integers([0])], { ...microsoft, attributes })
    }), /g_idx/],
  ]
  for (const [what, attempt, reason] of refusals) {
    it(`refuses ${what}`, () => assert.rejects(attempt(), (error: Error) => {
      assert.equal(codeOf(error), 'ERR_COUPLET_UNSUPPORTED_MODEL')
      assert.match(error.message, reason)
      return true
    }))
  }
})

import fc from 'fast-check'
import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { join } from 'node:path'

import { CoupletError } from '../../lib/errors'
import { attribute } from '../../lib/onnx/graph'
import type { Model, NodeProto } from '../../lib/onnx/proto'
import { createNode, DataType, decodeModel, encodeModel, encodeTensor } from '../../lib/onnx/proto'
import { plainTheta } from '../../lib/onnx/rotary'
import { cutLogits } from '../../lib/onnx/logits'
import { rewriteAttention } from '../../lib/onnx/rewrite'
import type { DecoderShape } from './graphs'
import { decoder } from './graphs'

const names = (values: { name: string }[]) => values.map(({ name }) => name)
const nodesOf = (model: Model, type: string) => model.graph.node.filter(({ opType }) => opType === type)

describe('onnx rewriting', () => {
  it('replaces the attention of a real model and removes what served it', async () => {
    const model = decodeModel(readFileSync(join(__dirname, '../../models/tiny-llama-bytes/onnx/model.onnx')))
    const { layers } = await rewriteAttention(model, undefined)
    assert.deepEqual(names(model.graph.input), ['input_ids', 'couplet.run'])
    assert.deepEqual(names(model.graph.output), ['logits'])
    assert.equal(nodesOf(model, 'GroupQueryAttention').length, 0)
    assert.equal(nodesOf(model, 'ReduceSum').length, 0, 'seqlens_k is gone with its reader')
    assert.ok(!model.initializers.has('cos_cache'))
    const attention = nodesOf(model, 'Attention')
    assert.deepEqual(attention.map((node) => Number(attribute(node, 'layer')!.i)), [0, 1, 2, 3])
    assert.deepEqual(attention[2]!.input, ['couplet.run', '/model/layers.2/attn/qkv_proj/out'])
    assert.equal(layers.length, 4)
    const { queryHeads, kvHeads, headDim, scale, softcap, localWindow, headSinks, rotary } = layers[3]!
    assert.deepEqual([queryHeads, kvHeads, headDim, softcap, localWindow, headSinks], [4, 2, 64, 0, 0, undefined])
    assert.ok(scale === 0 || Math.abs(scale - 1 / 8) < 1e-7)
    assert.deepEqual([rotary!.kind, rotary!.dim, rotary!.positions, rotary!.theta], ['half', 64, 4096, 10000])
    assert.equal(layers[0]!.rotary, rotary, 'layers share their tables')
  })

  for (const rotary of ['nodes', 'nodes4d', 'onnx'] as const) {
    it(`moves rotation into the operator (${rotary})`, async () => {
      const model = decoder({ rotary, interleaved: true, theta: 500000 })
      const { layers } = await rewriteAttention(model, undefined)
      assert.equal(nodesOf(model, 'RotaryEmbedding').length, 0)
      assert.deepEqual(names(model.graph.input), ['input_ids', 'couplet.run'])
      assert.deepEqual([layers[0]!.rotary!.kind, layers[0]!.rotary!.theta], ['interleaved', 500000])
    })
  }

  it('casts around the operator in a float16 graph', async () => {
    const model = decoder({ type: 'float16' })
    await rewriteAttention(model, undefined)
    const targets = nodesOf(model, 'Cast').map((node) => Number(attribute(node, 'to')!.i))
    assert.deepEqual(targets, [1, 1, 1, DataType.float16, 1, 1, 1, DataType.float16])
  })

  it('numbers layers by the names of their caches', async () => {
    const model = decoder({ layers: 3 })
    const swap = (text: string) => text.replace(/(past_key_values|present)\.([02])/, (_, name: string, layer: string) => `${name}.${2 - Number(layer)}`)
    for (const node of nodesOf(model, 'GroupQueryAttention')) [node.input, node.output] = [node.input.map(swap), node.output.map(swap)]
    await rewriteAttention(model, undefined)
    assert.deepEqual(nodesOf(model, 'Attention').map((node) => Number(attribute(node, 'layer')!.i)), [2, 1, 0])
  })

  it('reads what nodes say about their logits', async () => {
    const shape: DecoderShape = { scale: 0.25, softcap: 30, localWindow: 7, headSinks: Float32Array.of(1, 2, 3, 4) }
    const { layers: [layer] } = await rewriteAttention(decoder(shape), undefined)
    assert.deepEqual([layer!.scale, layer!.softcap, layer!.localWindow, layer!.headSinks], [0.25, 30, 7, shape.headSinks])
    const { layers: [smooth] } = await rewriteAttention(decoder({ smoothSoftmax: true }), undefined)
    assert.deepEqual(smooth!.headSinks, new Float32Array(4))
  })

  it('knows scaled rotary tables from plain ones', async () => {
    const theta = async (shape: DecoderShape) => (await rewriteAttention(decoder(shape), undefined)).layers[0]!.rotary!.theta
    assert.equal(await theta({ theta: 1e6, rotaryDim: 16 }), 1e6)
    assert.equal(await theta({ theta: 12345 }), 12345)
    assert.equal(await theta({ theta: 160000, type: 'float16' }), 160000)
    assert.equal(await theta({ linearScaling: 4 }), undefined)
    assert.equal(plainTheta(new Float32Array(64).fill(1), new Float32Array(64), 16), undefined)
  })

  it('keeps a past of which the graph reads the length, without its channels', async () => {
    const model = decoder({ measuredPast: true })
    const { measuredPasts } = await rewriteAttention(model, undefined)
    assert.deepEqual(measuredPasts, [{ name: 'past_key_values.0.key', elementType: DataType.float }])
    assert.deepEqual(names(model.graph.input), ['input_ids', 'past_key_values.0.key', 'couplet.run'])
  })

  it('projects the wanted columns alone to the vocabulary', () => {
    const real = decodeModel(readFileSync(join(__dirname, '../../models/tiny-llama-bytes/onnx/model.onnx')))
    for (const model of [real, decoder(), decoder({ finalSoftcap: true }), decoder({ type: 'float16' })]) {
      assert.ok(cutLogits(model))
      assert.equal(nodesOf(model, 'Slice')[0]!.output[0], nodesOf(model, 'MatMul').at(-1)!.input[0])
    }
    assert.ok(!cutLogits(decoder({ keepInput: true })), 'the graph does so itself')
    const odd = decoder()
    odd.graph.node.at(-1)!.opType = 'Conv'
    assert.ok(!cutLogits(odd), 'an unknown projection')
  })

  const attention = (model: Model) => nodesOf(model, 'GroupQueryAttention')[0]!
  const setInteger = (node: NodeProto, name: string, value: number) => {
    node.attribute = node.attribute.filter((given) => given.name !== name)
    node.attribute.push(...createNode({ attribute: [{ name, i: BigInt(value), type: 2 }] }).attribute)
  }
  const wrap = (model: Model, value: string, opType: string, domain = '') => {
    model.graph.node.unshift(createNode({ name: `/${opType}`, opType, domain, input: [value], output: [`${value}.wrapped`] }))
    return `${value}.wrapped`
  }
  const refusals: [what: string, shape: DecoderShape, change: (model: Model) => void, reason: RegExp][] = [
    ['no attention that it knows', {}, (model) => (model.graph.node = nodesOf(model, 'MatMul')), /no com\.microsoft\.GroupQueryAttention/],
    ['another attention operator', {}, (model) => {
      for (const node of nodesOf(model, 'GroupQueryAttention')) node.opType = 'MultiHeadAttention'
    }, /MultiHeadAttention/],
    ['some layers of another kind', {}, (model) => (attention(model).opType = 'MultiHeadAttention'), /"past_key_values\.0\.key"|"present\.0\.key"/],
    ['an attention bias', {}, (model) => (attention(model).input[10] = 'input_ids'), /attention_bias/],
    ['a quantized cache', {}, (model) => (attention(model).input[12] = 'cos_cache'), /k_scale/],
    ['normalization inside', {}, (model) => (attention(model).input[14] = 'cos_cache'), /q_norm_weight/],
    ['no causal mask', {}, (model) => setInteger(attention(model), 'causal', 0), /causal is 0/],
    ['an attribute of the future', {}, (model) => setInteger(attention(model), 'wormhole', 1), /wormhole/],
    ['a past from elsewhere', {}, (model) => (attention(model).input[3] = wrap(model, 'past_key_values.0.key', 'Identity')), /not an input of the graph/],
    ['a shared past', {}, (model) => (nodesOf(model, 'GroupQueryAttention')[1]!.input[3] = 'past_key_values.0.key'), /another node reads/],
    ['a cache that is read', {}, (model) => void wrap(model, 'present.0.key', 'Identity'), /reads its cache "present\.0\.key"/],
    ['computed rotary tables', {}, (model) => (attention(model).input[7] = wrap(model, 'cos_cache', 'Cos')), /computed, not constant/],
    ['LongRoPE', {}, (model) => (attention(model).input[7] = wrap(model, 'cos_cache', 'If')), /LongRoPE/],
    ['computed sinks', { headSinks: new Float32Array(4) }, (model) => (attention(model).input[11] = wrap(model, 'head_sinks', 'Cos')), /computed/],
    ['rotated keys alone', { rotary: 'nodes' }, (model) => (attention(model).input[0] = 'layers.0.query'), /keys alone/],
    ['different tables', { rotary: 'nodes' }, (model) => setInteger(nodesOf(model, 'RotaryEmbedding')[0]!, 'interleaved', 1), /different tables/],
    ['rotated values that others read', { rotary: 'nodes4d' }, (model) => void wrap(model, 'layers.0.key.rotated', 'Identity'), /which is rotated/],
    ['layers of different shapes', {}, (model) => setInteger(attention(model), 'num_heads', 8), /8 query heads/],
    ['an unknown head size', {}, (model) => {
      delete model.graph.input.find(({ name }) => name === 'past_key_values.0.key')!.type!.tensorType!.shape
    }, /how many channels/],
    ['a table that is cut short', {}, (model) => {
      model.initializers.set('cos_cache', encodeTensor({ name: 'cos_cache', dims: [256n, 16n], dataType: 1, rawData: new Uint8Array(4) }))
    }, /holds 4 bytes/],
    ['external data outside its folder', {}, (model) => {
      const externalData = [{ key: 'location', value: '../../etc/passwd' }]
      model.initializers.set('cos_cache', encodeTensor({ name: 'cos_cache', dims: [256n, 16n], dataType: 1, dataLocation: 1, externalData }))
    }, /not in the folder of the model/],
  ]
  for (const [what, shape, change, reason] of refusals) {
    it(`refuses ${what}`, async () => {
      const model = decoder(shape)
      change(model)
      await assert.rejects(rewriteAttention(model, __dirname), (error) => {
        assert.ok(error instanceof CoupletError)
        assert.equal(error.code, 'ERR_COUPLET_UNSUPPORTED_MODEL')
        assert.match(error.message, reason)
        return true
      })
    })
  }

  it('survives damaged files: it rewrites them or says why not', async function () {
    this.timeout(60_000)
    const shape = { layers: 1, hidden: 8, vocabulary: 8, positions: 4 }
    const file = fc.constantFrom(...[decoder(shape), decoder({ ...shape, rotary: 'nodes4d' })].map((model) => encodeModel(model)))
    const flips = fc.array(fc.tuple(fc.nat(), fc.nat(255)), { minLength: 1, maxLength: 6 })
    await fc.assert(
      fc.asyncProperty(file, flips, fc.option(fc.nat()), async (file, flips, cut) => {
        const damaged = file.slice(0, cut === null ? file.length : cut % file.length)
        for (const [place, value] of flips) if (damaged.length > 0) damaged[place % damaged.length] = value
        let model: Model
        try {
          model = decodeModel(damaged)
        } catch (error) {
          return assert.ok(error instanceof Error)
        }
        try {
          await rewriteAttention(model, __dirname)
          cutLogits(model)
          encodeModel(model)
        } catch (error) {
          assert.ok(error instanceof CoupletError, String((error as Error).stack))
        }
      }),
      { numRuns: 1500 },
    )
  })
})

import assert from 'node:assert/strict'
import { mkdirSync, readFileSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'

import type { DecoderModelOptions } from '../../lib/onnx/model'
import { DecoderModel } from '../../lib/onnx/model'
import type { Model } from '../../lib/onnx/proto'
import { decodeTensor, encodeModel, encodeTensor } from '../../lib/onnx/proto'
import { ids, prose, temporaryFolder, tinyLlama } from './files'
import type { DecoderShape } from './graphs'
import { decoder } from './graphs'
import { farthest, PlainDecoder } from './plain'

const folder = temporaryFolder()

/** Logits of one sequence's new tokens. */
async function run(model: DecoderModel, sequence: ReturnType<DecoderModel['sequence']>, tokens: number[]): Promise<Float32Array> {
  return (await model.run([{ sequence, tokens }])).logits
}

async function compare(path: string, plain: PlainDecoder, chunks: number[][], tolerance = 1e-4, options: DecoderModelOptions = {}): Promise<void> {
  const model = await DecoderModel.load(path, { threads: 2, ...options })
  const sequence = model.sequence()
  for (const chunk of chunks) {
    const difference = farthest(await run(model, sequence, chunk), await plain.run(chunk))
    assert.ok(difference <= tolerance, `logits differ by ${difference}`)
  }
  model.dispose()
  await plain.release()
}

describe('onnx pass-through', () => {
  it('equals onnxruntime on a real model: prefill, chunks, single tokens', async () => {
    const chunks = [prose(0, 100), prose(100, 101), prose(101, 180), ...[180, 181, 182, 183].map((i) => prose(i, i + 1))]
    await compare(tinyLlama, await PlainDecoder.create(join(tinyLlama, 'onnx/model.onnx')), chunks)
  })

  const shapes: [what: string, shape: DecoderShape][] = [
    ['separate q, k, v', {}],
    ['packed q, k, v', { packed: true }],
    ['as many kv heads as query heads', { kvHeads: 4 }],
    ['one kv head', { kvHeads: 1, headDim: 64 }],
    ['RotaryEmbedding nodes', { rotary: 'nodes' }],
    ['RotaryEmbedding nodes on four dimensions', { rotary: 'nodes4d' }],
    ['RotaryEmbedding of ONNX', { rotary: 'onnx' }],
    ['no rotary embedding', { rotary: 'none' }],
    ['interleaved pairs', { interleaved: true }],
    ['interleaved pairs in nodes', { interleaved: true, rotary: 'nodes' }],
    ['partial rotation', { rotaryDim: 16 }],
    ['partial rotation in nodes', { rotaryDim: 16, rotary: 'nodes' }],
    ['scaled rotary tables', { linearScaling: 8 }],
    ['scale and softcap', { scale: 0.3, softcap: 2 }],
    ['a local window', { localWindow: 5 }],
    ['attention sinks', { headSinks: Float32Array.of(1, -2, 0.5, 3) }],
    ['smooth softmax', { smoothSoftmax: true }],
    ['the length of the text as an input', { totalInput: true }],
    ['positions counted from the past', { measuredPast: true }],
  ]
  for (const [what, shape] of shapes) {
    it(`equals onnxruntime with ${what}`, async () => {
      const graph = decoder(shape)
      const chunks = [ids(19), ids(1), ids(7, 3), ids(1, 5)]
      await compare(folder.save(graph), await PlainDecoder.create(decoder(shape)), chunks)
    })
  }

  it('equals onnxruntime in a float16 graph, as far as float16 goes', async () => {
    const shape: DecoderShape = { type: 'float16', rotary: 'nodes', headSinks: Float32Array.of(1, -2, 0.5, 3) }
    await compare(folder.save(decoder(shape)), await PlainDecoder.create(decoder(shape)), [ids(19), ids(1), ids(5, 3)], 0.03)
  })

  it('reads weights and rotary tables from external data', async () => {
    const graph = decoder({ seed: 3 })
    const path = externalize(graph, join(folder.path, 'external'))
    await compare(path, await PlainDecoder.create(decoder({ seed: 3 })), [ids(9), ids(1)])

    const fingerprint = async () => {
      using model = await DecoderModel.load(path)
      return model.fingerprint
    }
    const before = await fingerprint()
    assert.equal(await fingerprint(), before)
    const weights = join(path, 'weights.bin')
    const bytes = readFileSync(weights)
    bytes[bytes.length - 1]! ^= 1
    writeFileSync(weights, bytes)
    assert.notEqual(await fingerprint(), before, 'weights are part of the fingerprint')
  })

  it('serves a batch with padding as it serves each row alone', async () => {
    using model = await DecoderModel.load(tinyLlama, { threads: 2 })
    const alone = [model.sequence(), model.sequence(), model.sequence()]
    const together = [model.sequence(), model.sequence(), model.sequence()]
    const rounds = [[prose(0, 40), prose(7, 10), prose(30, 95)], [prose(40, 41), prose(10, 11), prose(95, 96)], [prose(41, 50), prose(11, 30), prose(96, 97)]]
    for (const round of rounds) {
      const { logits, dims } = await model.run(round.map((tokens, i) => ({ sequence: together[i]!, tokens })))
      const columns = Math.max(...round.map(({ length }) => length))
      assert.deepEqual(dims, [3, columns, 256])
      for (const [i, tokens] of round.entries()) {
        const end = (i + 1) * columns * 256
        assert.ok(farthest(await run(model, alone[i]!, tokens), logits.subarray(end - tokens.length * 256, end)) < 1e-4)
      }
    }
    assert.deepEqual(together.map(({ length }) => length), [50, 23, 67])
  })

  it('serves graphs that use positions and the mask elsewhere', async () => {
    const shape: DecoderShape = { learnedPositions: true, rotary: 'none' }
    using model = await DecoderModel.load(folder.save(decoder(shape)))
    assert.deepEqual([...model.inputNames].sort(), ['attention_mask', 'input_ids', 'position_ids'])
    const rows = [ids(12), ids(5, 3)]
    const sequences = rows.map(() => model.sequence())
    for (const round of [rows, [ids(1), ids(6, 9)]]) {
      const { logits, dims: [, columns = 0, vocabulary = 0] } = await model.run(round.map((tokens, i) => ({ sequence: sequences[i]!, tokens })))
      for (const [i, tokens] of round.entries()) {
        const plain = await PlainDecoder.create(decoder(shape))
        const history = round === rows ? [tokens] : [rows[i]!, tokens]
        let expected: Float32Array = new Float32Array(0)
        for (const chunk of history) expected = await plain.run(chunk)
        const end = (i + 1) * columns * vocabulary
        assert.ok(farthest(expected, logits.subarray(end - tokens.length * vocabulary, end)) < 1e-4)
        await plain.release()
      }
    }
  })
})

/** Writes a model with all its weights in a second file, most of them far from the file's beginning. */
function externalize(model: Model, to: string): string {
  mkdirSync(to, { recursive: true })
  const pieces: Uint8Array[] = [new Uint8Array(64)]
  let offset = 64
  for (const [name, bytes] of model.initializers) {
    const { dims, dataType, rawData } = decodeTensor(bytes)
    const externalData = [{ key: 'location', value: 'weights.bin' }, { key: 'offset', value: String(offset) }, { key: 'length', value: String(rawData.length) }]
    if (rawData.length >= 128) {
      model.initializers.set(name, encodeTensor({ name, dims, dataType, externalData, dataLocation: 1 }))
      pieces.push(rawData.slice())
      offset += rawData.length
    }
  }
  writeFileSync(join(to, 'weights.bin'), Buffer.concat(pieces))
  writeFileSync(join(to, 'model.onnx'), encodeModel(model))
  return to
}

import assert from 'node:assert/strict'
import { mkdtemp, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { PreTrainedModel } from '@huggingface/transformers'
import { Codebook } from '../../lib/codebook'
import { codec } from '../../lib/codec'
import { decodeModel, encodeModel } from '../../lib/onnx/proto'
import { attach, type PretrainedModel } from '../../lib/transformers'
import { codebooks, loadModel, loadTokenizer, modelFolder, modelId, type Inputs, type Model } from './setup'

describe('what attach() refuses', function () {
  this.timeout(60_000)
  let model: Model

  before(async () => { model = await loadModel() })
  after(() => model.dispose())

  /** The loaded model with some of it replaced. */
  const like = (changes: Partial<PretrainedModel>): PretrainedModel =>
    ({ sessions: model.sessions, config: model.config, generate: () => Promise.resolve(), ...changes })
  const unsupported = (message: RegExp) => ({ code: 'ERR_COUPLET_UNSUPPORTED', message })
  const unsupportedModel = (message: RegExp) => ({ code: 'ERR_COUPLET_UNSUPPORTED_MODEL', message })

  it('encoder-decoder models', async () => {
    const config = { is_encoder_decoder: true, model_type: 't5' }
    await assert.rejects(attach(like({ config }), { path: modelId }), unsupportedModel(/"t5" is an encoder-decoder model.*decoder-only/))
  })

  it('models of several graphs', async () => {
    const sessions = { embed_tokens: {}, decoder_model_merged: model.sessions.model as unknown, vision_encoder: {} }
    const several = /"llava" is made of several graphs \(embed_tokens, .*CoupledCache/
    await assert.rejects(attach(like({ sessions, config: { model_type: 'llava' } })), unsupportedModel(several))
  })

  it('graphs with states or embeddings as inputs', async () => {
    const { inputNames, inputMetadata } = model.sessions.model as { inputNames: string[]; inputMetadata: object[] }
    for (const name of ['inputs_embeds', 'past_conv.0']) {
      const sessions = { model: { inputNames: [...inputNames, name], inputMetadata } }
      await assert.rejects(attach(like({ sessions })), unsupportedModel(new RegExp(`input "${name}".*CoupledCache`)))
    }
  })

  it('graphs whose attention it cannot replace', async () => {
    const folder = await mkdtemp(join(tmpdir(), 'couplet-'))
    try {
      const graph = decodeModel(await readFile(join(modelFolder, 'onnx', 'model.onnx')))
      for (const node of graph.graph.node) if (node.opType === 'GroupQueryAttention') node.opType = 'MultiHeadAttention'
      const path = join(folder, 'model.onnx')
      await writeFile(path, encodeModel(graph))
      await assert.rejects(attach(model, { path }), unsupportedModel(/its attention is MultiHeadAttention.*use CoupledCache/))
    } finally {
      await rm(folder, { recursive: true })
    }
  })

  it('files of another model', async () => {
    const session = model.sessions.model as { inputMetadata: { name: string }[] }
    const inputMetadata = session.inputMetadata.filter(({ name }) => !name.startsWith('past_key_values.3.'))
    const sessions = { model: Object.create(session, { inputMetadata: { value: inputMetadata } }) as unknown }
    const smaller = Object.assign(Object.create(Object.getPrototypeOf(model) as object) as object, like({ sessions }))
    await assert.rejects(attach(smaller, { path: modelId }), unsupportedModel(/has 4 layers of 2 kv heads of 64 channels, the model 3 of 2 of 64; pass `path`/))
  })

  it('models on another device', async () => {
    const session = Object.create(model.sessions.model as object, { config: { value: { device: 'webgpu', dtype: 'fp16' } } }) as unknown
    await assert.rejects(attach(like({ sessions: { model: session } })), unsupported(/device "webgpu".*device: 'cpu'/))
  })

  it('other versions of transformers.js, and other copies of it', async () => {
    const env = { version: '3.8.1', localModelPath: '', cacheDir: null }
    await assert.rejects(attach(model, { transformers: { env, PreTrainedModel } }), unsupported(/loaded by version 3\.8\.1; install version 4/))
    await assert.rejects(attach(like({}), { path: modelId }), unsupported(/pass that module to attach\(\) as `transformers`/))
  })

  it('a copy of onnxruntime-node that did not make the session', async () => {
    class Other {}
    const other = { InferenceSession: Other, Tensor: Other as never }
    await assert.rejects(attach(model, { onnxruntime: other }), { code: 'ERR_COUPLET_ONNXRUNTIME', message: /as `onnxruntime`/ })
  })

  it('models whose file it cannot find', async () => {
    await assert.rejects(attach(model), unsupportedModel(/cannot tell which file the model was loaded from; pass `path`/))
    await assert.rejects(attach(model, { path: 'no/such-model' }), unsupportedModel(/not at .*no\/such-model\/onnx\/model\.onnx, .*pass `path`/))
  })

  it('codebooks of another model', async () => {
    const coding = codec('cq-8c1b')
    const tables = (layers: number) => Array.from({ length: layers }, () => new Float32Array(2 * 64 * 2))
    const book = (layers: number, fingerprint: string | null) => Codebook.fromTables({
      keyTables: tables(layers), valueTables: tables(layers), keyCodec: coding, valueCodec: coding, kvHeads: 2, headDim: 64,
      metadata: { formatVersion: 1, rotary: { kind: 'half', dim: 64, theta: 10000 }, model: fingerprint, learned: null },
    })
    await assert.rejects(attach(model, { path: modelId, codebooks: book(5, null) }), { code: 'ERR_COUPLET_CODEBOOK_MISMATCH' })
    await assert.rejects(attach(model, { path: modelId, codebooks: book(4, 'sha256:0000') }), { code: 'ERR_COUPLET_CODEBOOK_MISMATCH' })
    await assert.rejects(attach(model, { path: modelId, codebooks: '/no/such/file.safetensors' }), { code: 'ENOENT' })
  })

  it('a model that is attached already', async () => {
    using attachment = await attach(model, { path: modelId })
    await assert.rejects(attach(model, { path: modelId }), unsupported(/attached already/))
    assert.equal(attachment.statistics().sequences, 0)
  })

  it('one of two calls at once, and the other goes on', async () => {
    const calls = await Promise.allSettled([attach(model, { path: modelId }), attach(model, { path: modelId })])
    const attached = calls.flatMap((call) => (call.status === 'fulfilled' ? [call.value] : []))
    assert.equal(attached.length, 1)
    assert.match(calls.map((call) => (call.status === 'rejected' ? String(call.reason) : '')).join(''), /attached already/)
    attached[0]!.detach()
    assert.ok(!Object.hasOwn(model, 'generate'))
  })

  it('what is no model', async () => {
    for (const value of [undefined, null, {}, 'model']) await assert.rejects(attach(value as never), { code: 'ERR_COUPLET_INVALID_ARGUMENT' })
    await assert.rejects(attach(model, { path: modelId, sequences: -1 }), /`sequences`/)
    await assert.rejects(attach(model, null as never), { code: 'ERR_COUPLET_INVALID_ARGUMENT', message: /`options`/ })
    // Not in full precision without a word.
    for (const codebooks of [null, false, 0]) await assert.rejects(attach(model, { path: modelId, codebooks: codebooks as never }), /`codebooks`/)
  })

  it('beam search, at the call', async () => {
    using attachment = await attach(model, { path: modelFolder, codebooks: await codebooks('cq-8c8b') })
    const inputs = (await loadTokenizer())('Beam') as Inputs
    await assert.rejects(model.generate({ ...inputs, num_beams: 4 }), unsupported(/num_beams: 4.*num_beams: 1, or detach\(\)/))
    await assert.rejects(model.generate({ ...inputs, generation_config: { num_beams: 2 } as never }), unsupported(/num_beams: 2/))
    assert.equal(attachment.statistics().tokensRun, 0)
  })

  it('a past_key_values that something else filled', async () => {
    const inputs = (await loadTokenizer())('A cache') as Inputs
    const foreign = await model.generate({ ...inputs, max_new_tokens: 2, return_dict_in_generate: true }) as unknown as { past_key_values: object }
    using attachment = await attach(model, { path: modelFolder })
    const { error } = console
    console.error = () => undefined // transformers.js prints what run() rejects with
    try {
      const work = model.generate({ ...inputs, past_key_values: foreign.past_key_values } as never)
      await assert.rejects(work, /`past_key_values` but received one that was filled elsewhere/)
    } finally {
      console.error = error
    }
    assert.equal(attachment.statistics().tokensRun, 0)
  })
})

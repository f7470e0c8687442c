import assert from 'node:assert/strict'
import { writeFileSync } from 'node:fs'
import { join } from 'node:path'

import { addon } from '../../lib/native/addon'
import { openOnnxruntime } from '../../lib/onnx/library'
import { DecoderModel } from '../../lib/onnx/model'
import type { ProviderName } from '../../lib/onnx/provider'
import { createOnProvider, reasonAgainstCuda } from '../../lib/onnx/provider'
import { temporaryFolder, tinyLlama } from './files'

const cudaLibraries = ['libonnxruntime_providers_shared.so', 'libonnxruntime_providers_cuda.so']

describe('onnx execution provider', () => {
  const folder = temporaryFolder()

  /** Asks for a session, of an onnxruntime of which `reason` and `refusal` say what it does when it is asked for CUDA. */
  const choose = async (wish: ProviderName, device: string, { reason, refusal }: { reason?: string; refusal?: Error } = {}) => {
    const tried: string[] = []
    const choice = createOnProvider({ wish, device, reasonAgainstCuda: () => reason }, (name) => {
      tried.push(name)
      return name === 'cuda' && refusal ? Promise.reject(refusal) : Promise.resolve(name)
    })
    const { session, provider } = await choice
    assert.equal(session, provider.name)
    return { ...provider, tried }
  }

  it('is CUDA where attention is, and by name anywhere', async () => {
    assert.deepEqual(await choose('auto', 'cuda'), { name: 'cuda', reason: 'attention runs there too', tried: ['cuda'] })
    assert.deepEqual(await choose('cuda', 'cpu'), { name: 'cuda', reason: 'asked for', tried: ['cuda'] })
    assert.deepEqual(await choose('auto', 'cpu'), { name: 'cpu', reason: "attention runs on the device 'cpu'", tried: ['cpu'] })
    assert.deepEqual(await choose('cpu', 'cuda'), { name: 'cpu', reason: 'asked for', tried: ['cpu'] })
  })

  it('says why it is the CPU where CUDA cannot be had, and is an error where CUDA was named', async () => {
    assert.deepEqual(await choose('auto', 'cuda', { reason: 'no such build' }), { name: 'cpu', reason: 'no such build', tried: ['cpu'] })
    const refusal = new Error('no cuDNN')
    assert.deepEqual(await choose('auto', 'cuda', { refusal }), {
      name: 'cpu', reason: 'the CUDA execution provider refused: no cuDNN', tried: ['cuda', 'cpu'],
    })
    await assert.rejects(choose('cuda', 'cuda', { reason: 'no such build' }), { code: 'ERR_COUPLET_ONNXRUNTIME', message: /no such build/ })
    await assert.rejects(choose('cuda', 'cuda', { refusal }), refusal)
  })

  it('is looked for in what the library lists, and beside it', () => {
    const library = join(folder.path, 'libonnxruntime.so.1')
    assert.match(reasonAgainstCuda(library, ['CPUExecutionProvider'])!, /built without CUDA \(it lists CPUExecutionProvider\)/)
    const listed = ['CUDAExecutionProvider', 'CPUExecutionProvider']
    for (const name of cudaLibraries) {
      assert.ok(reasonAgainstCuda(library, listed)!.startsWith(`${name} is not beside `))
      writeFileSync(join(folder.path, name), '')
    }
    assert.equal(reasonAgainstCuda(library, listed), undefined)
  })

  it('is named by the model', async () => {
    assert.ok(addon().listProviders(openOnnxruntime()).includes('CPUExecutionProvider'))
    using model = await DecoderModel.load(tinyLlama)
    assert.deepEqual(model.executionProvider, { name: 'cpu', reason: "attention runs on the device 'cpu'" })
    await assert.rejects(DecoderModel.load(tinyLlama, { executionProvider: 'gpu' as 'cuda' }), { code: 'ERR_COUPLET_INVALID_ARGUMENT' })
  })

  it('that onnxruntime cannot load is an error by name', async function () {
    const { library } = openOnnxruntime()
    if (reasonAgainstCuda(library) === undefined) this.skip()
    const refused = { code: 'ERR_COUPLET_ONNXRUNTIME' }
    await assert.rejects(DecoderModel.load(tinyLlama, { executionProvider: 'cuda' }), { ...refused, message: /CUDA execution provider cannot be had/ })
    assert.throws(() => addon().checkCudaProvider({ library, deviceIndex: 0 }), refused)
    await assert.rejects(addon().createSession({ library, model: new Uint8Array(1), folder: '', threads: 1, cuda: true }), refused)
  })
})

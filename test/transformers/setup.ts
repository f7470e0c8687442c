// The model of this repository, loaded by transformers.js, and codebooks learned from text that every clone has.
import { readFileSync } from 'node:fs'
import { join, resolve } from 'node:path'
import { AutoModelForCausalLM, AutoTokenizer, env, type PreTrainedModel, type PreTrainedTokenizer, type Tensor } from '@huggingface/transformers'
import { Codebook } from '../../lib/codebook'
import { codec } from '../../lib/codec'
import { kmeans } from '../../lib/kmeans'
import { Capture } from '../../lib/onnx/capture'
import { DecoderModel } from '../../lib/onnx/model'

export const root = resolve(__dirname, '../..')
export const modelId = 'tiny-llama-bytes'
export const modelFolder = join(root, 'models', modelId)

env.localModelPath = join(root, 'models')
env.allowRemoteModels = false

export type Model = PreTrainedModel
export type Inputs = { input_ids: Tensor; attention_mask: Tensor }

export async function loadModel(): Promise<Model> {
  return AutoModelForCausalLM.from_pretrained(modelId, { dtype: 'fp32', device: 'cpu' })
}

export async function loadTokenizer(): Promise<PreTrainedTokenizer> {
  const tokenizer = await AutoTokenizer.from_pretrained(modelId)
  tokenizer.padding_side = 'left'
  // The tokenizer of this model names no padding token; byte 0 is its end of text.
  tokenizer.pad_token = '\u0000'
  tokenizer.pad_token_id = 0
  return tokenizer
}

export type Outputs = { logits: Tensor } & Record<string, Tensor>

/** The model's direct call, typed. */
export async function forward(model: Model, inputs: object): Promise<Outputs> {
  return (await model(inputs)) as Outputs
}

/** What a step returned, as the past of the next one. */
export function nextPast(outputs: Outputs): Record<string, Tensor> {
  const present = Object.entries(outputs).filter(([name]) => name.startsWith('present'))
  return Object.fromEntries(present.map(([name, tensor]) => [name.replace('present', 'past_key_values'), tensor]))
}

/** The likeliest next token after each column of the first row. */
export function predictions({ logits }: Outputs): number[] {
  const [, columns = 0, vocabulary = 0] = logits.dims
  return Array.from({ length: columns }, (_, column) => {
    const row = floats(logits).subarray(column * vocabulary, (column + 1) * vocabulary)
    return row.reduce((best, value, index) => (value > row[best]! ? index : best), 0)
  })
}

export function floats(tensor: Tensor): Float32Array {
  return tensor.data as Float32Array
}

/** The ids that generate() returns, as plain numbers. */
export function tokenRows(output: unknown): number[][] {
  return ((output as Tensor).tolist() as bigint[][]).map((row) => row.map(Number))
}

/** English technical text, the same in every clone. */
export function text(bytes: number, skip = 0): string {
  const files = ['eslint', 'cmake-js', 'fast-check', 'node-gyp-build'].map((name) => join(root, 'node_modules', name, 'README.md'))
  return files.map((file) => readFileSync(file, 'latin1')).join('\n').replace(/[^\x20-\x7e\n]/g, ' ').slice(skip, skip + bytes)
}

const learned = new Map<string, Promise<Codebook>>()

/** Codebooks of the model, learned once per process by couplet's own kmeans on activations that couplet captured. */
export function codebooks(name: string): Promise<Codebook> {
  let book = learned.get(name)
  if (!book) learned.set(name, (book = learn(name)))
  return book
}

async function learn(name: string): Promise<Codebook> {
  const model = await DecoderModel.load(modelFolder)
  const { layers, kvHeads, headDim, rotary } = model.shape
  const points = 1536
  const capture = new Capture({ model, points, weights: 'uniform' })
  const bytes = Buffer.from(text(4 * 512, 2000))
  for (let at = 0; at < bytes.length; at += 512) {
    const sequence = model.sequence()
    await model.run([{ sequence, tokens: bytes.subarray(at, at + 512) }], { capture, logits: 'last' })
    sequence.dispose()
  }
  const coding = codec(name)
  const { groupChannels, centroids } = coding
  const groups = headDim / groupChannels
  const tables = async (rows: Float32Array) => {
    const result = await kmeans(rows, {
      problems: layers * kvHeads * groups, points: capture.tokensKept, channels: groupChannels, centroids, iterations: 6, seed: 7,
      layout: { problemStride: groupChannels, pointStride: layers * kvHeads * headDim },
    })
    const perLayer = kvHeads * groups * centroids * groupChannels
    return Array.from({ length: layers }, (_, layer) => result.centroids.slice(layer * perLayer, (layer + 1) * perLayer))
  }
  const book = Codebook.fromTables({
    keyTables: await tables(capture.keys), valueTables: await tables(capture.values),
    keyCodec: coding, valueCodec: coding, kvHeads, headDim,
    metadata: { formatVersion: 1, rotary, model: model.fingerprint, learned: { weights: 'uniform', iterations: 6, seed: '7', tokens: capture.tokensKept } },
  })
  capture.dispose()
  model.dispose()
  return book
}

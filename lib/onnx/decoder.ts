/** A decoder's file: found, read, its attention rewritten. What DecoderModel and the gradient graph begin with. */
import { readFile, stat } from 'node:fs/promises'
import { dirname, join, resolve } from 'node:path'

import { requireText } from '../arguments'
import type { RotarySpec } from '../codebook'
import { CoupletError } from '../errors'
import { knownInputs } from './feeds'
import { fingerprintFiles } from './fingerprint'
import type { Model } from './proto'
import { decodeModel, decodeTensor } from './proto'
import type { AttentionLayer, MeasuredPast } from './rewrite'
import { rewriteAttention, runInput } from './rewrite'
import { externalLocation } from './tensors'

export interface ModelShape {
  readonly layers: number
  readonly queryHeads: number
  readonly kvHeads: number
  readonly headDim: number
  /** Of the first layer that rotates; null when none does. */
  readonly rotary: RotarySpec | null
}

export interface Decoder {
  /** The .onnx file, an absolute path. */
  readonly file: string
  /** Attention is couplet.Attention; nothing else is changed. */
  readonly graph: Model
  /** Where external data lies. */
  readonly folder: string
  readonly layers: readonly AttentionLayer[]
  readonly measuredPasts: readonly MeasuredPast[]
  readonly shape: ModelShape
  /** Inputs for tokens, of knownInputs. */
  readonly inputNames: readonly string[]
  readonly outputNames: readonly string[]
  /** Tokens the model knows, as far as the graph says. */
  readonly vocabulary: number | undefined
  /** "sha256:..." over the graph and all its weights; reads the files once per process. */
  readonly fingerprint: () => Promise<string>
}

/**
 * @param path an .onnx file, or a folder that has onnx/model.onnx or model.onnx.
 * @throws {CoupletError} `ERR_COUPLET_UNSUPPORTED_MODEL`, with the reason.
 */
export async function openDecoder(path: string): Promise<Decoder> {
  const file = await findModel(path)
  const folder = dirname(file)
  const graph = await readGraph(file)
  const files = [file, ...externalFiles(graph).map((name) => join(folder, name))]
  const { layers, measuredPasts } = await rewriteAttention(graph, folder)
  const fingerprint = () => fingerprintFiles(files).catch((cause: unknown) => {
    throw new CoupletError('ERR_COUPLET_UNSUPPORTED_MODEL', `The weights of "${file}" cannot be read: ${String(cause)}`, { cause })
  })
  return { file, graph, folder, layers, measuredPasts, shape: shapeOf(layers), fingerprint, ...describeGraph(graph, measuredPasts) }
}

/**
 * The shape of a model, from its graph alone: nothing is given to onnxruntime.
 * @param path an .onnx file, or a folder that has onnx/model.onnx or model.onnx.
 * @throws {CoupletError} `ERR_COUPLET_UNSUPPORTED_MODEL`
 */
export async function modelShape(path: string): Promise<ModelShape> {
  requireText(path, 'path')
  return (await openDecoder(path)).shape
}

async function findModel(path: string): Promise<string> {
  const candidates = [path, join(path, 'onnx', 'model.onnx'), join(path, 'model.onnx')].map((candidate) => resolve(candidate))
  for (const candidate of candidates) {
    const found = await stat(candidate).catch(() => undefined)
    if (found?.isFile()) return candidate
  }
  throw new CoupletError('ERR_COUPLET_UNSUPPORTED_MODEL', `There is no model at ${candidates.join(', ')}`)
}

async function readGraph(file: string): Promise<Model> {
  try {
    return decodeModel(await readFile(file))
  } catch (cause) {
    throw new CoupletError('ERR_COUPLET_UNSUPPORTED_MODEL', `"${file}" cannot be read as an ONNX model: ${(cause as Error).message}`, { cause })
  }
}

/** Files beside the model that hold weights, in a fixed order. */
function externalFiles({ initializers }: Model): string[] {
  const tensors = Array.from(initializers.values(), (bytes) => decodeTensor(bytes))
  return [...new Set(tensors.filter(({ dataLocation }) => dataLocation === 1).map(externalLocation))].sort()
}

/** Inputs and outputs of a rewritten graph, if they are a decoder's. */
function describeGraph({ graph }: Model, pasts: readonly MeasuredPast[]): Pick<Decoder, 'inputNames' | 'outputNames' | 'vocabulary'> {
  const fed = new Set([runInput, ...pasts.map(({ name }) => name)])
  const inputNames = graph.input.map(({ name }) => name).filter((name) => !fed.has(name))
  const unknown = inputNames.find((name) => !knownInputs.includes(name))
  if (unknown !== undefined || !inputNames.includes('input_ids')) {
    const problem = unknown === undefined ? 'the graph has no input "input_ids"' : `the graph has the input "${unknown}"`
    throw new CoupletError('ERR_COUPLET_UNSUPPORTED_MODEL', `Cannot run this model: ${problem}; couplet feeds ${knownInputs.join(', ')}`)
  }
  const logits = graph.output.find(({ name }) => name === 'logits')
  if (!logits) throw new CoupletError('ERR_COUPLET_UNSUPPORTED_MODEL', 'Cannot run this model: the graph has no output "logits"')
  const vocabulary = Number(logits.type?.tensorType?.shape?.dim.at(-1)?.dimValue ?? 0)
  return { inputNames, outputNames: graph.output.map(({ name }) => name), vocabulary: vocabulary > 0 ? vocabulary : undefined }
}

function shapeOf(layers: readonly AttentionLayer[]): ModelShape {
  const { queryHeads, kvHeads, headDim } = layers[0]!
  const tables = layers.find(({ rotary }) => rotary)?.rotary
  const scaling = tables?.theta === undefined ? { scaled: true } : { theta: tables.theta }
  return { layers: layers.length, queryHeads, kvHeads, headDim, rotary: tables ? { kind: tables.kind, dim: tables.dim, ...scaling } : null }
}

import { existsSync } from 'node:fs'
import { readFile } from 'node:fs/promises'
import { basename, join, resolve } from 'node:path'
import { Command, InvalidArgumentError, Option } from 'commander'
import { Codebook } from '../codebook'
import { CoupletError } from '../errors'
import { readableBytes } from '../inspect/format'
import { planPage } from '../inspect/plan-page'
import { type ModelShape, modelShape } from '../onnx/decoder'
import { plan, type PlannedCache } from '../plan'
import { codecName, integer, sinksOption, windowOption } from './options'
import { checkPage, writePage } from './output'

interface Flags {
  model: string
  context: number
  sequences: number
  budget?: number
  codec?: string[]
  codebooks?: string[]
  sinks: number
  window: number
  json?: boolean
  out?: string
}

type Shape = Pick<ModelShape, 'layers' | 'kvHeads' | 'headDim'>

export function planCommand(): Command {
  return new Command('plan')
    .description('memory of the KV cache in float16, int8, int4 and each codec, and the longest context that fits a budget')
    .addOption(new Option('--model <directory>', 'directory of the model: onnx/model.onnx, or config.json alone').makeOptionMandatory())
    .addOption(new Option('--context <tokens>', 'tokens of each sequence').makeOptionMandatory().argParser(integer(1)))
    .addOption(new Option('--sequences <count>').default(1).argParser(integer(1)))
    .addOption(new Option('--budget <bytes>', 'such as 8e9, 8GB or 8GiB').argParser(byteCount))
    .addOption(new Option('--codec <names>', 'separated by commas (default: the usual ones)').argParser((names: string) => names.split(',').map(codecName)))
    .option('--codebooks <files...>', 'codebooks of this model to plan for as well')
    .addOption(sinksOption())
    .addOption(windowOption())
    .option('--out <file>', 'draw it as well, on this page (HTML)')
    .option('--json', 'print one JSON object')
    .action(async ({ model, json, out, codec: codecs, codebooks: files = [], ...flags }: Flags) => {
      if (out !== undefined) await checkPage(out)
      const { layers, kvHeads, headDim } = await shapeOf(model)
      const codebooks = await Promise.all(files.map((file) => Codebook.load(file)))
      const caches = plan({ layers, kvHeads, headDim, ...flags, ...(codecs && { codecs }), codebooks })
      if (json) console.log(JSON.stringify({ layers, kvHeads, headDim, ...flags, caches }))
      else print({ layers, kvHeads, headDim }, flags, caches)
      if (out !== undefined) await writePage(out, await planPage(caches, { name: basename(resolve(model)), layers, kvHeads, headDim, ...flags }))
    })
}

/** Of the graph, or of config.json where no graph has been exported yet. */
async function shapeOf(directory: string): Promise<Shape> {
  const config = join(directory, 'config.json')
  const graphs = [join(directory, 'onnx', 'model.onnx'), join(directory, 'model.onnx')]
  if (!existsSync(config) || graphs.some((graph) => existsSync(graph))) return modelShape(directory)
  const { num_hidden_layers: layers, num_attention_heads: queryHeads, hidden_size: hidden, ...rest } = await readConfig(config)
  const kvHeads = rest.num_key_value_heads ?? queryHeads
  const headDim = rest.head_dim ?? (hidden ?? NaN) / (queryHeads ?? NaN)
  if (layers === undefined || kvHeads === undefined || !Number.isInteger(headDim)) {
    throw new CoupletError('ERR_COUPLET_UNSUPPORTED_MODEL', `${config} does not say how many layers, kv heads and channels of a head the model has`)
  }
  return { layers, kvHeads, headDim }
}

async function readConfig(file: string): Promise<Record<string, number | undefined>> {
  const text = await readFile(file, 'utf8')
  try {
    return Object(JSON.parse(text)) as Record<string, number | undefined>
  } catch (cause) {
    throw new CoupletError('ERR_COUPLET_UNSUPPORTED_MODEL', `${file} is not JSON: ${(cause as Error).message}`, { cause })
  }
}

const units: Record<string, number> = { '': 1, k: 1e3, m: 1e6, g: 1e9, t: 1e12, ki: 2 ** 10, mi: 2 ** 20, gi: 2 ** 30, ti: 2 ** 40 }

function byteCount(text: string): number {
  const [, number, unit] = /^\s*(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmgt]?i?)b?\s*$/i.exec(text) ?? []
  const bytes = Math.floor(Number(number) * (units[(unit ?? '').toLowerCase()] ?? NaN))
  if (!Number.isSafeInteger(bytes) || bytes < 1) throw new InvalidArgumentError('Expected a number of bytes, such as 8e9, 8GB or 8GiB.')
  return bytes
}

type Asked = Omit<Flags, 'model' | 'json' | 'out' | 'codec'>

function print({ layers, kvHeads, headDim }: Shape, { context, sequences, budget, sinks, window }: Asked, caches: readonly PlannedCache[]): void {
  console.log(`${layers} layers, ${kvHeads} kv heads, headDim ${headDim}; ${sequences} x ${context} tokens, sinks ${sinks}, window ${window}`)
  const most = Math.max(...caches.map(({ totalBytes }) => totalBytes))
  const longest = budget === undefined ? '' : `  longest context in ${readableBytes(budget)}`
  const titles = ['codes', 'kept', 'codebook', 'total'].map((title) => title.padStart(12)).join('')
  console.log(`${'cache'.padEnd(12)}${'bits'.padStart(7)}${titles}  ${' '.repeat(24)}${longest}`)
  for (const { name, bitsPerChannel, pageBytes, rawBytes, codebookBytes, totalBytes, longestContext } of caches) {
    const sizes = [pageBytes, rawBytes, codebookBytes, totalBytes].map((bytes) => readableBytes(bytes).padStart(12)).join('')
    const bar = '█'.repeat(Math.max(1, Math.round(24 * totalBytes / most))).padEnd(24)
    console.log(`${name.padEnd(12)}${bitsPerChannel.toFixed(2).padStart(7)}${sizes}  ${bar}${longestContext === undefined ? '' : `  ${longestContext}`}`)
  }
  console.log('int8 and int4 have a float16 scale for 32 elements; bits are of everything, per channel of a token. The codebook is shared by all sequences.')
}

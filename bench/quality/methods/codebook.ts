/**
 * A codebook from a file: whatever `couplet calibrate` or `couplet tune` wrote for the model, in the table beside plain CQ. Keys before
 * rotary embedding. Bits: b / c of each side, mean over layers and heads where they differ; nothing else a token.
 */
import { createHash } from 'node:crypto'
import { readFileSync } from 'node:fs'
import path from 'node:path'
import { Codebook } from '../../../lib/codebook'
import { meanBits } from '../../../lib/codec'
import { inverseOrder } from '../../../lib/rotary-pairs'
import { mixRows, reorderRows } from '../../../lib/transform/apply'
import type { Method, Quantizer } from './method'
import { toCentroids } from './product'

/** `identity` is of the file's bytes: another file of the same name is measured again. */
export function codebookFile(file: string): Method & { identity: string } {
  const bytes = readFileSync(file)
  using given = Codebook.fromBuffer(bytes)
  const bits = meanBits(given.codecs)
  return {
    name: path.basename(file).replace(/\.safetensors$/, ''),
    width: bits,
    file: 'codebook.ts', rotated: false,
    identity: createHash('sha256').update(bytes).digest('hex'),
    fit: ({ captured, threads }): Promise<Quantizer> => {
      const codebook = Codebook.fromBuffer(bytes)
      const { layers, kvHeads, headDim, rotary } = captured.model.shape
      codebook.check({ layers, kvHeads, headDim, rotary, model: captured.model.fingerprint })
      const parts = Array.from({ length: layers }, (_, layer) => codebook.parts(layer))
      return Promise.resolve({
        tableBytes: parts.flat().reduce((sum, { keyTable, valueTable }) => sum + keyTable.byteLength + valueTable.byteLength, 0),
        quantize: ({ data, tokens, channels }, { layer, side }) => {
          const mix = (name: 'value.mix' | 'value.unmix') => {
            const matrices = side === 'value' ? codebook.transform(name, layer) : undefined
            if (matrices) mixRows(data, matrices, { tokens, channels })
          }
          const order = side === 'key' ? codebook.transform('key.group', layer) : undefined
          if (order) reorderRows(data, order)
          mix('value.mix')
          const bitsCoded = parts[layer]!.reduce((coded, { firstHead, heads, ...part }) => {
            const own = data.subarray(firstHead * tokens * channels, (firstHead + heads) * tokens * channels)
            const tables = side === 'key' ? { codec: part.keyCodec, data: part.keyTable, metric: part.keyMetric }
              : { codec: part.valueCodec, data: part.valueTable, metric: part.valueMetric }
            return coded + toCentroids({ data: own, heads, tokens, channels }, tables, threads)
          }, 0)
          mix('value.unmix')
          if (order) reorderRows(data, inverseOrder(order))
          return bitsCoded
        },
      })
    },
  }
}

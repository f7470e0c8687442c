/** Inspections without a model. */
import type { InspectedSide, Inspection } from '../../lib'
import { normals } from '../onnx/graphs'

export interface MadeUp {
  layers?: number
  kvHeads?: number
  coded?: boolean
  codeBits?: number
}

/** Figures that change from layer to layer, and from head to head. */
export function madeUpInspection({ layers = 4, kvHeads = 2, coded = true, codeBits = 8 }: MadeUp = {}): Inspection {
  const random = normals(layers)
  const side = (layer: number): InspectedSide => ({
    entropy: [1, 2, 3, 4].map((channels) => (
      { channels, marginal: 3 * channels, joint: 3 * channels ** (0.4 + 0.5 * layer / layers), independent: 2.9 * channels }
    )),
    correlation: { channels: 32, r: Array.from({ length: 1024 }, (_, i) => (i % 33 === 0 ? 1 : Math.tanh(random() / 3))), meanAbsolute: 0.2 },
    coding: coded
      ? {
        codec: `cq-8c${codeBits}b`, headErrors: Array.from({ length: kvHeads }, (_, head) => (layer + 1) * (head + 1) / (layers * kvHeads * 2)),
        usage: {
          codeBits, usedBits: codeBits - 1, dead: 0.3 / (layer + 1), hot: 0.04, hottest: 0.1,
          byRank: Array.from({ length: 33 }, (_, step) => (step / 32) ** (1 / (2 + layer / layers))),
        },
      }
      : undefined,
  })
  const windows = [0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
  const mass = (layer: number) => {
    const shares = { sinks: 0.1, window: 0.6 - 0.3 * layer / layers, codes: 0.3 + 0.3 * layer / layers }
    const outputErrors = Array.from({ length: kvHeads }, (_, head) => 0.06 * (layer + 1) / layers / (head + 1))
    const heads = Array.from({ length: kvHeads }, () => shares)
    return { shares, heads, ...(coded && { outputErrors }), beyond: windows.map((size) => 0.9 * (1 - Math.sqrt(size / 512))) }
  }
  const all = <T>(one: (layer: number) => T): T[] => Array.from({ length: layers }, (_, layer) => one(layer))
  return {
    shape: { layers, queryHeads: 4 * kvHeads, kvHeads, headDim: 128, rotary: null },
    fingerprint: 'sha256:0', tokens: 40000, sampled: 16384, length: 512, sinks: 4, window: 32,
    layers: all((layer) => ({ key: side(layer), value: side(layer) })),
    attention: { windows, layers: all(mass) }, attentionChunks: 16,
  }
}

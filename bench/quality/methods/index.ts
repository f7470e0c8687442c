/** All methods of the table, by width. */
import { calibQuant } from './calibquant'
import { cq } from './cq'
import { kitty, kivi } from './kivi'
import { kvquant } from './kvquant'
import type { Method } from './method'
import { nsnQuant } from './nsnquant'
import { integers, normalFloat } from './scalar'
import { turboQuant } from './turboquant'
import { vecinfer } from './vecinfer'
import { vidkv } from './vidkv'

export const widths = [4, 2, 1.5, 1.25, 1, 0.75] as const

const axes = ['token', 'channel', 'mixed', 'group'] as const

export const methods: readonly Method[] = [
  ...[4, 2, 1].flatMap((bits) => axes.map((axis) => integers(bits, axis))),
  ...[4, 2].flatMap((bits) => axes.map((axis) => normalFloat(bits, axis))),
  ...[4, 2, 1].flatMap((bits) => [kvquant(bits, 0), kvquant(bits, 0.01)]),
  ...[4, 2, 1].map((bits) => kivi(bits)),
  kitty('kitty', 0.125), kitty('kitty-pro', 0.25),
  vidkv(1.58, 32), vidkv(1.58, 128), vidkv(2, 128),
  calibQuant(),
  ...[4, 2, 1].flatMap((bits) => [turboQuant(bits, 'mse'), turboQuant(bits, 'prod')]),
  nsnQuant(2), nsnQuant(1),
  vecinfer(2, 8), vecinfer(4, 8), vecinfer(8, 12), vecinfer(8, 10), vecinfer(8, 8), vecinfer(16, 12),
  ...['2c8b', '4c8b', '8c10b', '8c8b'].flatMap((codec) => [cq(codec, 'uniform'), cq(codec, 'attention'), cq(codec, 'fisher')]),
  ...['8c12b', '16c12b'].flatMap((codec) => [cq(codec, 'attention'), cq(codec, 'fisher')]),
]

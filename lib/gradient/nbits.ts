/** The weights of com.microsoft.MatMulNBits as numbers. */
import { attribute } from '../onnx/graph'
import type { TensorProto } from '../onnx/proto'
import { DataType } from '../onnx/proto'
import { readFloats, readUint8 } from '../onnx/tensors'
import type { Site } from './site'
import { refuse } from './site'

/** Input slots of MatMulNBits. */
const slot = { weights: 1, scales: 2, zeroPoints: 3, groupIndex: 4 } as const

/**
 * The matrix float32 [N][K] that a MatMulNBits node multiplies with, transposed: (code - zero point) * scale, one scale and zero
 * point for each `block_size` channels of a row. Codes lie in their bytes lowest bits first, and every row of zero points
 * begins with a byte of its own.
 */
export async function dequantize({ node, index, folder }: Site): Promise<{ rows: number; columns: number; matrix: Float32Array }> {
  const integer = (name: string): number => Number(attribute(node, name)?.i ?? refuse(node, `it has no attribute ${name}`))
  const [columns, rows, blockLength] = [integer('K'), integer('N'), integer('block_size')]
  const bits = Number(attribute(node, 'bits')?.i ?? 4)
  if (![2, 4, 8].includes(bits)) refuse(node, `its weights have ${bits} bits`)
  if (node.input[slot.groupIndex]) refuse(node, 'its weights are in another order (input g_idx)')
  const constant = (input: number): TensorProto | undefined => {
    const name = node.input[input]
    return name ? index.constant(name) ?? refuse(node, `its input "${name}" is computed, not constant`) : undefined
  }
  const blocks = Math.ceil(columns / blockLength)
  const codes = await readUint8(constant(slot.weights) ?? refuse(node, 'it has no weights'), folder)
  const scales = await readFloats(constant(slot.scales) ?? refuse(node, 'it has no scales'), folder)
  const zeroTensor = constant(slot.zeroPoints)
  const packedZeros = zeroTensor?.dataType === DataType.uint8 ? await readUint8(zeroTensor, folder) : undefined
  const plainZeros = zeroTensor && !packedZeros ? await readFloats(zeroTensor, folder) : undefined
  const zeroRowBytes = Math.ceil((blocks * bits) / 8)
  const [codeBytes, zeroBytes] = [rows * blocks * ((blockLength * bits) / 8), packedZeros && rows * zeroRowBytes]
  const perBlock = [scales, ...(plainZeros ? [plainZeros] : [])]
  if (codes.length !== codeBytes || packedZeros?.length !== zeroBytes || perBlock.some(({ length }) => length !== rows * blocks)) {
    refuse(node, `its weights do not have the sizes that N ${rows}, K ${columns}, ${bits} bits and blocks of ${blockLength} ask for`)
  }

  const mask = (1 << bits) - 1
  const at = (packed: Uint8Array, base: number, element: number) => (packed[base + ((element * bits) >> 3)]! >> ((element * bits) & 7)) & mask
  const matrix = new Float32Array(rows * columns)
  for (let row = 0; row < rows; row++) {
    for (let block = 0; block < blocks; block++) {
      const number = row * blocks + block
      const zero = packedZeros ? at(packedZeros, row * zeroRowBytes, block) : plainZeros?.[number] ?? 1 << (bits - 1)
      const base = number * ((blockLength * bits) / 8)
      const first = block * blockLength
      for (let i = 0; i < Math.min(blockLength, columns - first); i++) matrix[row * columns + first + i] = (at(codes, base, i) - zero) * scales[number]!
    }
  }
  return { rows, columns, matrix }
}

/**
 * Values on levels (docs/algorithm.md): kernels keep a table whose every channel has at most 128 evenly spaced values as bytes, a quarter of
 * its size in float32. They find that in the numbers; a file says no more of it than that it was done.
 */
import type { Codec, LayerCodecs, SidePart } from '../codec'

/** Of each channel: its bytes are 0 to 127. */
export const levelCount = 128

/** Whether kernels have a use for levels: those that keep bytes are made for these values alone. */
const hasLevels = ({ groupChannels, codeBits }: Codec): boolean => groupChannels === 8 && codeBits === 8

/** What a codebook's metadata say of values on levels: nothing where no value has a use for them. */
export const levelsOf = (codecs: LayerCodecs): { levels?: number } =>
  codecs.flat().some(({ valueCodec }) => hasLevels(valueCodec)) ? { levels: levelCount } : {}

/**
 * A table of values, its parts one after another, float32 [heads][groups][centroids][groupChannels], with each channel of a group on
 * {@link levelCount} levels that are evenly spaced from the channel's least centroid to its largest. A table that is on levels stays as it is,
 * bit for bit; so do parts whose codec has no use for them. What is given is not written.
 */
export function onLevels(table: Float32Array, parts: readonly SidePart[], headDim: number): Float32Array {
  const out = table.slice()
  let end = 0
  for (const { heads, codec } of parts) {
    const begin = end
    end += heads * headDim * codec.centroids
    if (!hasLevels(codec)) continue
    const { groupChannels, centroids } = codec
    for (let group = begin; group < end; group += centroids * groupChannels) {
      for (let channel = 0; channel < groupChannels; channel++) roundChannel(out.subarray(group + channel, group + centroids * groupChannels), groupChannels)
    }
  }
  return out
}

/** Every `stride`-th number, in place. */
function roundChannel(numbers: Float32Array, stride: number): void {
  let [least, largest] = [Infinity, -Infinity]
  for (let at = 0; at < numbers.length; at += stride) {
    least = Math.min(least, numbers[at]!)
    largest = Math.max(largest, numbers[at]!)
  }
  if (least === largest) return
  const levels = levelsBetween(least, largest)
  for (let at = 0; at < numbers.length; at += stride) numbers[at] = nearestOf(levels, numbers[at]!)
}

/** float32, ascending. Products of a float32 and an integer below 128 are exact in double, so that the first and the last level are the bounds themselves. */
function levelsBetween(least: number, largest: number): Float32Array {
  const last = levelCount - 1
  return Float32Array.from({ length: levelCount }, (_, level) => (least * (last - level) + largest * level) / last)
}

/** Of ascending numbers between which x is; a number that is among them is its own. */
function nearestOf(numbers: Float32Array, x: number): number {
  let [low, high] = [0, numbers.length - 1]
  while (high - low > 1) {
    const middle = (low + high) >> 1
    if (numbers[middle]! <= x) low = middle
    else high = middle
  }
  return x - numbers[low]! <= numbers[high]! - x ? numbers[low]! : numbers[high]!
}

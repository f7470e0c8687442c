/** A codebook as caches keep it: its tables made ready once for each device, and compared with another's. */
import type { Codebook } from './codebook'
import type { MatrixName } from './codebook-transforms'
import { transformNames } from './codebook-transforms'
import type { HeadCodecs, LayerCodecs } from './codec'
import { addon } from './native/addon'
import type { NativeCodebook, NativeCodebookArguments } from './native/cache'
import type { NativeDevice } from './native/device'

/** The tables of a codebook as a backend keeps them, shared by its caches. */
const nativeCodebooks = new WeakMap<Codebook, Map<string, NativeCodebook>>()

function heldCodebooks(codebook: Codebook): Map<string, NativeCodebook> {
  const held = nativeCodebooks.get(codebook) ?? new Map<string, NativeCodebook>()
  nativeCodebooks.set(codebook, held)
  return held
}

const placeName = ({ device, deviceIndex }: NativeDevice): string => `${device} ${deviceIndex}`

export function nativeCodebook(codebook: Codebook, place: NativeDevice): NativeCodebook {
  const tables = nativeTables(codebook) // throws after dispose()
  const held = heldCodebooks(codebook)
  const native = held.get(placeName(place)) ?? addon().createCodebookSync({ ...tables, ...place })
  held.set(placeName(place), native)
  return native
}

/** So that {@link nativeCodebook} has it. */
export async function prepareCodebook(codebook: Codebook, place: NativeDevice): Promise<void> {
  if (heldCodebooks(codebook).has(placeName(place))) return
  const native = await addon().createCodebook({ ...nativeTables(codebook), ...place })
  heldCodebooks(codebook).set(placeName(place), native)
}

function nativeTables(codebook: Codebook): Omit<NativeCodebookArguments, keyof NativeDevice> {
  const { layers, kvHeads, headDim, codecs } = codebook
  const everyLayer = Array.from({ length: layers }, (_, layer) => layer)
  const every = (name: MatrixName) => codebook.transforms.includes(name) ? everyLayer.map((layer) => codebook.transform(name, layer)!) : undefined
  return {
    layers, kvHeads, headDim, codecs,
    keyTables: everyLayer.map((layer) => codebook.keyTable(layer)),
    valueTables: everyLayer.map((layer) => codebook.valueTable(layer)),
    keyOrders: codebook.transforms.includes('key.group') ? everyLayer.map((layer) => codebook.transform('key.group', layer)!) : undefined,
    keyMetrics: every('key.metric'), valueMetrics: every('value.metric'), valueMixes: every('value.mix'), valueUnmixes: every('value.unmix'),
  }
}

/** Whether codes of one mean the same with the other. */
export function sameTables(one: Codebook | undefined, other: Codebook | undefined): boolean {
  if (one === other || one === undefined || other === undefined) return one === other
  if (!sameCodecs(one.codecs, other.codecs)) return false
  return Array.from({ length: one.layers }, (_, layer) => layer).every((layer) =>
    sameNumbers(one.keyTable(layer), other.keyTable(layer)) && sameNumbers(one.valueTable(layer), other.valueTable(layer))
    && transformNames.every((name) => sameNumbers(one.transform(name, layer) ?? none, other.transform(name, layer) ?? none)))
}

const none = new Float32Array(0)

function sameCodecs(one: LayerCodecs, other: LayerCodecs): boolean {
  const alike = (a: HeadCodecs, b: HeadCodecs | undefined): boolean =>
    a.heads === b?.heads && a.keyCodec.name === b.keyCodec.name && a.valueCodec.name === b.valueCodec.name
  return one.length === other.length && one.every((parts, layer) =>
    parts.length === other[layer]!.length && parts.every((part, index) => alike(part, other[layer]![index])))
}

/** Byte for byte: a table of a large model has megabytes, and this is on the JavaScript thread. */
function sameNumbers(one: Float32Array | Int32Array, other: Float32Array | Int32Array): boolean {
  return bytesOf(one).equals(bytesOf(other))
}

const bytesOf = ({ buffer, byteOffset, byteLength }: Float32Array | Int32Array): Buffer => Buffer.from(buffer, byteOffset, byteLength)

import type { ElementType } from '../device'
import type { NativeDevice, NativeMemory } from './device'
import type { Handle } from './handle'
import type { NativeControl } from './operations'

/** Handles of native/binding/cache.cc. */
export type NativeCodebook = Handle<'codebook'>
export type NativeCache = Handle<'cache'>
export type NativeSequence = Handle<'sequence'>
export type NativeStep = Handle<'step'>

/** couplet_codec (native/abi/layout.h). */
export interface NativeCodec {
  groupChannels: number
  codeBits: number
}

/**
 * couplet::Codebook::Shape (native/cache/cache.h) and its tables: one per layer, its parts one after another,
 * [heads][groups][centroids][groupChannels], copied.
 */
export interface NativeCodebookArguments extends NativeDevice {
  layers: number
  kvHeads: number
  headDim: number
  codecs: readonly (readonly { heads: number; keyCodec: NativeCodec; valueCodec: NativeCodec }[])[]
  keyTables: Float32Array[]
  valueTables: Float32Array[]
  /** Likewise [heads][groups][groupChannels][groupChannels]. */
  keyMetrics?: Float32Array[] | undefined
  valueMetrics?: Float32Array[] | undefined
  /** Likewise [kvHeads][headDim][headDim], both or none. */
  valueMixes?: Float32Array[] | undefined
  valueUnmixes?: Float32Array[] | undefined
  /** Of every layer [headDim]: channel order[c] of the model at place c. */
  keyOrders?: Int32Array[] | undefined
}

/** couplet_rotary_params: theta, or cos and sin of [positions][dim / 2]. Copied. */
export interface NativeRotary {
  kind: 'half' | 'interleaved'
  dim: number
  positions: number
  theta?: number | undefined
  cos?: Float32Array | undefined
  sin?: Float32Array | undefined
}

/** couplet_rotary_entries.reorder of an entry before it in the list: pair i has the angles of pair order[i]. */
export interface NativeOrderedRotary {
  of: number
  order: Int32Array
}

/** couplet::AttendOptions; `rotary` and `orderedRotary` are indices into the list of rotaries. */
export interface NativeLayerOptions {
  rotary?: number | undefined
  /** The same angles in the key order of the layer. */
  orderedRotary?: number | undefined
  scale?: number | undefined
  softcap?: number | undefined
  localWindow?: number | undefined
  headSinks?: Float32Array | undefined
}

/** couplet::CacheConfig. */
export interface NativeCacheArguments extends NativeDevice {
  codebook?: NativeCodebook | undefined
  layers: NativeLayerOptions[]
  rotaries: (NativeRotary | NativeOrderedRotary)[]
  config: {
    layers: number
    queryHeads: number
    kvHeads: number
    headDim: number
    sinks: number
    /** -1: everything in full precision. */
    window: number
    threads?: number | undefined
    memory?: number | undefined
  }
}

/** couplet::CacheStatistics. */
export interface NativeCacheStatistics {
  sequences: number
  tokens: number
  codedTokens: number
  rawTokens: number
  pageBytes: number
  rawBytes: number
  codebookBytes: number
  bookkeepingBytes: number
  /** 0: no limit. */
  budgetBytes: number
  peakBytes: number
  bitsPerChannel: number
}

/** Float32Array, or Uint16Array for the 16 bits of a float16 or bfloat16. */
export type NativeRows = Float32Array | Uint16Array | NativeMemory

/** couplet::Step::attend for one layer; a row has queries and out, or neither. All inputs are arrays or all memory, and all outs. */
export interface NativeAttendArguments extends NativeControl {
  step: NativeStep
  layer: number
  dtype: ElementType
  outDtype: ElementType
  stream?: bigint | undefined
  rows: {
    keys: NativeRows
    values: NativeRows
    queries?: NativeRows | undefined
    out?: NativeRows | undefined
  }[]
}

/** What native/binding/cache.cc exports. */
export interface CacheAddon {
  /** Napi::Value promise_form<CodebookWorker>(const Napi::CallbackInfo& info) */
  createCodebook(options: NativeCodebookArguments): Promise<NativeCodebook>
  /** Napi::Value sync_form<CodebookWorker>(const Napi::CallbackInfo& info) */
  createCodebookSync(options: NativeCodebookArguments): NativeCodebook
  /** Napi::Value find_device(const Napi::CallbackInfo& info): what `auto` and defaults mean; throws when it is not there */
  findDevice(options: NativeDevice): { device: string; deviceIndex: number }
  /** Napi::Value create_cache(const Napi::CallbackInfo& info) */
  createCache(options: NativeCacheArguments): NativeCache
  /** Napi::Value cache_statistics(const Napi::CallbackInfo& info) */
  cacheStatistics(cache: NativeCache): NativeCacheStatistics
  /** Napi::Value dispose_cache(const Napi::CallbackInfo& info) */
  disposeCache(cache: NativeCache): void
  /** Napi::Value create_sequence(const Napi::CallbackInfo& info) */
  createSequence(cache: NativeCache): NativeSequence
  /** Napi::Value fork_sequence(const Napi::CallbackInfo& info) */
  forkSequence(sequence: NativeSequence): NativeSequence
  /** Napi::Value promise_form<CopyWorker>(const Napi::CallbackInfo& info) */
  copySequence(options: { sequence: NativeSequence; cache: NativeCache }): Promise<NativeSequence>
  /** Napi::Value sync_form<CopyWorker>(const Napi::CallbackInfo& info) */
  copySequenceSync(options: { sequence: NativeSequence; cache: NativeCache }): NativeSequence
  /** Napi::Value sequence_length(const Napi::CallbackInfo& info) */
  sequenceLength(sequence: NativeSequence): number
  /** Napi::Value truncate_sequence(const Napi::CallbackInfo& info) */
  truncateSequence(sequence: NativeSequence, tokens: number): void
  /** Napi::Value dispose_sequence(const Napi::CallbackInfo& info) */
  disposeSequence(sequence: NativeSequence): void
  /** Napi::Value begin_step(const Napi::CallbackInfo& info) */
  beginStep(options: { cache: NativeCache; rows: { sequence: NativeSequence; tokens: number }[]; prefill: 'exact' | 'coded' }): NativeStep
  /** Napi::Value promise_form<AttendWorker>(const Napi::CallbackInfo& info) */
  attendStep(options: NativeAttendArguments): Promise<void>
  /** Napi::Value sync_form<AttendWorker>(const Napi::CallbackInfo& info) */
  attendStepSync(options: NativeAttendArguments): void
  /** Napi::Value promise_form<SynchronizeWorker>(const Napi::CallbackInfo& info) */
  synchronizeStep(options: { step: NativeStep }): Promise<void>
  /** Napi::Value sync_form<SynchronizeWorker>(const Napi::CallbackInfo& info) */
  synchronizeStepSync(options: { step: NativeStep }): void
  /** Napi::Value commit_step(const Napi::CallbackInfo& info) */
  commitStep(step: NativeStep): void
  /** Napi::Value abort_step(const Napi::CallbackInfo& info) */
  abortStep(step: NativeStep): void
}

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

/** couplet::Codebook::Shape (native/cache/cache.h) and its tables: one per layer, [kvHeads][groups][centroids][groupChannels], copied. */
export interface NativeCodebookArguments {
  layers: number
  kvHeads: number
  headDim: number
  keyCodec: NativeCodec
  valueCodec: NativeCodec
  keyTables: Float32Array[]
  valueTables: Float32Array[]
  device?: string | undefined
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

/** couplet::AttendOptions; `rotary` is an index into the list of rotaries. */
export interface NativeLayerOptions {
  rotary?: number | undefined
  scale?: number | undefined
  softcap?: number | undefined
  localWindow?: number | undefined
  headSinks?: Float32Array | undefined
}

/** couplet::CacheConfig. */
export interface NativeCacheArguments {
  codebook?: NativeCodebook | undefined
  layers: NativeLayerOptions[]
  rotaries: NativeRotary[]
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
  device?: string | undefined
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

/** couplet::Step::attend for one layer; a row has queries and out, or neither. */
export interface NativeAttendArguments extends NativeControl {
  step: NativeStep
  layer: number
  rows: {
    keys: Float32Array
    values: Float32Array
    queries?: Float32Array | undefined
    out?: Float32Array | undefined
  }[]
}

/** What native/binding/cache.cc exports. */
export interface CacheAddon {
  /** Napi::Value create_codebook(const Napi::CallbackInfo& info) */
  createCodebook(options: NativeCodebookArguments): NativeCodebook
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
  /** Napi::Value sequence_length(const Napi::CallbackInfo& info) */
  sequenceLength(sequence: NativeSequence): number
  /** Napi::Value truncate_sequence(const Napi::CallbackInfo& info) */
  truncateSequence(sequence: NativeSequence, tokens: number): void
  /** Napi::Value dispose_sequence(const Napi::CallbackInfo& info) */
  disposeSequence(sequence: NativeSequence): void
  /** Napi::Value begin_step(const Napi::CallbackInfo& info) */
  beginStep(options: { cache: NativeCache; rows: { sequence: NativeSequence; tokens: number }[]; prefill: 'exact' | 'coded' }): NativeStep
  /** Napi::Value attend_step(const Napi::CallbackInfo& info) */
  attendStep(options: NativeAttendArguments): Promise<void>
  /** Napi::Value attend_step_sync(const Napi::CallbackInfo& info) */
  attendStepSync(options: NativeAttendArguments): void
  /** Napi::Value commit_step(const Napi::CallbackInfo& info) */
  commitStep(step: NativeStep): void
  /** Napi::Value abort_step(const Napi::CallbackInfo& info) */
  abortStep(step: NativeStep): void
}

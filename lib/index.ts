export type {
  AppendOptions, AppendRow, AppendSyncOptions, AttendOptions, AttendRow, AttendSyncOptions, CacheOptions, CacheRows, CacheStatistics, LayerOptions,
  Prefill, RotaryOption, StepRow,
} from './cache'
export { Cache, Sequence, Step } from './cache'
export type {
  Activations, Calibrated, CalibrateOptions, CalibrationProgress, CalibrationReport, CalibrationWarning, Captured, CaptureActivationsOptions, Chosen,
  ChooseOptions, LayerError, LearnOptions, PredictedText, Sensitivity, SideActivations, SideError, SufferingPlace, TextInput, Texts, WeightKind,
  RecipeTuning, TransformStep, TriedRecipe,
} from './calibrate'
export { calibrate, captureActivations, chooseCodecs, learnCodebook } from './calibrate'
export type { BackendState, Capabilities, DeviceInfo, SilentDevice } from './capabilities'
export { capabilities } from './capabilities'
export type {
  CodebookMetadata, CodebookPart, CodebookTables, ExpectedCodebook, LearnedFrom, RotarySpec, SaveOptions, TransformName, Transforms,
} from './codebook'
export { Codebook } from './codebook'
export type { Codec, CodecLike, HeadCodecs, HeadCodecsLike, LayerCodecs } from './codec'
export { codec } from './codec'
export type { Float16ArrayLike } from './arguments'
export type { Codes, CodesShape, CodesSyncOptions, DecodeOptions, DecodeSyncOptions, EncodeOptions, EncodeSyncOptions, Rows } from './codes'
export { codesBytes, decode, decodeSync, encode, encodeSync } from './codes'
export type {
  AnyTypedArray, ArrayClass, CopyOptions, DeviceMemory, DeviceName, DeviceOptions, ElementType, MemoryAddress, ReadOptions, StreamOption,
} from './device'
export { DeviceBuffer } from './device'
export type { CoupletErrorCode, ErrorPlace } from './errors'
export { CoupletError } from './errors'
export type { EvaluateOptions, Evaluation } from './evaluate'
export { evaluate } from './evaluate'
export { float16FromFloat32, float32FromFloat16 } from './float16'
export type { GenerateOptions } from './generate'
export { generate } from './generate'
export type { CodedSide, CodeUsage } from './inspect/coding'
export type { Correlation } from './inspect/correlation'
export type { ChannelEntropy } from './inspect/entropy'
export type { InspectedSide, Inspection, InspectOptions, InspectProgress } from './inspect/inspect'
export { inspect } from './inspect/inspect'
export { inspectionPage } from './inspect/inspection-page'
export type { PlannedFor } from './inspect/plan-page'
export { planPage } from './inspect/plan-page'
export type { QualityPoint } from './inspect/quality'
export type { QualityReport } from './inspect/quality-page'
export { qualityPage } from './inspect/quality-page'
export type { AttentionMass, AttentionShares, LayerMass } from './inspect/mass'
export type { KmeansLayout, KmeansOptions, KmeansProgress, KmeansResult, KmeansSyncOptions } from './kmeans'
export { kmeans, kmeansSync } from './kmeans'
export type { TablesShape } from './tables'
export { PreparedTables } from './tables'
export type { PlannedCache, PlanOptions } from './plan'
export { plan } from './plan'
export type { Tuned, TuneOptions, TuneProgress } from './tune'
export { tune } from './tune'
export type { TextTokenizer } from './tokenizer'
export { loadTokenizer } from './tokenizer'
export type { TensorType } from './safetensors'

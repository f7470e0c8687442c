/**
 * The plug into @huggingface/transformers 4: `attach` makes a loaded model generate on packed codes, `CoupledCache` is a
 * past_key_values that stores codes, for graphs that `attach` cannot rewrite.
 * @module transformers
 */
export { attach, Attachment } from './transformers/attach'
export type { AttachmentStatistics, AttachOptions } from './transformers/attach'
export { CoupledCache } from './transformers/cache'
export type { CoupledCacheOptions, CoupledCacheStatistics } from './transformers/cache'
export type { CacheTensor } from './transformers/entry'
export type { GenerateOptions, OnnxruntimeModule, OrtTensor, OrtTensorClass, PretrainedModel, TransformersModule } from './transformers/types'

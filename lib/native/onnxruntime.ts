/** What native/binding/onnxruntime.cc exports. */
// eslint-disable-next-line @typescript-eslint/no-empty-object-type -- filled as the binding grows
export interface OnnxruntimeAddon {}

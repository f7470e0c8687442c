/** What native/binding/cache.cc exports. */
// eslint-disable-next-line @typescript-eslint/no-empty-object-type -- filled as the binding grows
export interface CacheAddon {}

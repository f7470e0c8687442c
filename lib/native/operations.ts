/** What native/binding/operations.cc exports. */
export interface OperationsAddon {
  /** COUPLET_VERSION: the package version that the addon was built for. */
  readonly version: string
}

declare const kind: unique symbol

/** A native object that JavaScript holds (native/binding/handles.h); it goes with its handle, at the latest. */
export interface Handle<Kind extends string> {
  readonly [kind]: Kind
}

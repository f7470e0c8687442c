/** Numbers as people read them. */

export function percent(share: number, digits = 0): string {
  if (share > 0 && share < 0.0005) return '<0.1 %'
  return `${(100 * share).toFixed(share > 0 && share < 0.01 ? Math.max(1, digits) : digits)} %`
}

/** At most two digits behind the point. */
export function round(value: number): string {
  return String(Number(value.toFixed(2)))
}

export function count(value: number): string {
  return value.toLocaleString('en')
}

/** Bytes in units of 1000. */
export function readableBytes(bytes: number): string {
  const unit = bytes === 0 ? 0 : Math.min(4, Math.floor(Math.log10(bytes) / 3))
  return unit === 0 ? `${bytes} B` : `${(bytes / 1000 ** unit).toPrecision(4)} ${' kMGT'[unit]}B`
}

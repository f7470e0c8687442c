import { cpus } from 'node:os'
import { capabilities } from '../lib/capabilities'
import { addon } from '../lib/native/addon'

/** One line of a benchmark's table. */
export interface Row {
  what: string
  /** In the unit of the table. */
  value: number
  /** Throughput in words, such as `12.3 GFLOP/s`. */
  rate?: string
  error?: number
  wallMs: number
  repeats: number
}

export interface Table {
  operation: string
  shape: Record<string, string | number>
  /** What `value` counts, formula included. */
  unit: string
  rows: Row[]
}

export function print(table: Table): void {
  const shape = Object.entries(table.shape).map(([name, value]) => `${name} ${value}`).join(', ')
  console.log(`\n${table.operation}: ${shape}`)
  console.log(`  unit: ${table.unit}`)
  const first = table.rows[0]?.value ?? NaN
  for (const row of table.rows) {
    const error = row.error === undefined ? '' : `error ${row.error.toExponential(1)}`
    console.log(`  ${row.what.padEnd(44)} ${row.value.toPrecision(4).padStart(10)}  x${(row.value / first).toFixed(2).padStart(6)}  ${(row.rate ?? '').padEnd(16)} ${error}`)
  }
}

/** What a figure was measured on; goes into every JSON file. */
export function machine(device: string): Record<string, unknown> {
  const { version, backends } = capabilities()
  return {
    date: new Date().toISOString(),
    couplet: version,
    node: process.version,
    cpu: cpus()[0]?.model,
    cores: cpus().length,
    variant: backends.cpu.available ? backends.cpu.variant : null,
    ...(device !== 'cpu' && { [device]: addon().backendState(device) }),
  }
}

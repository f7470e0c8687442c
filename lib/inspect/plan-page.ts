import type { PlannedCache } from '../plan'
import { barChart } from './charts'
import { count, readableBytes, round } from './format'
import type { Section } from './page'
import { palette, renderPage } from './page'

/** What a plan was made for; see PlanOptions. */
export interface PlannedFor {
  name: string
  layers: number
  kvHeads: number
  headDim: number
  context: number
  sequences: number
  sinks: number
  window: number
  budget?: number | undefined
}

/**
 * A page of what `plan()` says: one HTML file that opens from disk. Needs the packages vega and vega-lite.
 *
 * @throws {CoupletError} `ERR_COUPLET_MISSING_PACKAGE` when they are not installed
 */
export function planPage(caches: readonly PlannedCache[], plannedFor: PlannedFor): Promise<string> {
  const { name, layers, kvHeads, headDim, context, sequences, sinks, window } = plannedFor
  return renderPage({
    title: `Memory of the KV cache: ${name}`,
    lead: `${layers} layers, ${kvHeads} kv heads of ${headDim} channels; ${count(sequences)} sequence${sequences === 1 ? '' : 's'} of ${count(context)} tokens, `
      + `${sinks} sinks and a window of ${window} in full precision.`,
    sections: [memorySection(caches, plannedFor), ...contextSections(caches, plannedFor)],
  })
}

const colors = { pageBytes: palette.key, rawBytes: palette.series[6]!, codebookBytes: palette.series[3]! } as const

/** Of couplet's caches, the one of fewest bits. */
const smallest = (caches: readonly PlannedCache[]): PlannedCache => caches.reduce((least, cache) => (cache.totalBytes < least.totalBytes ? cache : least))

function memorySection(caches: readonly PlannedCache[], { budget }: PlannedFor): Section {
  const least = smallest(caches)
  const most = Math.max(...caches.map(({ totalBytes }) => totalBytes))
  const { scale, unit } = unitOf(most)
  const parts = ['pageBytes', 'rawBytes', 'codebookBytes'] as const
  const first = caches[0]!
  const fits = budget === undefined ? [] : caches.filter(({ totalBytes }) => totalBytes <= budget)
  const isOnScale = budget !== undefined && budget <= 1.25 * most
  return {
    title: `${least.name} takes ${readableBytes(least.totalBytes)} where ${first.name} takes ${readableBytes(first.totalBytes)}: ${round(first.totalBytes / least.totalBytes)} times less`
      + `${budget === undefined ? '' : `; ${fits.length} of ${caches.length} fit ${readableBytes(budget)}`}`,
    legend: [
      { color: colors.pageBytes, label: 'codes, or all of another cache', mark: 'square' },
      { color: colors.rawBytes, label: 'tokens in full precision', mark: 'square' },
      { color: colors.codebookBytes, label: 'codebook, shared', mark: 'square' },
      ...(isOnScale ? [{ color: palette.ink, label: `budget, ${readableBytes(budget)}`, mark: 'dashed' as const }] : []),
    ],
    figures: [{
      description: 'Memory of each cache',
      spec: barChart({
        x: { title: `memory, ${unit}`, domain: [0, 1.3 * most / scale] }, // room for the labels
        bars: caches.map((cache) => (
          { name: cache.name, label: readableBytes(cache.totalBytes), parts: parts.map((part) => ({ value: cache[part] / scale, color: colors[part] })) }
        )),
        ...(isOnScale && { markX: budget / scale }),
      }),
    }],
    table: {
      head: ['', 'bits', 'codes', 'kept', 'codebook', 'total', ...(budget === undefined ? [] : ['longest context'])],
      rows: caches.map(({ name, bitsPerChannel, totalBytes, longestContext, ...cache }) => [
        name, bitsPerChannel.toFixed(2), ...parts.map((part) => readableBytes(cache[part])), readableBytes(totalBytes),
        ...(longestContext === undefined ? [] : [count(longestContext)]),
      ]),
    },
    notes: ['int8 and int4 have a float16 scale for 32 elements. Bits are of everything, per channel of a token; the codebook is there once.'],
  }
}

function contextSections(caches: readonly PlannedCache[], { budget, sequences }: PlannedFor): Section[] {
  if (budget === undefined) return []
  const reach = (cache: PlannedCache): number => cache.longestContext ?? 0
  const farthest = caches.reduce((most, cache) => (reach(cache) > reach(most) ? cache : most))
  const first = caches[0]!
  return [{
    title: `In ${readableBytes(budget)}, ${farthest.name} reaches ${count(reach(farthest))} tokens and ${first.name} ${count(reach(first))}`,
    figures: [{
      description: 'Longest context of each cache',
      spec: barChart({
        x: { title: `tokens${sequences === 1 ? '' : ` of each of ${count(sequences)} sequences`}`, domain: [0, 1.3 * Math.max(1, reach(farthest))], format: '~s' },
        bars: caches.map((cache) => ({ name: cache.name, label: count(reach(cache)), parts: [{ value: reach(cache), color: palette.key }] })),
      }),
    }],
    notes: ['The longest that every sequence can grow to, token by token, all alike; the codebook is in the budget. A model may have been trained for less.'],
  }]
}

function unitOf(bytes: number): { scale: number; unit: string } {
  const power = Math.max(0, Math.min(4, Math.floor(Math.log10(bytes) / 3)))
  return { scale: 1000 ** power, unit: ['B', 'kB', 'MB', 'GB', 'TB'][power]! }
}

import type { Line } from './charts'
import { barChart, lineChart, matrixChart } from './charts'
import { hotShare, rankSteps } from './coding'
import type { ChartSpec } from './draw'
import { entropyBins, mostGroups } from './entropy'
import { count, percent, round } from './format'
import type { Inspection, InspectedSide } from './inspect'
import type { AttentionMass } from './mass'
import type { Figure, LegendEntry, Section } from './page'
import { palette, renderPage } from './page'

type Side = 'key' | 'value'
const sides: readonly Side[] = ['key', 'value']
const plural = { key: 'keys', value: 'values' } as const
const sideLegend: readonly LegendEntry[] = sides.map((side) => ({ color: palette[side], label: plural[side] }))

/**
 * A page of an inspection: one HTML file that opens from disk. Needs the packages vega and vega-lite.
 *
 * @throws {CoupletError} `ERR_COUPLET_MISSING_PACKAGE` when they are not installed
 */
export function inspectionPage(inspection: Inspection, { name = 'a model' }: { name?: string } = {}): Promise<string> {
  const { shape, tokens, sampled, length } = inspection
  const codecs = inspection.layers[0]?.key.coding && ` Codebook: ${codecNames(inspection)}.`
  return renderPage({
    title: `What codes can save, and what they lose: ${name}`,
    lead: `${shape.layers} layers, ${shape.queryHeads} query heads, ${shape.kvHeads} kv heads of ${shape.headDim} channels. `
      + `${count(tokens)} tokens in chunks of ${length}${sampled < tokens ? `, a uniform sample of ${count(sampled)} of them` : ''}. Keys before rotary embedding.${codecs ?? ''}`,
    sections: [...entropySections(inspection), correlationSection(inspection), ...codingSections(inspection), attentionSection(inspection)],
  })
}

const codecNames = ({ layers }: Inspection): string =>
  sides.map((side) => `${[...new Set(layers.flatMap((layer) => layer[side].coding?.codec.split(', ') ?? []))].join(', ')} for ${plural[side]}`).join(', ')

/** Up to four layers, the first and the last among them. */
function someLayers(layers: number): number[] {
  const shown = Math.min(4, layers)
  return [...new Set(Array.from({ length: shown }, (_, i) => Math.round((i * (layers - 1)) / Math.max(1, shown - 1))))]
}

/** A line for keys and one for values, with a point for each layer. */
const bySide = (layers: number, value: (layer: number, side: Side) => number): Line[] => sides.map((side) => ({
  color: palette[side], dots: layers <= 40 ? 'circle' : undefined,
  points: Array.from({ length: layers }, (_, layer) => [layer, value(layer, side)] as const),
}))

/** Light for the first layer, strong for the last. */
const depths = palette.sequential.slice(2)
const depth = (layer: number, layers: number): string => depths[Math.round((layer / Math.max(1, layers - 1)) * (depths.length - 1))]!

const mean = (values: readonly number[]): number => values.reduce((a, b) => a + b, 0) / values.length

function entropySections({ layers, sampled }: Inspection): Section[] {
  const coupled = (side: InspectedSide) => side.entropy.at(-1)!
  const knows = (side: InspectedSide) => coupled(side).independent - coupled(side).joint
  const of = (side: Side, name: 'joint' | 'independent') => mean(layers.map((layer) => coupled(layer[side])[name])).toFixed(1)
  const { channels } = coupled(layers[0]!.key)
  const most = Math.max(...layers.flatMap((layer) => sides.map((side) => coupled(layer[side]).marginal)))
  const curves = someLayers(layers.length).map((number): Figure => {
    const layer = layers[number]!
    const points = (side: Side, name: 'joint' | 'marginal' | 'independent') =>
      layer[side].entropy.map((entropy) => [entropy.channels, entropy[name]] as const)
    return {
      width: 'half',
      title: `layer ${number}`,
      description: `Entropy of 1 to ${channels} channels of layer ${number}`,
      spec: lineChart({
        width: 150, height: 130,
        x: { title: 'channels', values: layer.key.entropy.map((entropy) => entropy.channels), domain: [0.8, channels + 0.2], format: 'd' },
        y: { title: 'bits', domain: [0, Math.ceil(most)] },
        lines: [
          ...sides.map((side) => ({ color: palette[side], dashed: true, points: points(side, 'marginal') })),
          ...sides.map((side) => ({ color: palette[side], dots: 'circle' as const, noLine: true, points: points(side, 'independent') })),
          ...sides.map((side) => ({ color: palette[side], dots: 'circle' as const, points: points(side, 'joint') })),
        ],
      }),
    }
  })
  const overview: Figure = {
    description: 'Bits that four channels have in common, by layer',
    spec: lineChart({
      x: { title: 'layer', format: 'd', domain: [0, Math.max(1, layers.length - 1)], values: someLayers(layers.length) },
      y: { title: 'bits in common' },
      lines: bySide(layers.length, (layer, side) => knows(layers[layer]![side])),
    }),
  }
  const gain = peak(layers.map((layer) => ({ key: knows(layer.key), value: knows(layer.value) })))
  return [{
    title: `Together, ${channels} neighbouring channels of keys hold ${of('key', 'joint')} bits where independent ones would hold ${of('key', 'independent')}; `
      + `of values, ${of('value', 'joint')} and ${of('value', 'independent')}`,
    legend: [
      ...sideLegend,
      { color: palette.muted, label: 'joint entropy', mark: 'line' },
      { color: palette.muted, label: 'sum of the channels’ own', mark: 'dashed' },
      { color: palette.muted, label: 'rings: the joint estimate, were they independent' },
    ],
    figures: curves,
    notes: [
      'The flatter the solid line, the more one code for several channels saves over a code for each. It is why channels are coupled.',
      `Each channel is cut into ${entropyBins} equal bins between its least and greatest value; entropies are of the counts of ${count(sampled)} tokens, `
      + `with Miller and Madow’s correction, a mean over up to ${mostGroups} groups of neighbours. With few tokens a joint estimate is too low (it cannot exceed `
      + `${Math.log2(sampled).toFixed(1)} bits by much): the rings are what the same estimator says of the same values with every channel’s tokens in an `
      + 'order of its own, so what lies between ring and solid line is dependence, and what lies between ring and dashed line is bias.',
    ],
  }, {
    title: `Coupling has most to gain in the ${plural[gain.side]} of layer ${gain.layer}: `
      + `${gain.value.toFixed(1)} of ${coupled(layers[gain.layer]![gain.side]).independent.toFixed(1)} bits of ${channels} channels are common`,
    legend: sideLegend,
    figures: [overview],
    notes: [`Ring less solid line at ${channels} channels, for every layer: the bits that a code for ${channels} channels need not spend.`],
  }]
}

/** Shares by layer and kv head, [layers][kvHeads]; the strongest colour stands for `most`. */
function headMap(shares: readonly (readonly number[])[], most: number): ChartSpec {
  const columns = shares[0]!.length
  const last = palette.sequential.length - 1
  return matrixChart({
    rows: shares.length, columns, colors: palette.sequential, rowTitle: 'layer', columnTitle: 'kv head',
    classes: shares.flat().map((share) => (most > 0 ? Math.round(share / most * last) : 0)),
    ...(columns <= 8 && { labels: shares.flat().map((share) => percent(share, most < 0.1 ? 1 : 0)) }),
    cell: { width: Math.min(64, 280 / columns), height: Math.max(8, Math.min(22, 400 / shares.length)) },
  })
}

function outputSection({ layers }: AttentionMass, { sinks, window }: { sinks: number; window: number }): Section[] {
  const errors = layers.map(({ outputErrors }) => outputErrors ?? [])
  const most = Math.max(...errors.flat())
  const layer = errors.findIndex((heads) => heads.includes(most))
  if (layer < 0) return []
  return [{
    title: `Codes change the attention of layer ${layer}, kv head ${errors[layer]!.indexOf(most)} most: by ${percent(most, 1)} of its square`,
    ramp: { colors: palette.sequential, from: '0 %', to: percent(most, 1) },
    figures: [{ description: 'Change of attention outputs by layer and kv head', spec: headMap(errors, most) }],
    notes: [`Squared difference of attention outputs on codes from exact ones, over the square of the exact ones, with ${sinks} sinks and a window of ${window} exact: what is left of the `
      + 'errors above where attention looks. Each layer is given what full precision gives it, so errors of layers before it are not in its figure.'],
  }]
}

/** Where a figure is largest. */
function peak(values: readonly Record<Side, number>[]): { layer: number; side: Side; value: number } {
  const all = values.flatMap((layer, number) => sides.map((side) => ({ layer: number, side, value: layer[side] })))
  return all.reduce((best, one) => (one.value > best.value ? one : best))
}

function correlationSection({ layers }: Inspection): Section {
  const { layer, side, value } = peak(layers.map(({ key, value: values }) => ({ key: key.correlation.meanAbsolute, value: values.correlation.meanAbsolute })))
  const { channels } = layers[0]!.key.correlation
  const last = palette.diverging.length - 1
  const classOf = (r: number): number => Math.round((r + 1) / 2 * last)
  const figures = someLayers(layers.length).flatMap((number) => sides.map((of): Figure => {
    const { r, meanAbsolute } = layers[number]![of].correlation
    return {
      width: 'half',
      title: `layer ${number}, ${plural[of]}: ${meanAbsolute.toFixed(2)}`,
      description: `Correlation of the first ${channels} channels of ${plural[of]} in layer ${number}, |r| ${meanAbsolute.toFixed(2)} on average`,
      spec: matrixChart({
        rows: channels, columns: channels, classes: r.map(classOf), colors: palette.diverging,
        rowTitle: 'channel', columnTitle: 'channel', cell: { width: 150 / channels, height: 150 / channels },
      }),
    }
  }))
  return {
    title: `Channels correlate most in the ${plural[side]} of layer ${layer}: |r| is ${value.toFixed(2)} on average`,
    ramp: { colors: palette.diverging, from: 'r = −1', to: '1' },
    figures,
    notes: [`Pearson’s r of every two of the first ${channels} channels of kv head 0; above each map the mean of |r| off the diagonal. Blocks along the `
      + 'diagonal are neighbours that one code serves well. Codes also use dependence that is not linear, which these maps do not show.'],
  }
}

function codingSections({ layers, sampled, attention, sinks, window }: Inspection): Section[] {
  const coded = layers.map(({ key, value }) => key.coding && value.coding && { key: key.coding, value: value.coding })
  if (!coded.every((layer) => layer !== undefined)) {
    return [{ title: 'Errors and code usage: give a codebook', notes: ['couplet inspect --codebooks FILE adds what its codes lose and which are used.'] }]
  }
  const worst = peak(coded.map(({ key, value }) => ({ key: Math.max(...key.headErrors), value: Math.max(...value.headErrors) })))
  const worstHead = coded[worst.layer]![worst.side].headErrors.indexOf(worst.value)
  const errors = sides.map((side): Figure => ({
    title: plural[side],
    description: `Share of variance lost by layer and kv head, ${plural[side]}`,
    spec: headMap(coded.map((layer) => layer[side].headErrors), worst.value),
  }))
  const ranks = sides.map((side): Figure => ({
    title: plural[side],
    description: `Share of tokens that the most used centroids code, ${plural[side]}`,
    spec: lineChart({
      x: { title: 'centroids, most used first', domain: [0, 1], format: '.0%' },
      y: { title: 'tokens', domain: [0, 1], format: '.0%' },
      lines: [
        { color: palette.muted, dashed: true, points: [[0, 0], [1, 1]] },
        ...coded.map((layer, number) => (
          { color: depth(number, layers.length), points: layer[side].usage.byRank.map((share, step) => [step / rankSteps, share] as const) }
        )),
      ],
    }),
  }))
  const shares = (['dead', 'hot'] as const).map((name): Figure => ({
    title: `${name} centroids`,
    description: `Share of centroids that are ${name}, by layer`,
    spec: lineChart({
      height: 120,
      x: { title: 'layer', format: 'd', domain: [0, Math.max(1, layers.length - 1)], values: someLayers(layers.length) },
      y: { title: 'of all centroids', format: '.0%' },
      lines: bySide(layers.length, (layer, side) => coded[layer]![side].usage[name]),
    }),
  }))
  const usages = coded.flatMap((layer) => sides.map((side) => layer[side].usage))
  const meanUsage = (name: 'codeBits' | 'usedBits' | 'dead' | 'hot') => mean(usages.map((usage) => usage[name]))
  const rows = coded.flatMap((layer, number) => sides.map((side) => {
    const { headErrors, usage } = layer[side]
    return [
      `layer ${number}, ${plural[side]}`, layer[side].codec, percent(mean(headErrors), 1), `${usage.usedBits.toFixed(2)} of ${round(usage.codeBits)}`,
      ...[usage.dead, usage.hot, usage.hottest].map((share) => percent(share, 1)),
    ]
  }))
  return [{
    title: `Codes lose most in the ${plural[worst.side]} of layer ${worst.layer}, kv head ${worstHead}: ${percent(worst.value)} of their variance`,
    ramp: { colors: palette.sequential, from: '0 %', to: percent(worst.value) },
    figures: errors,
    notes: ['Squared distance between rows and what their codes stand for, over the squared distance from the mean, on this text. What a model makes of '
      + 'such an error is another question: weighted codebooks accept more of it where it matters less, and perplexity (couplet eval) has the last word.'],
  }, ...outputSection(attention, { sinks, window }), {
    title: `Codes carry ${meanUsage('usedBits').toFixed(1)} of ${round(meanUsage('codeBits'))} bits on average; `
      + `${percent(meanUsage('dead'))} of centroids are dead, ${percent(meanUsage('hot'))} hot`,
    legend: [{ color: palette.muted, label: 'all used alike', mark: 'dashed' }],
    ramp: { colors: depths, from: 'first layer', to: 'last layer' },
    figures: ranks,
    notes: ['A curve that rises at once belongs to a layer where few centroids do most of the work, and where fewer bits would do.'],
  }, {
    title: usageTitle(coded),
    legend: sideLegend,
    figures: shares,
    table: { folded: 'All layers in numbers', head: ['', 'codec', 'variance lost', 'bits used', 'dead', 'hot', 'hottest'], rows },
    notes: [`Dead: no token of the sample has this code. Hot: more than ${hotShare} times its even share of tokens. Hottest: the largest share that one `
      + `centroid has. The sample has ${count(sampled)} tokens for ${count(Math.round(2 ** Math.max(...usages.map(({ codeBits }) => codeBits))))} centroids a group; a centroid that is dead `
      + 'on this text may be one that another text needs, above all in first layers, whose keys and values say little but which token it is.'],
  }]
}

function usageTitle(coded: readonly Record<Side, { usage: { dead: number } }>[]): string {
  const { layer, side, value } = peak(coded.map(({ key, value: values }) => ({ key: key.usage.dead, value: values.usage.dead })))
  return value === 0 ? 'Every centroid is used' : `Most dead centroids: the ${plural[side]} of layer ${layer}, ${percent(value)}`
}

function attentionSection({ attention: { windows, layers }, sinks, window, attentionChunks, length, tokens }: Inspection): Section {
  const codes = layers.map(({ shares }) => shares.codes)
  const most = codes.indexOf(Math.max(...codes))
  const colors = { codes: palette.series[3]!, window: palette.series[2]!, sinks: palette.series[6]! }
  const names = ['codes', 'window', 'sinks'] as const
  const bars = layers.map(({ shares }, layer) => ({
    name: `${layer}`, label: percent(shares.codes), parts: names.map((name) => ({ value: shares[name], color: colors[name] })),
  }))
  const counted = windows.filter((size) => size > 0)
  return {
    title: `With ${sinks} sinks and a window of ${window}, ${percent(mean(codes))} of attention falls on codes; `
      + `most in layer ${most}: ${percent(codes[most]!)}`,
    legend: names.map((name) => ({ color: colors[name], label: name, mark: 'square' as const })),
    figures: [{
      title: 'where it falls, by layer',
      description: 'Share of attention on codes, window and sinks, by layer',
      spec: barChart({ x: { title: 'share of attention; at the end, that on codes', domain: [0, 1], format: '.0%' }, bars, nameTitle: 'layer' }),
    }, {
      title: 'what another window would leave',
      description: 'Share of attention left to codes, by the size of the window; a line for each layer',
      spec: lineChart({
        x: { title: 'window, tokens (log)', log: true, domain: [1, counted.at(-1)!], values: counted.filter((size) => Math.log2(size) % 2 === 0), format: 'd' },
        y: { title: 'left to codes', format: '.0%', domain: [0, 1] },
        markX: Math.max(1, window),
        lines: layers.map(({ beyond }, layer) => (
          { color: depth(layer, layers.length), points: counted.map((size) => [size, beyond[windows.indexOf(size)]!] as const) }
        )),
      }),
    }],
    table: {
      folded: 'Every head in numbers', head: ['', 'codes', 'window', 'sinks'],
      rows: layers.flatMap(({ heads }, layer) => heads.map((head, number) => (
        [`layer ${layer}, kv head ${number}`, ...names.map((name) => percent(head[name], 1))]
      ))),
    },
    notes: [
      'Attention of the model in full precision. What falls on sinks and window is read exactly; errors of codes enter in proportion to the rest. '
      + 'The lines (faint: first layers, strong: last) say what another window would leave to codes.',
      `Queries in the second half of ${attentionChunks} chunk${attentionChunks === 1 ? '' : 's'} of ${Math.min(length, tokens)} tokens, a mean over heads. `
      + 'In longer texts more lies beyond any window.',
    ],
  }
}

/**
 * VidKV (arXiv 2503.16257), made for the visual tokens of video models: keys and values by channel, a scale for each channel of a
 * group of consecutive tokens.
 *
 * Keys, "1.5 bit": the half of a head's channels with the widest range takes integers of 2 bits between minimum and maximum; of the
 * others the discrete Fourier transform over the group is kept as signs, one for each real and imaginary part, times the mean
 * magnitude of the real and of the imaginary parts. Values, "1.58 bit": -1, 0 or 1 times the mean magnitude, 0 where an element is
 * below half of that; or integers of 2 bits. Bits a group of g tokens: channels of 2 bits 2 + 32 / g, of signs 1 + 32 / g, of three
 * levels 1.6 (five in a byte) + 16 / g; 1 / g for the map of channels. Their code has g = 32. Keys after rotary embedding.
 * Not measured: keeping tokens that matter semantically.
 */
import { channelRun, half, halfBits, type Method, pieces, range, type Rows, type Run, toIntegers } from './method'

export function vidkv(values: 1.58 | 2, groupTokens: number): Method {
  return {
    name: `vidkv-1.5/${values}-g${groupTokens}`, width: 1.5, file: 'vidkv.ts', rotated: true, ...(groupTokens !== 32 && { extended: true }),
    fit: () => Promise.resolve({
      tableBytes: 0,
      quantize: (rows, { side }) => {
        let bits = 0
        for (let head = 0; head < rows.heads; head++) {
          for (const { start, count } of pieces(rows.tokens, groupTokens)) {
            const runs = Array.from({ length: rows.channels }, (_, channel) => channelRun(rows, head, channel, start, count))
            bits += side === 'key' ? quantizeKeys(rows, runs) : quantizeValues(rows, runs, values)
          }
        }
        return bits
      },
    }),
  }
}

function quantizeKeys({ data }: Rows, runs: Run[]): number {
  const ranges = runs.map((run) => range(data, run))
  const widest = runs.map((_, channel) => channel).sort((a, b) => width(ranges[b]!) - width(ranges[a]!))
  let bits = runs.length
  for (const [rank, channel] of widest.entries()) {
    const run = runs[channel]!
    if (rank < runs.length / 2) {
      toIntegers(data, run, 2, ranges[channel]!)
      bits += 2 * run.count + 2 * halfBits
    } else {
      fourierSigns(data, run)
      bits += run.count + 2 * halfBits
    }
  }
  return bits
}

function quantizeValues({ data }: Rows, runs: Run[], values: 1.58 | 2): number {
  let bits = 0
  for (const run of runs) {
    if (values === 2) toIntegers(data, run, 2, range(data, run))
    else threeLevels(data, run)
    bits += values === 2 ? 2 * run.count + 2 * halfBits : 8 * Math.ceil(run.count / 5) + halfBits
  }
  return bits
}

const width = ([low, high]: readonly [number, number]): number => high - low

export function threeLevels(data: Float32Array, { first, step, count }: Run): void {
  let sum = 0
  for (let i = 0; i < count; i++) sum += Math.abs(data[first + i * step]!)
  const scale = half(sum / count)
  for (let i = 0; i < count; i++) {
    const value = data[first + i * step]!
    data[first + i * step] = Math.abs(value) <= scale / 2 ? 0 : Math.sign(value) * scale
  }
}

/**
 * count real numbers have count independent parts: real ones of frequencies 0 .. floor(count / 2), imaginary ones of those between,
 * frequencies 0 and count / 2 being real.
 */
export function fourierSigns(data: Float32Array, { first, step, count }: Run): void {
  const { waves, isImaginary, weights } = fourierBasis(count)
  const parts = new Float64Array(count)
  const sums = [0, 0]
  const counts = [0, 0]
  for (let part = 0; part < count; part++) {
    let sum = 0
    for (let i = 0; i < count; i++) sum += waves[part * count + i]! * data[first + i * step]!
    parts[part] = sum
    sums[isImaginary[part]!]! += Math.abs(sum)
    counts[isImaginary[part]!]! += 1
  }
  const scales = [half(sums[0]! / counts[0]!), half(sums[1]! / Math.max(1, counts[1]!))]
  const out = new Float64Array(count)
  for (let part = 0; part < count; part++) {
    const amplitude = weights[part]! * scales[isImaginary[part]!]! * (parts[part]! >= 0 ? 1 : -1)
    for (let i = 0; i < count; i++) out[i]! += amplitude * waves[part * count + i]!
  }
  for (let i = 0; i < count; i++) data[first + i * step] = out[i]!
}

interface Basis {
  /** [part][element] */
  waves: Float64Array
  /** 1 for an imaginary part. */
  isImaginary: Uint8Array
  /** Times these the transposed waves are the inverse. */
  weights: Float64Array
}
const bases = new Map<number, Basis>()

function fourierBasis(count: number): Basis {
  const known = bases.get(count)
  if (known) return known
  const basis = { waves: new Float64Array(count * count), isImaginary: new Uint8Array(count), weights: new Float64Array(count) }
  let part = 0
  const add = (frequency: number, imaginary: boolean, weight: number) => {
    for (let i = 0; i < count; i++) {
      const angle = 2 * Math.PI * ((frequency * i) % count) / count
      basis.waves[part * count + i] = imaginary ? -Math.sin(angle) : Math.cos(angle)
    }
    basis.isImaginary[part] = imaginary ? 1 : 0
    basis.weights[part++] = weight
  }
  for (let frequency = 0; frequency <= count / 2; frequency++) {
    const isReal = frequency === 0 || 2 * frequency === count
    add(frequency, false, (isReal ? 1 : 2) / count)
    if (!isReal) add(frequency, true, 2 / count)
  }
  bases.set(count, basis)
  return basis
}

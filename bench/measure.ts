/** CPU time of this process, all its threads, user and system, in seconds. */
function cpuSeconds(): number {
  const { user, system } = process.cpuUsage()
  return (user + system) / 1e6
}

export interface Timing {
  /** Median CPU seconds of a call. */
  cpu: number
  /** Median wall seconds of a call. */
  wall: number
  /** Lowest and highest CPU seconds. */
  spread: [number, number]
  repeats: number
}

/** Runs `call` twice to warm up, then until `repeats` runs and `least` CPU seconds are done; medians. */
export async function measure(call: () => unknown, { repeats = 7, least = 0.5 } = {}): Promise<Timing> {
  for (let i = 0; i < 2; i++) await call()
  const cpu: number[] = []
  const wall: number[] = []
  let spent = 0
  while (cpu.length < repeats || (spent < least && cpu.length < 200)) {
    const cpuStart = cpuSeconds()
    const wallStart = performance.now()
    await call()
    wall.push((performance.now() - wallStart) / 1000)
    cpu.push(cpuSeconds() - cpuStart)
    spent += cpu.at(-1) ?? 0
  }
  return { cpu: median(cpu), wall: median(wall), spread: [Math.min(...cpu), Math.max(...cpu)], repeats: cpu.length }
}

/** Median wall seconds of a call, of `batches` batches that each end when the device is done. */
export function measureWall(call: () => void, wait: () => void, { batches = 7, calls = 1 } = {}): { seconds: number; repeats: number } {
  call()
  wait()
  const seconds: number[] = []
  for (let batch = 0; batch < batches; batch++) {
    const begin = performance.now()
    for (let index = 0; index < calls; index++) call()
    wait()
    seconds.push((performance.now() - begin) / 1000 / calls)
  }
  return { seconds: median(seconds), repeats: batches * calls }
}

export function median(values: readonly number[]): number {
  const sorted = [...values].sort((a, b) => a - b)
  const half = sorted.length >> 1
  return sorted.length % 2 ? sorted[half] as number : ((sorted[half - 1] as number) + (sorted[half] as number)) / 2
}

/** Seeded standard normal numbers (Box and Muller over a 32-bit mixing generator). */
export function normals(count: number, seed: number): Float32Array {
  let state = seed >>> 0
  const uniform = () => {
    state = (state + 0x9e3779b9) >>> 0
    let mixed = Math.imul(state ^ (state >>> 16), 0x21f0aaad)
    mixed = Math.imul(mixed ^ (mixed >>> 15), 0x735a2d97)
    return (((mixed ^ (mixed >>> 15)) >>> 0) + 0.5) / 4294967296
  }
  const out = new Float32Array(count)
  for (let i = 0; i < count; i += 2) {
    const radius = Math.sqrt(-2 * Math.log(uniform()))
    const angle = 2 * Math.PI * uniform()
    out[i] = radius * Math.cos(angle)
    if (i + 1 < count) out[i + 1] = radius * Math.sin(angle)
  }
  return out
}

/** |actual - expected| / |expected|, Euclidean norms. */
export function relativeError(actual: ArrayLike<number>, expected: ArrayLike<number>): number {
  let difference = 0
  let norm = 0
  for (let i = 0; i < expected.length; i++) {
    difference += ((actual[i] as number) - (expected[i] as number)) ** 2
    norm += (expected[i] as number) ** 2
  }
  return Math.sqrt(difference / norm)
}

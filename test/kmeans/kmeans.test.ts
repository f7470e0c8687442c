import assert from 'node:assert/strict'

import fc from 'fast-check'

import type { KmeansSyncOptions } from '../../lib'
import { describeOn, operationsOn } from '../device/devices'
import type { Problem } from './reference'
import { evaluate, means, kmeans as reference } from './reference'

/** Uniform numbers from a seed (SplitMix32). */
function random(seed: number): () => number {
  let state = seed >>> 0
  return () => {
    state = (state + 0x9e3779b9) >>> 0
    let z = state
    z = Math.imul(z ^ (z >>> 16), 0x85ebca6b)
    z = Math.imul(z ^ (z >>> 13), 0xc2b2ae35)
    return ((z ^ (z >>> 16)) >>> 0) / 2 ** 32
  }
}

function normal(next: () => number): number {
  return Math.sqrt(-2 * Math.log(1 - next())) * Math.cos(2 * Math.PI * next())
}

function normals(length: number, seed: number): Float32Array {
  const next = random(seed)
  return Float32Array.from({ length }, () => normal(next))
}

type Shape = Pick<KmeansSyncOptions, 'problems' | 'points' | 'channels' | 'centroids'>

/** Problem `index` of a contiguous batch; `weights` [problems][points], or none for all 1. */
function problemOf(batch: Float32Array, { points, channels }: Shape, index: number, weights?: Float32Array): Problem {
  const own = weights?.subarray(index * points, (index + 1) * points)
  return {
    points: batch.subarray(index * points * channels, (index + 1) * points * channels),
    channels,
    weights: own?.some((weight) => weight > 0) ? own : new Float32Array(points).fill(1), // where no point counts, all count alike
  }
}

const shapes = fc.record({
  problems: fc.integer({ min: 1, max: 4 }),
  points: fc.integer({ min: 1, max: 200 }),
  channels: fc.constantFrom(1, 2, 3, 4, 8, 16, 17, 32),
  centroids: fc.constantFrom(1, 2, 3, 8, 16, 33, 64),
})

describeOn('all', 'kmeans', (device) => {
  const { kmeans, kmeansSync } = operationsOn(device)

  it('returns what it says: nearest centroids, their inertia, weighted means', () => {
    fc.assert(
      fc.property(shapes, fc.nat(), fc.boolean(), (shape, seed, weighted) => {
        const { problems, points, channels, centroids } = shape
        const batch = normals(problems * points * channels, seed)
        const next = random(seed + 1)
        const weights = weighted ? Float32Array.from({ length: problems * points }, () => (next() < 0.1 ? 0 : next() * 3)) : undefined
        const result = kmeansSync(batch, { ...shape, weights, seed, tolerance: 0, iterations: 1000, assignments: true })
        for (let index = 0; index < problems; index++) {
          const problem = problemOf(batch, shape, index, weights)
          const found = result.centroids.subarray(index * centroids * channels, (index + 1) * centroids * channels)
          assert.ok(found.every(Number.isFinite))
          const { inertia, nearest } = evaluate(problem, found)
          const scale = problem.points.reduce((sum, value, at) => sum + value * value * (problem.weights[Math.floor(at / channels)] ?? 0), 0)
          assert.ok(Math.abs((result.inertia[index] ?? NaN) - inertia) <= 1e-5 * (inertia + scale), `inertia ${result.inertia[index]} is not ${inertia}`)
          const assigned = Array.from(result.assignments?.subarray(index * points, (index + 1) * points) ?? [])
          const wrong = assigned.filter((centroid, point) => centroid !== nearest[point] && !tie(problem, found, point, centroid, nearest[point] ?? -1))
          assert.deepEqual(wrong, [])
          // Nothing moves any more, so every centroid is the mean of its points, but for points that are a tie between two.
          const off = means(problem, assigned, found).map((mean, at) => Math.abs(mean - (found[at] ?? NaN)))
          assert.ok(Math.max(...off) < Math.sqrt(tieDistance), `a centroid is ${Math.max(...off)} off its mean`)
        }
      }),
      { numRuns: device === 'cpu' ? 60 : 12 },
    )
  })

  const tieDistance = 1e-5
  /** Whether float32 arithmetic can hardly tell the two centroids apart. */
  function tie({ points, channels }: Problem, centroids: Float32Array, point: number, a: number, b: number): boolean {
    const row = { points: points.subarray(point * channels, (point + 1) * channels), channels, weights: [1] }
    const distance = (centroid: number): number => evaluate(row, centroids.subarray(centroid * channels, (centroid + 1) * channels)).inertia
    return Math.abs(distance(a) - distance(b)) <= tieDistance * (1 + distance(b))
  }

  it('is about as good as the reference', () => {
    const shape = { problems: 8, points: 400, channels: 4, centroids: 16 }
    const batch = normals(shape.problems * shape.points * shape.channels, 3)
    const { inertia } = kmeansSync(batch, { ...shape, seed: 1 })
    const ours = inertia.reduce((sum, value) => sum + value, 0)
    const next = random(9)
    const theirs = Array.from(inertia).reduce((sum, _, index) => sum + reference(problemOf(batch, shape, index), shape.centroids, next), 0)
    assert.ok(ours < theirs * 1.05, `inertia ${ours}, reference ${theirs}`)
  })

  it('lets weights pull', () => {
    // Two lumps and one centroid: the weighted mean.
    const points = Float32Array.of(0, 0, 0, 10)
    const { centroids, inertia } = kmeansSync(points, { problems: 1, points: 4, channels: 1, centroids: 1, weights: Float32Array.of(1, 1, 1, 6) })
    assert.ok(Math.abs((centroids[0] ?? NaN) - 60 / 9) < 1e-5)
    assert.ok(Math.abs((inertia[0] ?? NaN) - (3 * (60 / 9) ** 2 + 6 * (10 - 60 / 9) ** 2)) < 1e-3)
  })

  it('gives the same bits in both forms, for any number of threads, and other ones for another seed', async () => {
    const shape = { problems: 5, points: device === 'cpu' ? 3000 : 200, channels: 8, centroids: device === 'cpu' ? 64 : 16 }
    const batch = normals(shape.problems * shape.points * shape.channels, 4)
    const once = kmeansSync(batch, { ...shape, seed: 7, threads: 1, iterations: 12, assignments: true })
    for (const threads of [0, 2, 3, 7]) assert.deepEqual(await kmeans(batch, { ...shape, seed: 7, threads, iterations: 12, assignments: true }), once)
    assert.deepEqual(kmeansSync(batch, { ...shape, seed: 7n, iterations: 12, assignments: true }), once)
    assert.deepEqual(kmeansSync(batch, { ...shape, seed: 2n ** 64n + 7n, iterations: 12, assignments: true }), once)
    assert.notDeepEqual(kmeansSync(batch, { ...shape, seed: 2n ** 63n + 7n, iterations: 12 }).centroids, once.centroids)
    assert.ok(!('assignments' in kmeansSync(batch, { ...shape, iterations: 1 })))
  })

  it('reads any strides, and weights that problems share', () => {
    const shape = { problems: 6, points: 50, channels: 4, centroids: 8 }
    const { problems, points, channels } = shape
    const batch = normals(problems * points * channels, 5)
    const weights = Float32Array.from({ length: 2 * points }, (_, index) => 1 + (index % 5)) // of problems 0 to 2 and 3 to 5
    const spread = new Float32Array(points * (problems * channels + 1)).fill(NaN) // [points][problems][channels], and a gap
    const pointStride = problems * channels + 1
    for (let problem = 0; problem < problems; problem++)
      for (let point = 0; point < points; point++)
        spread.set(batch.subarray((problem * points + point) * channels).subarray(0, channels), point * pointStride + problem * channels)
    const full = Float32Array.from({ length: problems * points }, (_, index) => weights[Math.floor(index / points / 3) * points + (index % points)] ?? NaN)
    const plain = kmeansSync(batch, { ...shape, weights: full })
    assert.deepEqual(kmeansSync(batch, { ...shape, weights, layout: { weightSharing: 3 } }), plain)
    assert.deepEqual(kmeansSync(spread, { ...shape, weights, layout: { problemStride: channels, pointStride, weightSharing: 3 } }), plain)
    const turned = Float32Array.from({ length: 2 * points }, (_, index) => weights[(index % 2) * points + (index >> 1)] ?? NaN) // [points][2]
    assert.deepEqual(kmeansSync(batch, { ...shape, weights: turned, layout: { weightProblemStride: 1, weightPointStride: 2, weightSharing: 3 } }), plain)
  })

  it('takes one row of weights for all problems', () => {
    const shape = { problems: 3, points: 40, channels: 2, centroids: 4 }
    const batch = normals(240, 6)
    const row = Float32Array.from({ length: 40 }, (_, index) => index % 3)
    const rows = Float32Array.from({ length: 120 }, (_, index) => row[index % 40] ?? NaN)
    assert.deepEqual(kmeansSync(batch, { ...shape, weights: row }), kmeansSync(batch, { ...shape, weights: rows }))
  })

  it('writes centroids into memory of the caller, and reads shared memory', async () => {
    const shape = { problems: 2, points: 100, channels: 4, centroids: 8 }
    const shared = new Float32Array(new SharedArrayBuffer(4 * 800))
    shared.set(normals(800, 7))
    const out = new Float32Array(64)
    const { centroids } = await kmeans(shared, { ...shape, out })
    assert.equal(centroids, out)
    assert.deepEqual(out, kmeansSync(shared.slice(), shape).centroids)
  })

  describe('on shapes of data', () => {
    const shape = { problems: 1, points: 64, channels: 2, centroids: 8, tolerance: 0, iterations: 100 }

    it('all points equal', () => {
      const { centroids, inertia } = kmeansSync(new Float32Array(128).fill(1.5), shape)
      assert.deepEqual([inertia[0], centroids[0]], [0, 1.5])
      assert.ok(centroids.every(Number.isFinite))
    })

    it('as many plateaus as centroids: no error', () => {
      const plateaus = Float32Array.from({ length: 128 }, (_, index) => (index >> 1) % 8)
      assert.equal(kmeansSync(plateaus, shape).inertia[0], 0)
    })

    it('a ramp: equal parts', () => {
      const ramp = Float32Array.from({ length: 64 }, (_, index) => index)
      const { inertia } = kmeansSync(ramp, { ...shape, channels: 1, centroids: 2 })
      assert.equal(inertia[0], 2 * 2728) // twice the sum of (i - 15.5)^2 over 32 points
    })

    it('fewer points than centroids: each point its own', () => {
      const few = normals(10, 8)
      const { centroids, inertia } = kmeansSync(few, { ...shape, points: 5 })
      assert.equal(inertia[0], 0)
      assert.ok(centroids.every(Number.isFinite))
    })

    it('zero weights: points that do not count', () => {
      const points = Float32Array.of(0, 1, 100, 101)
      const { centroids } = kmeansSync(points, { ...shape, points: 4, channels: 1, centroids: 1, weights: Float32Array.of(1, 1, 0, 0) })
      assert.deepEqual([...centroids], [0.5])
      // Where no point counts, all count alike.
      const two = { ...shape, points: 4, channels: 1, centroids: 2 }
      assert.deepEqual(kmeansSync(points, { ...two, weights: new Float32Array(4) }), kmeansSync(points, two))
    })

    it('no iterations: the seeds', () => {
      const points = normals(128, 9)
      const { centroids, iterations } = kmeansSync(points, { ...shape, iterations: 0 })
      assert.equal(iterations[0], 0)
      const pairs = (values: Float32Array): string[] => Array.from({ length: values.length / 2 }, (_, at) => values.subarray(2 * at, 2 * at + 2).join())
      assert.deepEqual(pairs(centroids).filter((seed) => !pairs(points).includes(seed)), [])
    })
  })

  describe('refuses', () => {
    const shape = { problems: 2, points: 30, channels: 4, centroids: 8 }
    const batch = normals(240, 10)
    const bad = (at: number, value: number): Float32Array => batch.map((old, index) => (index === at ? value : old))

    it('a NaN or an infinity, and says where', async () => {
      const notFinite = { name: 'RangeError', code: 'ERR_COUPLET_NOT_FINITE' }
      assert.throws(() => kmeansSync(bad(120 + 4 * 17 + 3, NaN), shape), { ...notFinite, problem: 1, point: 17, channel: 3 })
      await assert.rejects(kmeans(bad(5, Infinity), shape), { ...notFinite, problem: 0, point: 1, channel: 1 })
      const weights = new Float32Array(60).fill(1)
      weights[35] = NaN
      assert.throws(() => kmeansSync(batch, { ...shape, weights }), { ...notFinite, problem: 1, point: 5 })
      weights[35] = -1
      assert.throws(() => kmeansSync(batch, { ...shape, weights }), { name: 'RangeError', code: 'ERR_COUPLET_INVALID_ARGUMENT', message: /`weights`/ })
    })

    const cases: [string, unknown, object, object][] = [
      ['no points', undefined, {}, { name: 'TypeError', message: 'Expected a Float32Array for `points` but received undefined' }],
      ['doubles', new Float64Array(240), {}, { name: 'TypeError', message: /`points` but received a Float64Array of 240 elements/ }],
      ['too few points', batch.subarray(1), {}, { name: 'RangeError', message: /240 or more elements for `points` but received a Float32Array of 239/ }],
      ['no problems', batch, { problems: 0 }, { name: 'RangeError', message: /`problems` but received 0/ }],
      ['no points to count', batch, { points: 0 }, { name: 'RangeError', message: /`points` but received 0/ }],
      ['33 channels', batch, { channels: 33 }, { name: 'RangeError', message: /1 to 32 for `channels`/ }],
      ['4097 centroids', batch, { centroids: 4097 }, { name: 'RangeError', message: /1 to 4096 for `centroids`/ }],
      ['a text for a number', batch, { centroids: '8' }, { name: 'TypeError', message: /`centroids` but received "8"/ }],
      ['half an iteration', batch, { iterations: 0.5 }, { name: 'RangeError', message: /`iterations`/ }],
      ['a tolerance below 0', batch, { tolerance: -1 }, { name: 'RangeError', message: /`tolerance`/ }],
      ['a tolerance of NaN', batch, { tolerance: NaN }, { name: 'RangeError', message: /`tolerance` but received NaN/ }],
      ['a negative seed', batch, { seed: -1 }, { name: 'RangeError', message: /`seed`/ }],
      ['a seed beyond 2^53', batch, { seed: 2 ** 60 }, { name: 'RangeError', message: /`seed`/ }],
      ['a seed of text', batch, { seed: 'x' }, { name: 'TypeError', message: /`seed`/ }],
      ['short weights', batch, { weights: new Float32Array(59) }, { name: 'RangeError', message: /`weights`/ }],
      ['weights of doubles', batch, { weights: new Float64Array(60) }, { name: 'TypeError', message: /`weights`/ }],
      ['a layout past the end', batch, { layout: { pointStride: 5 } }, { name: 'RangeError', message: /`points`/ }],
      ['a negative stride', batch, { layout: { problemStride: -1 } }, { name: 'RangeError', message: /`problemStride`/ }],
      ['weights shared by none', batch, { weights: new Float32Array(60), layout: { weightSharing: 0 } }, { name: 'RangeError', message: /`weightSharing`/ }],
      ['a layout that is no object', batch, { layout: 4 }, { name: 'TypeError', message: /`layout` but received 4/ }],
      ['a short out', batch, { out: new Float32Array(63) }, { name: 'RangeError', message: /`out`/ }],
      ['a device that is not there', batch, { device: 'npu' }, { message: /"cpu", "cuda" or "auto".*"npu"/ }],
      ['a result beyond all memory', batch, { problems: 2 ** 31 - 1, centroids: 4096, layout: { problemStride: 0 } }, { code: 'ERR_COUPLET_OUT_OF_MEMORY' }],
    ]
    for (const [what, points, change, error] of cases)
      it(what, async () => {
        const expected = { code: 'ERR_COUPLET_INVALID_ARGUMENT', ...error }
        assert.throws(() => kmeansSync(points as never, { ...shape, ...change }), expected)
        await assert.rejects(kmeans(points as never, { ...shape, ...change }), expected)
      })

    it('what only a promise can do, in the Sync form', () => {
      assert.throws(() => kmeansSync(batch, { ...shape, signal: new AbortController().signal } as never), { name: 'TypeError', message: /`signal`/ })
      assert.throws(() => kmeansSync(batch, { ...shape, onProgress: () => undefined } as never), { name: 'TypeError', message: /`onProgress`/ })
    })

    it('a signal and a progress function that are none', async () => {
      await assert.rejects(kmeans(batch, { ...shape, signal: {} as never }), { name: 'TypeError', message: /an AbortSignal for `signal`/ })
      await assert.rejects(kmeans(batch, { ...shape, onProgress: 5 as never }), { name: 'TypeError', message: /`onProgress`/ })
    })
  })
})

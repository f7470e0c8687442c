import { extent, requireArray, requireCallOptions, requireInteger, requireObject, resultArray } from './arguments'
import { type DeviceMemory, type DeviceOptions, deviceOf, isDeviceMemory, placeOf, type StreamOption } from './device'
import { addon } from './native/addon'
import { abortable, refusePromiseOptions } from './native/call'
import type { NativeKmeansArguments } from './native/operations'

/** Where the elements of `points` and `weights` lie; every stride counts elements. */
export interface KmeansLayout {
  /** From point n of a problem to point n of the next; default points * channels. */
  problemStride?: number
  /** From a point to the next; default channels. The channels of a point are neighbours. */
  pointStride?: number
  /** From the weights of one problem (of `weightSharing` problems) to the next; default points, or 0 when `weights` has `points` elements. */
  weightProblemStride?: number
  /** From the weight of a point to that of the next; default 1. */
  weightPointStride?: number
  /** Consecutive problems that read the same weights; default 1. */
  weightSharing?: number
}

export interface KmeansProgress {
  /** Units of work done, of `total`. */
  done: number
  total: number
  /** The problem that reports, and its Lloyd iteration. */
  problem: number
  iteration: number
}

export interface KmeansSyncOptions extends DeviceOptions, StreamOption {
  /** Independent problems in the batch. */
  problems: number
  /** Points of each problem. */
  points: number
  /** Channels of each point, 1 to 32. */
  channels: number
  /** Centroids of each problem, 1 to 4096. */
  centroids: number
  /** Weight of each point, >= 0: float32 [problems][points], or [points] for all problems alike. Default: all 1. */
  weights?: Float32Array | DeviceMemory | undefined
  /** Most Lloyd iterations; default 100. */
  iterations?: number | undefined
  /** A problem is done when an iteration lowers its inertia by less than this share; default 1e-6, 0 runs until nothing changes. */
  tolerance?: number | undefined
  /** Same seed, same result on the same kind of device, whatever the number of threads; default 0. A bigint is taken modulo 2 ** 64. */
  seed?: number | bigint | undefined
  /** Threads of the CPU to use; default 0, all cores. */
  threads?: number | undefined
  layout?: KmeansLayout | undefined
  /** Also return the centroid of every point; default false. */
  assignments?: boolean | undefined
  /** Receives the centroids; default a new array. */
  out?: Float32Array | DeviceMemory | undefined
}

export interface KmeansOptions extends KmeansSyncOptions {
  /** Rejects with its reason, at most 100 ms after it fires. */
  signal?: AbortSignal | undefined
  /** Called at most every 50 ms, and when all is done. What it throws stops the call and rejects it. */
  onProgress?: ((progress: KmeansProgress) => void) | undefined
}

export interface KmeansResult<Centroids = Float32Array> {
  /** float32 [problems][centroids][channels] */
  centroids: Centroids
  /** float64 [problems]: sum over the points of weight * squared distance to the nearest centroid. */
  inertia: Float64Array
  /** int32 [problems]: Lloyd iterations run. */
  iterations: Int32Array
  /** int32 [problems][points]: index of the nearest centroid of each point. */
  assignments?: Int32Array
}

/**
 * Weighted k-means of many independent problems at once: k-means++ seeding (probability ~ weight * distance squared), then Lloyd.
 * Weights enter only the seeding and the means. Equal distances go to the lowest index, and a centroid that loses its points gets
 * a new place. Where there are fewer distinct points of positive weight than centroids, each of them becomes a centroid and the
 * last one is repeated; weights that are all 0 count as all 1. docs/algorithm.md has the formulas.
 *
 * Arrays are read in place while the promise is pending: neither change them nor transfer their buffers before it settles. Arrays
 * over a SharedArrayBuffer are welcome. On a GPU they are uploaded, at most 256 MiB of points at a time; points, weights and `out` may be
 * the device's own memory instead. A `stream` only says behind what the call comes: it is done when it returns all the same. Centroids of
 * a GPU are as good as the CPU's, not the same.
 *
 * @param points float32 [problems][points][channels], or as `layout` says
 * @throws {RangeError} `ERR_COUPLET_NOT_FINITE` with problem, point and channel, for a NaN or an infinity in points or weights
 * @throws {TypeError | RangeError} `ERR_COUPLET_INVALID_ARGUMENT`
 * @throws {CoupletError} `ERR_COUPLET_OUT_OF_MEMORY`, `ERR_COUPLET_BACKEND_UNAVAILABLE`, `ERR_COUPLET_DEVICE` when the device failed
 */
export function kmeans<Out extends DeviceMemory>(points: Float32Array | DeviceMemory, options: KmeansOptions & { out: Out }): Promise<KmeansResult<Out>>
export function kmeans(points: Float32Array | DeviceMemory, options: KmeansOptions & { out?: Float32Array | undefined }): Promise<KmeansResult>
export function kmeans(points: Float32Array | DeviceMemory, options: KmeansOptions): Promise<KmeansResult<Float32Array | DeviceMemory>>
export async function kmeans(points: Float32Array | DeviceMemory, options: KmeansOptions): Promise<KmeansResult<Float32Array | DeviceMemory>> {
  const call = prepare(points, options)
  const { onProgress } = options
  requireCallOptions(options)
  await abortable(options.signal, (cancel) =>
    addon().kmeans({
      ...call,
      cancel,
      onProgress: onProgress && ((done, total, problem, iteration) => onProgress({ done, total, problem, iteration })),
    }),
  )
  return resultOf(call, options)
}

/** {@link kmeans} on the calling thread (and its helpers): blocks until it is done. */
export function kmeansSync<Out extends DeviceMemory>(points: Float32Array | DeviceMemory, options: KmeansSyncOptions & { out: Out }): KmeansResult<Out>
export function kmeansSync(points: Float32Array | DeviceMemory, options: KmeansSyncOptions & { out?: Float32Array | undefined }): KmeansResult
export function kmeansSync(points: Float32Array | DeviceMemory, options: KmeansSyncOptions): KmeansResult<Float32Array | DeviceMemory>
export function kmeansSync(points: Float32Array | DeviceMemory, options: KmeansSyncOptions): KmeansResult<Float32Array | DeviceMemory> {
  const call = prepare(points, options)
  refusePromiseOptions(options)
  addon().kmeansSync(call)
  return resultOf(call, options)
}

function prepare(points: Float32Array | DeviceMemory, options: KmeansSyncOptions): NativeKmeansArguments {
  requireObject(options, 'options')
  const { problems, points: pointCount, channels, centroids: centroidCount, weights, iterations: maxIterations = 100 } = options
  const { tolerance = 1e-6, seed = 0, threads, layout = {}, stream } = options
  requireInteger(problems, 'problems', 1)
  requireInteger(pointCount, 'points', 1)
  requireInteger(channels, 'channels', 1, 32)
  requireInteger(centroidCount, 'centroids', 1, 4096)
  requireInteger(maxIterations, 'iterations', 0)
  requireObject(layout, 'layout')
  const { problemStride = pointCount * channels, pointStride = channels, weightPointStride = 1, weightSharing = 1 } = layout
  requireInteger(problemStride, 'problemStride', 0, Number.MAX_SAFE_INTEGER)
  requireInteger(pointStride, 'pointStride', 0, Number.MAX_SAFE_INTEGER)
  const pointAxes = [{ count: pointCount, stride: pointStride }, { count: channels, stride: 1 }]
  const leastPoints = extent({ count: problems, stride: problemStride }, ...pointAxes)
  if (!isDeviceMemory(points)) requireArray(points, 'points', Float32Array, leastPoints)
  const weightCount = isDeviceMemory(weights) ? weights.bytes / Float32Array.BYTES_PER_ELEMENT : weights?.length
  const weightProblemStride = layout.weightProblemStride ?? (weightCount === pointCount ? 0 : pointCount)
  const { out } = options
  return {
    problems,
    pointCount,
    channels,
    centroidCount,
    points: placeOf(points),
    problemStride,
    pointStride,
    weights: placeOf(weights),
    weightProblemStride,
    weightPointStride,
    weightSharing,
    maxIterations,
    tolerance,
    seed,
    threads,
    ...deviceOf(options, [points, weights, out]),
    stream,
    centroids: isDeviceMemory(out) ? placeOf(out) : resultArray(out, Float32Array, problems * centroidCount * channels),
    inertia: resultArray(undefined, Float64Array, problems),
    iterations: resultArray(undefined, Int32Array, problems),
    assignments: options.assignments === true ? resultArray(undefined, Int32Array, problems * pointCount) : undefined,
  }
}

function resultOf(
  { centroids, inertia, iterations, assignments }: NativeKmeansArguments,
  { out = centroids as Float32Array }: KmeansSyncOptions,
): KmeansResult<Float32Array | DeviceMemory> {
  return { centroids: out, inertia, iterations, ...(assignments && { assignments }) }
}

"""faiss looping over the problems that kmeans_bench --write saved: one thread, k-means with random initial centroids, as
faiss.Kmeans does it. Prints the JSON of kmeans_bench: cpu_ms is the CPU time of the process for one problem, inertia that of
faiss's last centroids, in double.

    python3 faiss_kmeans.py FILE.<kind>.f32 --points 16384 --centroids 256 --channels 8 --iterations 25
"""

import argparse
import json
import statistics
import time

import faiss
import numpy

arguments = argparse.ArgumentParser()
arguments.add_argument("file")
for name, default in ("points", 16384), ("centroids", 256), ("channels", 8), ("iterations", 25), ("repeats", 3):
    arguments.add_argument(f"--{name}", type=int, default=default)
options = arguments.parse_args()
faiss.omp_set_num_threads(1)

points = numpy.fromfile(options.file, dtype=numpy.float32).reshape(-1, options.points, options.channels)
times = []
for repeat in range(options.repeats):
    start = time.process_time()
    learned = []
    for problem in points:
        kmeans = faiss.Kmeans(options.channels, options.centroids, niter=options.iterations, nredo=1, seed=1,
                              max_points_per_centroid=options.points, min_points_per_centroid=1)
        kmeans.train(problem)
        learned.append(kmeans.centroids.astype(numpy.float64))
    times.append((time.process_time() - start) / len(points))


def inertia(problem, centroids):
    total = 0.0
    for rows in numpy.array_split(problem.astype(numpy.float64), max(1, len(problem) // 1024)):
        total += ((rows[:, None, :] - centroids[None]) ** 2).sum(2).min(1).sum()
    return total


seconds = statistics.median(times)
work = 2 * options.points * options.centroids * options.channels * options.iterations
print(json.dumps({
    "who": f"faiss {faiss.__version__}", "data": options.file.split(".")[-2],
    "points": options.points, "centroids": options.centroids, "channels": options.channels, "iterations": options.iterations,
    "cpu_ms": round(seconds * 1e3, 2), "gflops": round(work / seconds / 1e9, 1),
    "inertia": float(f"{numpy.mean([inertia(*pair) for pair in zip(points, learned)]):.8g}")}))

#!/bin/sh
# kmeans beside faiss on the same points: kmeans_bench writes them, both print their JSON lines, then the ratio of CPU time and
# of inertia per kind of data. Further arguments go to kmeans_bench (--points, --centroids, --channels, --iterations as well to
# faiss). faiss needs a fast BLAS to be a fair peer: Debian's libopenblas0-pthread, not the reference libblas3 (half the speed).
#
#   bench/peers/kmeans.sh build-cmake/dev [--points 16384 ...]
set -eu
build=$1
shift
points=$(mktemp -d)
trap 'rm -rf "$points"' EXIT
here=$(dirname "$0")
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

faiss_options=
previous=
for argument in "$@"; do
  case $previous in --points | --centroids | --channels | --iterations) faiss_options="$faiss_options $previous $argument" ;; esac
  previous=$argument
done

"$build/kmeans_bench" --write "$points/points" "$@" | tee "$points/json"
for file in "$points"/points.*.f32; do
  # shellcheck disable=SC2086
  /usr/bin/python3 "$here/faiss_kmeans.py" "$file" $faiss_options | tee -a "$points/json"
done
/usr/bin/python3 - "$points/json" <<'PYTHON'
import json, sys
runs = {}
for line in open(sys.argv[1]):
    run = json.loads(line)
    runs.setdefault(run["data"], []).append(run)
for data, (couplet, faiss) in runs.items():
    print(f"{data:10} {faiss['cpu_ms'] / couplet['cpu_ms']:5.1f} times less CPU time, inertia {couplet['inertia'] / faiss['inertia']:.4f} of faiss")
PYTHON

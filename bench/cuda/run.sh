#!/usr/bin/env bash
# Measures the CUDA backend on this machine's GPU, and PyTorch beside it, in about two minutes.
#
#   bench/cuda/run.sh [--binary couplet_bench_cuda] [--out FOLDER] [--quick] [flags of couplet_bench_cuda]
#
# Without --binary it is built here, with nvcc and cmake. FOLDER (by default $OUT, or build-cmake/bench) then has <date>-cuda.json and
# <date>-cuda.md. --quick measures headDim 128 with 4 query heads per kv head alone. PyTorch is looked for in python3; without it
# the rows have no peer.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
command="bench/cuda/run.sh $*"
out=${OUT:-$root/build-cmake/bench}
binary=
quick=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --binary) binary=$2; shift 2 ;;
    --out) out=$2; shift 2 ;;
    --quick) quick=(--heads 4 --head-dims 128); shift ;;
    *) break ;;
  esac
done
mkdir -p "$out"

if [[ -z $binary ]]; then
  build=$root/build-cmake/bench
  architecture=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader --id=0 | tr -d .)
  [[ $architecture == 90 || $architecture == 100 ]] && architecture+=a  # where warps may hand registers to each other
  cmake -S "$root" -B "$build" -DCMAKE_BUILD_TYPE=Release -DCOUPLET_ADDON=OFF -DCOUPLET_BENCH=ON -DGPU=CUDA \
    -DCMAKE_CUDA_ARCHITECTURES="$architecture-real" >"$out/build.log"
  cmake --build "$build" --target couplet_bench_cuda --parallel "$(nproc)" >>"$out/build.log"
  binary=$build/couplet_bench_cuda
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
status=0
"$binary" --full-kmeans "${quick[@]}" "$@" --json "$work/bench.json" || status=$?  # wrong answers: the rest is still told
if python3 -c 'import torch' 2>/dev/null; then
  python3 "$here/peer.py" "$work/peer.json" "${quick[@]}" || echo "peer.py failed: the rows have no peer"
else
  echo "no PyTorch: the rows have no peer"
fi
driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader --id=0)
name=$(date -u +%F)-cuda
python3 "$here/report.py" "$work/bench.json" "$work/peer.json" "$out/$name.json" "$out/$name.md" --driver "$driver" --command "$command"
echo "$out/$name.md"
exit $status

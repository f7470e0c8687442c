#!/usr/bin/env bash
# attend beside the proof it grew from (cq-8c8b, headDim 128, one thread, AVX-512): both print CPU ns per token and kv head.
#   bench/native/attend_vs_proof.sh PATH_TO_attend_bench [PATH_TO_proofs/cpu-attention] [tokens]
set -euo pipefail
bench=$1
proof=${2:-$(dirname "$0")/../../../shared/proofs/cpu-attention}
tokens=${3:-32768}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
g++ -O3 -march=native -std=c++17 "$proof/attend_avx512.cc" -o "$folder/proof"
for round in 1 2 3; do
  echo "round $round"
  "$folder/proof" "$tokens"
  "$bench" --context "$tokens" --heads 1,4,8
done

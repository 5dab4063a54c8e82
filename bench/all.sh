#!/usr/bin/env bash
# Everything there is to measure on CPUs, in well under ten minutes on two cores; tells each section's seconds.
#   bench/all.sh [FOLDER; default build/bench]
# Into FOLDER: records/ as JSON, the timeline of a call with its picture, and report/ with the page and all figures.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-build/bench}
python=${PYTHON:-python3}
mkdir -p "$out/records"
table=()
failed=0

section() {  # name, command ...
  local name=$1 started=$SECONDS result=ok
  shift
  printf '\n== %s\n' "$name"
  "$@" || { result="FAILED: exit code $?" failed=1; }
  table+=("$(printf '%-8s %4d s  %s' "$name" $((SECONDS - started)) "$result")")
}

flashmoe() {
  "$python" -m flashmoe "$@"
}

# Small enough for every machine, and for no cache: 150 and 350 MB of weights in fp32. hf-batched_mm, which copies every
# row's expert, would take a fifth of the time to tell that one should not use it.
section layer flashmoe bench layer --models qwen3-30b-a3b mixtral-8x7b --scale 4 --tokens 1 512 --ranks 1 2 \
  --dtypes fp32 bf16 --seconds 4 --iters 8 --seconds-total 270 \
  --baselines hf-eager,hf-grouped_mm,chain,pipeline-grouped_mm,pipeline-loop,one-process,ceiling --out "$out/records"
# What a training step takes.
section training flashmoe bench layer --passes backward --models qwen3-30b-a3b --scale 4 --experts 32 --tokens 16 128 \
  --ranks 1 --dtypes fp32 --seconds 2 --iters 5 --input random --baselines hf-grouped_mm,chain,ceiling \
  --out "$out/records"
section micro flashmoe bench micro --json "$out/records/micro.json"
section trace flashmoe run --ranks 2 --baselines none --seconds 3 --trace "$out/call.json"
section scale flashmoe bench scale --study all --quick --json "$out/records/scale.json"
section report flashmoe report "$out/records" --out "$out/report" --png

printf '\n'
printf '%s\n' "${table[@]}" "$(printf '%-8s %4d s' all $SECONDS)"
printf '%s\n' "$out/report/index.html" "$out/call.png"
exit $failed

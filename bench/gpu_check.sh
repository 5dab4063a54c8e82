#!/usr/bin/env bash
# On a machine with one GPU and no network: build, test, sanitize, time; goes on past a failure and ends in a table.
#   bench/gpu_check.sh [FOLDER for the records; default bench/results]
# Each step has a limit of its own, so that all of it takes less than nine minutes.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-bench/results}
python=${PYTHON:-python3}
mkdir -p "$out"
table=()
failed=0

step() {  # name, seconds it may take, command ...
  local name=$1 limit=$2 started=$SECONDS code=0
  shift 2
  printf '\n== %s\n' "$name"
  timeout "$limit" "$@" || code=$?
  case $code in
    0) result=ok ;;
    124) result="FAILED: over its $limit s" ;;
    *) result="FAILED: exit code $code" ;;
  esac
  [ "$code" -eq 0 ] || failed=1
  table+=("$(printf '%-14s %4d s  %s' "$name" $((SECONDS - started)) "$result")")
}

gpu=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d .)
arch=${gpu:-90}
[ "$arch" -lt 90 ] || arch=${arch}a
export CMAKE_ARGS="-DFLASHMOE_CUDA=ON -DFLASHMOE_CUDA_ARCHITECTURES=$arch-real"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

step build 150 "$python" setup.py --quiet build_ext --inplace
step tests 130 "$python" -m pytest -q -p no:cacheprovider tests/test_cuda.py
step memcheck 45 compute-sanitizer --tool memcheck --error-exitcode 9 \
  "$python" -m pytest -q -p no:cacheprovider tests/test_cuda.py -k "virtual_ranks and 33"
step racecheck 45 compute-sanitizer --tool racecheck --error-exitcode 9 \
  "$python" -m pytest -q -p no:cacheprovider tests/test_cuda.py -k "virtual_ranks and 33"
step benchmark 120 "$python" bench/gpu_layer.py --json "$out/gpu_layer.json"

printf '\n'
printf '%s\n' "${table[@]}"
exit $failed

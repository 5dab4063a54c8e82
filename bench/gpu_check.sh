#!/usr/bin/env bash
# On a machine with one GPU and no network: build, test, sanitize, time; goes on past a failure and ends in a table.
#   bench/gpu_check.sh [FOLDER for the records; default bench/results]
# Each step has a limit of its own, so that all of it takes less than nine minutes: tests/test_gpu_check.py adds up.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
out=${1:-bench/results}
python=${PYTHON:-python3}
mkdir -p "$out"
table=()
failed=0

step() {  # name, seconds it may take, command ...
  local name=$1 started=$SECONDS code=0
  local -x limit=$2
  shift 2
  printf '\n== %s\n' "$name"
  timeout -k 5 "$limit" "$@" || code=$?
  case $code in
    0) result=ok ;;
    124 | 137) result="FAILED: over its $limit s" ;;
    *) result="FAILED: exit code $code" ;;
  esac
  [ "$code" -eq 0 ] || failed=1
  table+=("$(printf '%-12s %4d s  %s' "$name" $((SECONDS - started)) "$result")")
}

PATH=$PATH:/usr/local/cuda/bin  # where nvcc and its tools lie if nobody has said so
gpu=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | head -1 | tr -d .)
arch=${gpu:-90}
[ "$arch" -ne 90 ] || arch=90a
export CMAKE_ARGS="-DFLASHMOE_CUDA=ON -DFLASHMOE_CUDA_ARCHITECTURES=$arch-real"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# A kernel that hangs is to say so within its step.
export FLASHMOE_TIMEOUT_S=10 FLASHMOE_ENTRY_TIMEOUT_S=10
# Without a network the host's own name may not resolve, and asking takes its time.
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME:-lo}
"$python" -c 'import pytest_timeout' || echo "without pytest-timeout a test that hangs ends its whole step"
"$python" -c 'import pytest_benchmark' || echo "without pytest-benchmark there is no step micro"

# The extension, and beside it the engines alone, which need no more than a compiler.
build() {
  "${CUDACXX:-nvcc}" -std=c++20 -O3 -DNDEBUG -I csrc -gencode "arch=compute_$arch,code=sm_$arch" \
    tests/cuda/engine_alone.cu -o "$programs/engine_alone" &
  "$python" setup.py --quiet build_ext --inplace
  local code=$?
  wait $! && return $code
}
# Whether the engines' own parts are wrong, before anything that is made of them is asked; the log keeps their speeds.
engines() { "$programs/engine_alone" | tee "$out/gpu/engine_alone.txt"; }
# Each file in a process of its own: an error that a GPU does not forgive costs only the tests after it. Tests that hang
# or would come too late end before their step does, which would end them without a word of what has failed so far.
tests() {  # file, options of pytest ...
  "$python" -m pytest -v -p no:cacheprovider -o timeout=$((limit / 2)) -o session_timeout=$((limit - 10)) --durations 5 \
    --junit-xml "$out/gpu_$(basename "$1" .py).xml" "$@"
}
# Our kernels alone: torch has hundreds, and asks the driver for what it may lack, which would count as an error.
sanitize() {  # tool, options of it ...
  FLASHMOE_TIMEOUT_S=300 FLASHMOE_ENTRY_TIMEOUT_S=300 compute-sanitizer --tool "$@" --kernel-name kns=flashmoe \
    --error-exitcode 9 --print-limit 20 "$python" -m pytest -v -p no:cacheprovider tests/test_cuda.py \
    tests/test_cuda_ranks.py tests/test_cuda_backward.py -k "no_tokens_small or dropped_and_skewed_small or two_ranks_small"
}
# Several processes on the card: at once where MPS can be started, else in turns.
processes() {
  CUDA_MPS_PIPE_DIRECTORY=$(mktemp -d)
  export CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY=$CUDA_MPS_PIPE_DIRECTORY
  if nvidia-cuda-mps-control -d && trap 'echo quit -t 2 | nvidia-cuda-mps-control' EXIT &&
    "$python" -c 'import signal; signal.alarm(12); import torch; torch.zeros(1, device="cuda")'; then
    echo "processes share the card through MPS"
  else
    echo "processes take turns on the card: MPS does not run here"
    echo quit -t 2 | nvidia-cuda-mps-control  # while it is known where it listens; what stays may hold our output open
    trap - EXIT
    unset CUDA_MPS_PIPE_DIRECTORY CUDA_MPS_LOG_DIRECTORY
  fi
  tests tests/test_cuda_nvshmem.py -rs
}
# The layer beside others, the most valuable first; no configuration begins after the seconds.
layers() {  # seconds, options ...
  "$python" -m flashmoe bench layer --device cuda --models mixtral-8x7b qwen3-30b-a3b flashmoe-paper --input random \
    --baselines chain,triton,virtual-8,ceiling --seconds 2 --seconds-total "$@" --out "$out/gpu"
}
# One prefill call as Perfetto and a picture show it, and how much longer a call takes while it is traced.
timeline() {
  "$python" -m flashmoe run --device cuda --model mixtral-8x7b --tokens 8192 --input random --baselines none --iters 10 \
    --seconds 3 --trace "$out/gpu/timeline.json" --json "$out/gpu/traced.json"
}
export -f build engines tests sanitize processes layers timeline
out=$(realpath "$out")
programs=$(mktemp -d)
trap 'rm -rf "$programs"' EXIT
export python out arch programs

mkdir -p "$out/gpu"

# What the steps import lies on a disk that may be cold: it is read while the compilers run.
"$python" -c 'import torch, triton, matplotlib.pyplot' > /dev/null 2>&1 &
step build 90 bash -c build
step engines 13 bash -o pipefail -c engines
step info 24 bash -c '"$python" -m flashmoe info && "$python" -m torch.distributed.run -m flashmoe info --distributed'
step layer 60 bash -c 'tests tests/test_cuda.py'
step ranks 34 bash -c 'tests tests/test_cuda_ranks.py'
step backward 28 bash -c 'tests tests/test_cuda_backward.py'
step graphs 26 bash -c 'tests tests/test_cuda_graphs.py tests/test_cuda_routing.py'
step trace 24 bash -c 'tests tests/test_cuda_trace.py'
step timeline 22 bash -c timeline
step processes 48 bash -c processes
step memcheck 34 bash -c 'sanitize memcheck --report-api-errors no'
step racecheck 34 bash -c 'sanitize racecheck'
step prefill 34 bash -c 'layers 18 --tokens 8192 512'
step decode 24 bash -c 'layers 9 --tokens 1 8 32 128 --graph'
step training 26 bash -c 'layers 6 --tokens 8192 --passes backward --baselines chain,ceiling'
step micro 18 "$python" -m flashmoe bench micro -k bench_gpu --json "$out/gpu/micro.json"

printf '\n'
printf '%s\n' "${table[@]}" | tee "$out/gpu_check.txt"
exit $failed

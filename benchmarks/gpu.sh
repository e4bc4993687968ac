#!/usr/bin/env bash
# gpu.sh FOLDER [STEP...]: on a machine with a GPU, a python3 with torch, nvcc and no network. Leaves log.txt and CSV
# files in FOLDER. Each step has its own time limit and none stops the next; the most useful come first.
set -uo pipefail
mkdir -p "$1"
results=$(realpath "$1")
shift
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3} MAX_JOBS=${MAX_JOBS:-8} PYTHONUNBUFFERED=1 PYTHONPATH=$PWD
failed=()

say() { echo "$*" | tee -a "$results/log.txt"; }

within() {  # within SECONDS COMMAND...
  local seconds=$1 status
  shift
  say "== $*"
  timeout --kill-after=5 "$seconds" "$@" 2>&1 | tee -a "$results/log.txt"
  status=${PIPESTATUS[0]}
  [ "$status" -eq 0 ] || { failed+=("$*: exit status $status"); return 1; }
}

have() { "$PYTHON" -c "import $1" 2> /dev/null || { say "no $1 here"; return 1; }; }

bench() {  # bench SECONDS NAME ARGUMENTS...
  within "$1" "$PYTHON" -m mlp_ext bench --device cuda --peak --csv "$results/$2.csv" "${@:3}"
}

build() {
  within 20 nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv
  within 180 env MLP_EXT_CUDA=1 "$PYTHON" setup.py --quiet build_ext --inplace && within 20 "$PYTHON" -m mlp_ext info
}

measure() {
  local own=native,cudagraph,fused,fused-cudagraph dtype
  bench 40 train-step-relu --suite train --rounds 12 --providers native,cudagraph,fused,stack,step,fit
  bench 60 many-step-relu --suite many --rounds 6 --providers native,vmap,bmm,step,fit,steps
  for dtype in bfloat16 float32 tf32 float16; do
    bench 35 "layers-full-relu-$dtype" --rounds 12 --dtype "$dtype" --providers $own
  done
  bench 25 layers-full-sigmoid-bfloat16 --rounds 8 --dtype bfloat16 --activation sigmoid --providers $own
  bench 25 layers-forward-sigmoid-bfloat16 --rounds 8 --dtype bfloat16 --activation sigmoid --mode forward --providers $own
  bench 25 layers-forward-relu-bfloat16 --rounds 8 --dtype bfloat16 --mode forward --providers $own,addmm_activation
}

# What csrc/cuda/plan.h chooses among, each path alone.
paths() {
  local mode dtype
  local cases=10x10x5,64x64x64,64x784x256,256x256x256,1x1024x1024,16x1024x1024,128x1024x1024,1000x100x100,512x64x64
  cases+=,2048x64x64,4096x64x64,16384x64x64,65536x64x64,65536x32x32,65536x128x32,65536x32x128,65536x17x16,1048576x64x64
  for dtype in float32 bfloat16; do
    for mode in forward backward; do
      bench 40 "paths-$mode-$dtype" --rounds 3 --mode $mode --dtype $dtype --cases $cases \
        --providers native,cudagraph,small,tall,large
    done
  done
}

tests() {
  have pytest || return
  local parallel=()
  have xdist && parallel=(-n 8)
  within 150 "$PYTHON" -m pytest -q -rs "${parallel[@]}" tests/test_cuda.py tests/test_cuda_train.py \
    tests/test_cuda_train_many.py tests/test_cuda_as_cpu.py
}

# racecheck sees hazards in kernels of cuBLAS, and fails where it is to look at ours alone among them.
sanitize() {
  command -v compute-sanitizer > /dev/null || { say "no compute-sanitizer here"; return; }
  within 60 compute-sanitizer --tool memcheck --error-exitcode 3 "$PYTHON" tests/sanitized.py
  within 60 compute-sanitizer --tool racecheck --error-exitcode 3 "$PYTHON" tests/sanitized.py own
}

# Minutes for each case, and so only when asked for.
peers() {
  bench 200 "peers-full-relu-bfloat16" --dtype bfloat16 --cases "${PEER_CASES:-10x10x5,65536x64x64,4096x4096x4096}" \
    --providers native,compile,compile-max-autotune,fused
}

suite() {
  have pytest && within 500 "$PYTHON" -m pytest -rs
}

for step in "${@:-build}"; do $step; done
[ ${#failed[@]} -eq 0 ] || { say "$(printf "failed: %s\n" "${failed[@]}")"; exit 1; }

#!/usr/bin/env bash
# gpu.sh FOLDER [STEP...]: on a machine with a GPU, a python3 with torch, nvcc and no network. Leaves log.txt and CSV
# files in FOLDER. Each step has its own time limit and none stops the next; the most useful come first.
set -uo pipefail
mkdir -p "$1"
results=$(realpath "$1")
shift
cd "$(dirname "$0")/.."
export PYTHON=${PYTHON:-python3} MAX_JOBS=${MAX_JOBS:-8} PYTHONUNBUFFERED=1
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
  for dtype in bfloat16 float32 tf32 float16; do
    bench 35 "layers-full-relu-$dtype" --rounds 12 --dtype "$dtype" --providers $own
  done
  bench 25 layers-full-sigmoid-bfloat16 --rounds 8 --dtype bfloat16 --activation sigmoid --providers $own
  bench 25 layers-forward-sigmoid-bfloat16 --rounds 8 --dtype bfloat16 --activation sigmoid --mode forward --providers $own
  bench 25 layers-forward-relu-bfloat16 --rounds 8 --dtype bfloat16 --mode forward --providers $own,addmm_activation
}

tests() {
  have pytest && within 100 "$PYTHON" -m pytest -rs tests/test_cuda.py tests/test_cuda_train.py tests/test_cuda_as_cpu.py
}

sanitize() {
  local tool
  command -v compute-sanitizer > /dev/null || { say "no compute-sanitizer here"; return; }
  for tool in memcheck racecheck; do
    within 30 compute-sanitizer --tool $tool --error-exitcode 3 "$PYTHON" tests/sanitized.py
  done
}

# Minutes each, and so only when asked for.
peers() {
  local dtype cases=10x10x5,65536x64x64,1024x1024x1024,4096x4096x4096
  for dtype in bfloat16 float32; do
    bench 200 "peers-full-relu-$dtype" --dtype $dtype --cases $cases \
      --providers native,compile,compile-max-autotune,fused
  done
}

suite() {
  have pytest && within 500 "$PYTHON" -m pytest -rs
}

for step in "${@:-build}"; do $step; done
[ ${#failed[@]} -eq 0 ] || { say "$(printf "failed: %s\n" "${failed[@]}")"; exit 1; }

#!/usr/bin/env bash
# One command for a machine with a GPU and no network: build, test, measure.
#
#   benchmarks/gpu_check.sh OUT [--device cpu] [step ...]
#
# Steps (default: all, in this order): machine, build, info, gpu, tune, speed, marks, tests, float32, compiled.
#   gpu       tests/gpu: every op, loss and shipped configuration on both backends against fp64, 30 bitwise repeats,
#             graph capture, streams, no synchronisation, large offsets
#   tune      OUT/tuning.json: the tables of this GPU at the size of the marks; speed and float32 use it
#   speed     OUT/cuda.json and .csv: all cases, both backends and every peer that needs no compiler
#   marks     the table of marks from OUT/cuda.json
#   tests     the operator tests on this device
#   float32   OUT/float32/cuda.json; compiled: OUT/compiled/cuda.json, what torch.compile makes of the plain-torch peers
# Each step has a time limit, writes OUT/<step>.log, and its failure does not stop the next one; the whole ends within
# 20 minutes. Copy OUT/cuda.json, .csv and tuning.json (as hpkernels/tuning/<family>.json) to commit them, then
# python -m benchmarks --readme. Needs python with torch, triton, numpy, pytest, pybind11 and setuptools, and a C++
# compiler; the CUDA backend is built where nvcc is. PYTHON names the interpreter. --device cpu is a dry run.
set -u

usage() { sed -n '2,18p' "$0" | cut -c3-; exit 2; }

[ $# -ge 1 ] || usage
out=$1
shift
device=cuda
if [ "${1:-}" = "--device" ]; then
    device=${2:?--device needs cuda or cpu}
    shift 2
fi
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=(machine build info gpu tune speed marks tests float32 compiled)

mkdir -p "$out"
out=$(cd "$out" && pwd)
cd "$(dirname "$0")/.." || exit 2
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"  # the packages as built in place
python=${PYTHON:-$(command -v python || command -v python3)}
deadline=$((SECONDS + 1190))
summary=()
failed=0

step_machine() {
    nvidia-smi || true
    nproc
    free -g
    "$python" -c 'import platform, torch; print(platform.python_version(), torch.__version__, torch.version.cuda)'
    if [ "$device" = cuda ]; then
        "$python" -c 'import torch, triton; print(torch.cuda.get_device_name(), triton.__version__)'
    fi
}

step_build() {
    HPKERNELS_CUDA=${HPKERNELS_CUDA:-auto} HPKERNELS_JOBS=${HPKERNELS_JOBS:-$(nproc)} "$python" setup.py build_ext --inplace
}

step_info() { "$python" -m hpkernels.info; }

pytest_on_device() {
    local workers=()
    if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n "$1"); fi
    "$python" -m pytest -rfE --durations 10 "${workers[@]}" --device "$device" "${@:2}"
}

step_gpu() { pytest_on_device 4 tests/gpu; }

step_tests() { pytest_on_device 6 tests/test_*.py --deselect tests/test_benchmarks.py; }

step_tune() {
    if [ "$device" = cpu ]; then
        echo 'nothing to tune without a GPU'
        return
    fi
    # every result is written as it is found, so an end by time keeps those before
    timeout 130 "$python" -m hpkernels.tune --dtype half --widths 512 --rows 50176 --out "$out/tuning.json" || [ $? -eq 124 ]
}

measure() {  # measure SECONDS FOLDER option...
    if [ -f "$out/tuning.json" ]; then export HPKERNELS_TUNING=$out/tuning.json; fi
    local toys=()
    if [ "$device" = cpu ]; then toys=(--quick); fi
    "$python" -m benchmarks --device "$device" --seconds 10 --budget "$1" --out "$2" "${toys[@]}" "${@:3}"
}

ours=hpkernels,hpkernels-triton,hpkernels-cuda

step_speed() {
    measure 330 "$out" --peers "$ours,published,chunked,torch,torch.mm,torch.topk,pytorch-metric-learning,cut-cross-entropy,inf-cl,faiss"
}

step_marks() { "$python" -m benchmarks.marks "$out"; }

step_float32() {
    measure 60 "$out/float32" --dtype float32 --peers "$ours,torch.mm" \
        --case step_rho_0.02 --case stages_rho_0.02 --case search --case topk
}

step_compiled() {
    measure 90 "$out/compiled" --peers hpkernels,published-compiled,chunked-compiled,torch-compiled,keops \
        --case step_rho_0.02 --case step_rho_1 --case supcon --case topk
}

limit_of() {
    case $1 in
        build) echo 200 ;;
        gpu) echo 240 ;;
        tune) echo 150 ;;
        speed) echo 420 ;;
        tests) echo 150 ;;
        float32) echo 90 ;;
        compiled) echo 150 ;;
        *) echo 45 ;;
    esac
}

# timeout runs commands, not functions: each step is this script again, with the step's name in GPU_CHECK_STEP.
if [ -n "${GPU_CHECK_STEP:-}" ]; then
    set -e
    "step_$GPU_CHECK_STEP"
    exit
fi

for step in "${steps[@]}"; do
    if ! declare -F "step_$step" >/dev/null; then
        echo "unknown step: $step" >&2
        usage
    fi
done

export PYTHONUNBUFFERED=1
for step in "${steps[@]}"; do
    limit=$(limit_of "$step")
    left=$((deadline - SECONDS))
    [ "$left" -lt "$limit" ] && limit=$left
    if [ "$limit" -lt 10 ]; then
        summary+=("$(printf '%-9s %-12s' "$step" 'no time left')")
        failed=1
        continue
    fi
    echo "== $step (limit ${limit} s)"
    began=$SECONDS
    GPU_CHECK_STEP=$step timeout --kill-after=5 "$limit" bash "benchmarks/$(basename "$0")" "$out" --device "$device" \
        >"$out/$step.log" 2>&1
    status=$?
    tail -n 12 "$out/$step.log"
    case $status in
        0) verdict=ok ;;
        124 | 137) verdict='out of time' ;;
        *) verdict="failed ($status)" ;;
    esac
    [ "$status" -eq 0 ] || failed=1
    summary+=("$(printf '%-9s %-12s %5d s  %s' "$step" "$verdict" $((SECONDS - began)) "$(tail -n 1 "$out/$step.log" | cut -c1-80)")")
done

{
    printf '%-9s %-12s %7s  %s\n' step result time 'last line'
    printf '%s\n' "${summary[@]}"
} | tee "$out/summary.txt"
exit "$failed"

#!/usr/bin/env bash
# One command for a machine with a GPU and no network: build, test, measure.
#
#   benchmarks/gpu_check.sh OUT [--device cpu] [step ...]
#
# Steps (default: all, in this order): machine, build, info, tests, speed, float32, quick. `quick` is not in the default.
# Each step has a time limit, writes OUT/<step>.log, and its failure does not stop the next one; the whole ends within
# 20 minutes. `speed` leaves OUT/cuda.json, `float32` OUT/float32/cuda.json; copy the first to benchmarks/results/.
# Needs python with torch, triton, numpy, pytest, pybind11 and setuptools, and a C++ compiler. PYTHON names the
# interpreter. --device cpu is a dry run of the script itself.
set -u

usage() { sed -n '2,12p' "$0" | cut -c3-; exit 2; }

[ $# -ge 1 ] || usage
out=$1
shift
device=cuda
if [ "${1:-}" = "--device" ]; then
    device=${2:?--device needs cuda or cpu}
    shift 2
fi
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=(machine build info tests speed float32)

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

step_build() { "$python" setup.py build_ext --inplace; }

step_info() { "$python" -m hpkernels.info; }

step_tests() {
    local workers=()
    if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n 6); fi
    "$python" -m pytest -rfE --durations 15 "${workers[@]}" --device "$device" tests
}

step_speed() { "$python" -m benchmarks --device "$device" --out "$out"; }

step_float32() {
    "$python" -m benchmarks --device "$device" --dtype float32 --out "$out/float32" \
        --case step_rho_0.02 --case search --case product --case stages
}

step_quick() { "$python" -m benchmarks --device "$device" --quick --out "$out/quick"; }

limit_of() {
    case $1 in
        build) echo 240 ;;
        tests) echo 480 ;;
        speed) echo 480 ;;
        float32) echo 150 ;;
        *) echo 60 ;;
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

#!/usr/bin/env bash
# A machine with a GPU and no network, had for minutes: build and test on it (part a), then measure (part b).
#
#   benchmarks/gpu_check.sh a OUT [--long] [--device cpu] [step ...]    at most 420 s: machine, build, info, gpu
#   benchmarks/gpu_check.sh b OUT [--long] [--device cpu] [step ...]    at most 330 s: machine, build, speed, marks
#
#   build     in place, for the GPU that is here; nothing to do where part a has run before
#   gpu       tests/gpu: every op, loss and shipped configuration on both backends against fp64, 28 x 28 tokens in bf16
#             and fp32, 3 bitwise repeats, graph capture, streams, no synchronisation; in several processes
#   speed     cuda.json and .csv: the cases of the marks by both backends and by the peers the marks compare with
#   marks     their table
# --long has no limit for the whole, 30 repeats, offsets past 2^31 in gpu, all cases and peers in speed, and more steps:
#   tests     (a) the operator tests on this device
#   tune      (b) tuning.json: the tables of this GPU at the size of the marks; the steps after it use them
#   float32   (b) float32/cuda.json; compiled: compiled/cuda.json, what torch.compile makes of the plain-torch peers
#
# Each step has a time limit; its failure does not stop the next. Logs and results are in OUT/gpu_check_PART.tar.gz, the
# summary in OUT/gpu_check_PART.txt; both are written after every step. To commit results copy cuda.json, .csv and
# tuning.json (as hpkernels/tuning/<family>.json) from the archive, then python -m benchmarks --readme. Needs Python with
# torch, triton, numpy, pytest, pybind11, ninja and setuptools, and a C++ compiler; the CUDA backend is built where nvcc
# is. PYTHON names the interpreter. --device cpu is a dry run on toy sizes.
set -u

usage() { sed -n '2,24p' "$0" | cut -c3-; exit 2; }

[ $# -ge 2 ] || usage
part=$1 out=$2
shift 2
device=cuda long=
while [ "${1:-}" = --long ] || [ "${1:-}" = --device ]; do
    if [ "$1" = --long ]; then long=--long; shift; else device=${2:?--device needs cuda or cpu}; shift 2; fi
done
case $part$long in
    a) seconds=420 all=(machine build info gpu) ;;
    b) seconds=330 all=(machine build speed marks) ;;
    a--long) seconds=36000 all=(machine build info gpu tests) ;;
    b--long) seconds=36000 all=(machine build tune speed marks float32 compiled) ;;
    *) usage ;;
esac
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=("${all[@]}")

mkdir -p "$out"
out=$(cd "$out" && pwd)
script=$(cd "$(dirname "$0")" && pwd)/$(basename "$0")
cd "$(dirname "$script")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-$(command -v python3 || command -v python)}

step_machine() {
    nvidia-smi || true
    nproc
    free -g || true
    "$python" -c 'import platform, torch; print(platform.python_version(), torch.__version__, torch.version.cuda)'
    if [ "$device" = cuda ]; then
        "$python" -c 'import torch, triton; print(torch.cuda.get_device_name(), triton.__version__)'
    fi
}

step_build() {
    if [ "$device" = cpu ]; then
        echo 'no GPU: what is built stays'
        return
    fi
    if [ -z "${HPKERNELS_CUDA_ARCHS:-}" ] && ! command -v nvidia-smi >/dev/null; then  # else the build asks nvidia-smi
        HPKERNELS_CUDA_ARCHS=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
        export HPKERNELS_CUDA_ARCHS=${HPKERNELS_CUDA_ARCHS/90/90a}
    fi
    HPKERNELS_JOBS=${HPKERNELS_JOBS:-$(nproc)} "$python" setup.py -q build_ext --inplace
}

step_info() { "$python" -m hpkernels.info; }

side_by_side() {  # side_by_side PROCESSES pytest-option...: a part of the tests each; needs no plugin of pytest
    local number=$1 pids=() failures=0 i status
    for i in $(seq "$number"); do
        "$python" -m pytest -q -rfE --durations 5 -p no:cacheprovider --part "$i/$number" "${@:2}" >"$work/$step-$i.log" 2>&1 &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do
        status=0
        wait "$pid" || status=$?
        [ "$status" = 0 ] || [ "$status" = 5 ] || failures=1  # 5: no test in this part
    done
    grep -hE '^(FAILED|ERROR)' "$work/$step"-*.log || true
    tail -qn 1 "$work/$step"-*.log
    return $failures
}

processes() { echo $(($(nproc) > 16 ? 8 : ($(nproc) + 1) / 2)); }

step_gpu() {
    if [ "$device" = cpu ]; then
        side_by_side 1 tests/gpu -k 'without_a_gpu and float32 and (loss_sparse or bits or topk_16)'
    elif [ -n "$long" ]; then
        HPKERNELS_REPEATS=30 side_by_side 2 tests/gpu -k 'not without_a_gpu'
    else
        HPKERNELS_REPEATS=3 side_by_side "$(processes)" tests/gpu -k 'not without_a_gpu and not beyond_int32'
    fi
}

step_tests() { side_by_side "$(processes)" --device "$device" --way gpu tests/ops tests/losses tests/clustering; }

step_tune() {
    if [ "$device" = cpu ]; then
        echo 'nothing to tune without a GPU'
        return
    fi
    "$python" -m hpkernels.tune --dtype half --widths 512 --rows 50176 --out "$work/tuning.json"
}

measure() {  # measure FOLDER option...
    if [ -f "$work/tuning.json" ]; then export HPKERNELS_TUNING=$work/tuning.json; fi
    local toys=()
    if [ "$device" = cpu ]; then toys=(--quick --threads 1); fi
    "$python" -m benchmarks --device "$device" --out "$1" "${toys[@]}" "${@:2}"
}

ours=hpkernels,hpkernels-triton,hpkernels-cuda

step_speed() {
    if [ -n "$long" ]; then
        measure "$work" --peers "$ours,published,chunked,torch,torch.mm,torch.topk,torch-linear-cross-entropy,pytorch-metric-learning,cut-cross-entropy,inf-cl,siglip-kernel,faiss,flash-kmeans,fastkmeans"
    else
        measure "$work" --marks --seconds 5 --budget $((limit - 40))
    fi
}

step_marks() { "$python" -m benchmarks.marks "$work"; }

step_float32() {
    measure "$work/float32" --dtype float32 --peers "$ours,torch.mm" \
        --case step_rho_0.02 --case stages_rho_0.02 --case search --case topk
}

step_compiled() {
    measure "$work/compiled" --peers hpkernels,published-compiled,chunked-compiled,torch-compiled,keops \
        --case step_rho_0.02 --case step_rho_1 --case supcon --case topk
}

limit_of() {
    case $1 in
        machine | info | marks) echo 30 ;;
        build) echo 180 ;;
        *) echo "$seconds" ;;
    esac
}

# timeout runs commands, not functions: each step is this script again, with the step's name in GPU_CHECK_STEP.
if [ -n "${GPU_CHECK_STEP:-}" ]; then
    step=$GPU_CHECK_STEP work=$GPU_CHECK_WORK limit=$GPU_CHECK_LIMIT
    set -e
    "step_$step"
    exit
fi

for step in "${steps[@]}"; do
    if ! declare -F "step_$step" >/dev/null; then
        echo "unknown step: $step" >&2
        usage
    fi
done

deadline=$((SECONDS + seconds - 10))  # for the archive and the processes that must be killed
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
trap 'kill $! 2>/dev/null; echo "$step was interrupted" >>"$work/summary.txt"; keep; exit 143' TERM INT
failed=0

keep() {
    cp "$work/summary.txt" "$out/gpu_check_$part.txt"
    tar -C "$work" -czf "$out/.gpu_check" . && mv "$out/.gpu_check" "$out/gpu_check_$part.tar.gz"
}

note() {
    printf '%-9s %-12s %7s  %s\n' "$@" >>"$work/summary.txt"
    keep
}

note step result time 'last line'
for step in "${steps[@]}"; do
    limit=$(limit_of "$step")
    left=$((deadline - SECONDS))
    [ "$left" -lt "$limit" ] && limit=$left
    if [ "$limit" -lt 10 ]; then
        note "$step" 'no time left' '' ''
        failed=1
        continue
    fi
    echo "== $step (limit ${limit} s)"
    began=$SECONDS
    GPU_CHECK_STEP=$step GPU_CHECK_WORK=$work GPU_CHECK_LIMIT=$limit timeout --kill-after=5 "$limit" \
        bash "$script" "$part" "$out" $long --device "$device" >"$work/$step.log" 2>&1 &
    wait $!
    status=$?
    tail -n 12 "$work/$step.log"
    case $status in
        0) verdict=ok ;;
        124 | 137) verdict='out of time' ;;
        *) verdict="failed ($status)" ;;
    esac
    [ "$status" -eq 0 ] || failed=1
    note "$step" "$verdict" "$((SECONDS - began)) s" "$(tail -n 1 "$work/$step.log" | cut -c1-80)"
done
cat "$work/summary.txt"
exit "$failed"

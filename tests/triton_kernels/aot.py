"""Compile every Triton kernel, in every shipped configuration, for GPUs that are not here; one dtype and width for AMD.

The public wrappers of the kernels run on small CPU tensors while a stand-in driver answers for the GPU and launches
are recorded instead of made. So what is compiled is what a GPU would get: the wrappers' own configuration tables,
argument types, alignments and constants. Results of the wrappers are meaningless here and dropped.

    python -m tests.triton_kernels.aot            writes benchmarks/results/aot.json
    python -m tests.triton_kernels.aot --check    whether the table is of the kernels as they are now

Needs a process without TRITON_INTERPRET. No figure in aot.json was measured on a GPU: registers, stack and shared
memory are the assembler's, instruction counts are from PTX, or from the assembly of an AMD GPU.
"""

from __future__ import annotations

import argparse
import ast
import datetime
import functools
import hashlib
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from hpkernels import tuning
from tests.triton_kernels.offsets import narrow_offsets

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "aot.json"
TARGETS = {"80": GPUTarget("cuda", 80, 32), "90": GPUTarget("cuda", 90, 32), "gfx942": GPUTarget("hip", "gfx942", 64)}
FAMILIES = {"90": "hopper", "gfx942": "cdna"}  # the tuning tables they take; others the default
SHARED_LIMIT = {"80": 163 * 1024, "90": 227 * 1024, "gfx942": 64 * 1024}
DTYPES = (torch.bfloat16, torch.float32)  # one of each class of the configuration tables
WIDTHS = (64, 128, 256, 512, 1024)  # one of each class; others are padded to one of these
MAIN_WIDTH = 512  # kernels whose configuration does not depend on the width are compiled once
CHOICE = {"gfx942": dict(dtypes=(torch.bfloat16,), widths=(MAIN_WIDTH,))}  # what a target is compiled for, if not all


class _Driver:
    """Stands in for a GPU driver: says which target to compile for, launches nothing."""

    def __init__(self, arch: str):
        self.target = TARGETS[arch]

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return list(TARGETS.values()).index(self.target)

    def get_current_stream(self, device: int) -> int:
        return 0


class Recorder:
    """Within its context kernel launches are recorded (`launches`), and compiled if `compile` is set (`kernels`)."""

    def __init__(self, arch: str, compile: bool):
        self.arch, self.compile = arch, compile
        self.launches: dict[str, str] = {}
        self.kernels: dict[str, object] = {}

    def __enter__(self) -> Recorder:
        self._run, recorder = JITFunction.run, self

        def run(kernel, *args, grid, warmup, **kwargs):
            name = _launch_name(kernel, args, kwargs)
            recorder.launches[name] = source_hash(kernel)
            if recorder.compile and name not in recorder.kernels:
                try:
                    recorder.kernels[name] = recorder._run(kernel, *args, grid=grid, warmup=True, **kwargs)
                except (triton.CompilationError, RuntimeError) as error:  # RuntimeError: a pass of the compiler failed
                    recorder.kernels[name] = error

        JITFunction.run = run
        self._family = tuning.family
        tuning.family = lambda device: FAMILIES.get(self.arch, "default")
        driver.set_active(_Driver(self.arch))
        return self

    def __exit__(self, *error) -> None:
        JITFunction.run = self._run
        tuning.family = self._family


def source_hash(kernel: JITFunction) -> str:
    """Of the code, without comments and docstrings, of a kernel and of all functions of ours that it calls."""
    sources, pending = {}, [kernel]
    while pending:
        function = pending.pop()
        if function.__name__ in sources:
            continue
        tree = ast.parse(function.src)
        tree.body[0].body = [node for node in tree.body[0].body if not _is_docstring(node)]
        sources[function.__name__] = ast.unparse(tree)
        called = (function.__globals__.get(name) for name in function.fn.__code__.co_names)
        pending += [f for f in called if isinstance(f, JITFunction) and f.__module__.startswith("hpkernels.")]
    return hashlib.sha256("".join(sources[name] for name in sorted(sources)).encode()).hexdigest()[:16]


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _launch_name(kernel: JITFunction, args: tuple, kwargs: dict) -> str:
    """Kernel, dtype of its first operand, and every compile-time option."""
    options = {key: value for key, value in kwargs.items() if key not in ("PRECISION",)}
    dtype = str(args[0].dtype).removeprefix("torch.")
    shown = " ".join(f"{key}={int(value)}" for key, value in sorted(options.items()))
    return f"{kernel.__name__} {dtype} {shown}"


# ------------------------------------------------------------------ what is shipped

Case = tuple[str, Callable[[], object]]


def cases(dtypes: tuple[torch.dtype, ...] = DTYPES, widths: tuple[int, ...] = WIDTHS) -> Iterator[Case]:
    """Calls that between them launch every kernel in every configuration for these dtypes and widths."""
    from hpkernels.ops.normalize import triton as normalize

    normalize._output_dtype = lambda x: x.dtype  # what it answers on a GPU
    for dtype in dtypes:
        for width in widths:
            x = torch.zeros(256, width, dtype=dtype)
            yield f"normalize_rows {width}", lambda x=x: normalize.normalize_rows(x, "x")
            yield f"normalize_rows_grad {width}", lambda x=x: normalize.normalize_rows_grad(x.float(), x)
            yield from _contrastive_grad_cases(x)
            yield from _group_grad_cases(x)
            if width == MAIN_WIDTH:
                yield from _cluster_cases(x)
                yield from _group_lse_cases(x)
                yield from _search_cases(x)
                yield from _contrastive_stats_cases(x)
                yield from _local_mix_cases(dtype)
                yield from _pair_bits_cases()
                yield from _pair_average_cases()


def _pair_bits_cases() -> Iterator[Case]:
    from hpkernels.ops.pair_bits import triton as pair_bits

    bits = torch.zeros(256, 8, dtype=torch.int32)
    yield "random_bits", lambda: pair_bits.random_bits(torch.tensor(1), 256, 256, 0.02)
    yield "count_bits", lambda: pair_bits.count_bits(bits)
    yield "transpose_bits", lambda: pair_bits.transpose_bits(bits, 256)


def _pair_average_cases() -> Iterator[Case]:
    from hpkernels.ops.pair_average import triton as pair_average
    from hpkernels.ops.pair_average.rows import Rows, Weights

    rows = Rows(*torch.zeros(3, 2, 256), *torch.zeros(2, 256))
    for weighting in ("pairs", "anchors", "separate"):
        for extra in (0.5, torch.zeros(())):
            weights, inverses = Weights(extra, 2, 2, weighting), torch.zeros(2, 2)
            average, grad = pair_average.pair_average, pair_average.pair_average_grad
            yield f"pair_average {weighting}", functools.partial(average, rows, weights, 1.0)
            yield f"pair_average_grad {weighting}", functools.partial(grad, torch.zeros(()), rows, weights, inverses)


def _local_mix_cases(dtype: torch.dtype) -> Iterator[Case]:
    from hpkernels.ops.local_mix import triton as local_mix
    from hpkernels.ops.local_mix.weighting import Weighting

    for side in (7, 11, 14, 22, 28, 40, 64):  # each power of two that holds a row
        attention = torch.zeros(1, 1, side * side, side * side, dtype=dtype)
        yield (
            f"neighbor_weights {side}",
            lambda a=attention, n=side: local_mix.neighbor_weights(a, Weighting(n, n, 28.0, 0.1, 0.9)),
        )
        rows = torch.zeros(1, 6, side * side, 64, dtype=dtype)
        yield (
            f"neighbor_weights_qk {side}",
            lambda x=rows, n=side: local_mix.neighbor_weights_qk(x, x, 0.125, Weighting(n, n, 28.0, 0.1, 0.9)),
        )
    code, weights = torch.zeros(1, 784, 512, dtype=dtype), torch.zeros(1, 784, 9)
    yield "neighbor_mix", lambda: local_mix.neighbor_mix(code, weights, 28, 28)
    yield "neighbor_mix_grad", lambda: local_mix.neighbor_mix_grad(code, code, weights, 28, 28, True, True)


def _search_cases(x: torch.Tensor) -> Iterator[Case]:
    from hpkernels.ops.similarity_search import triton as search

    n, width = x.shape
    theta, groups, keys = torch.zeros(n), torch.zeros(n, dtype=torch.int64), torch.zeros(1024, width, dtype=x.dtype)
    key_groups = torch.zeros(1024, dtype=torch.int64)
    yield f"max_similarity {width}", lambda: search.max_similarity(x, x)
    yield f"pairs_above {width}", lambda: search.pairs_above(x, theta, None, None)
    yield f"pairs_above keys {width}", lambda: search.pairs_above(x, theta, x, theta)
    for k in (1, 16, 32, 64, 128, 256, 300):
        yield f"topk {k} {width}", lambda k=k: search.topk_similarity(x, keys, k, True, None, None)
        yield f"topk {k} groups {width}", lambda k=k: search.topk_similarity(x, keys, k, False, groups, key_groups)


def _contrastive_stats_cases(x: torch.Tensor) -> Iterator[Case]:
    from hpkernels.ops.contrastive import triton as contrastive
    from hpkernels.ops.contrastive.masks import Masks

    bits, extra = torch.zeros(2, len(x), 8, dtype=torch.int32)
    negatives = torch.zeros(64, 8, dtype=torch.int32)
    for temperature in (0.8, 0.01):
        for mode, masks in (
            ("all", (bits, None, None, None, None)),
            ("dense", (bits, None, extra, None, negatives)),
            ("sparse", (bits, None, extra, None, negatives)),
            ("sparse", (bits, None, None, None, None)),
        ):
            arguments = (x[None], Masks(*masks, mode), temperature)
            yield f"stats {mode} {temperature}", functools.partial(contrastive.contrastive_stats, *arguments)


def _contrastive_grad_cases(x: torch.Tensor) -> Iterator[Case]:
    from hpkernels.ops.contrastive import triton as contrastive
    from hpkernels.ops.contrastive.masks import Masks

    bits, turned, extra, extra_turned = torch.zeros(4, len(x), 8, dtype=torch.int32)
    negatives, vector = torch.zeros(64, 8, dtype=torch.int32), torch.zeros(1, len(x))
    for mode, masks in (
        ("all", (bits, None, None, None, None)),
        ("dense", (bits, None, extra, None, negatives)),
        ("dense", (bits, turned, extra, extra_turned, negatives)),
        ("sparse", (bits, None, extra, None, negatives)),
        ("sparse", (bits, turned, extra, extra_turned, negatives)),
    ):
        routes = ("lists",) if mode == "sparse" else ("fused", "workspace")
        for route, temperature in itertools.product(routes, (0.8, 0.04)[: len(routes)]):  # lists ignore the temperature
            arguments = (x[None], Masks(*masks, mode), temperature, *[vector] * 4)
            call = functools.partial(contrastive.contrastive_grad, *arguments)
            name = f"grad {mode} {sum(m is not None for m in masks)} {route} {temperature} {x.shape[1]}"
            yield name, functools.partial(_on_route, route, call)


def _group_lse_cases(x: torch.Tensor) -> Iterator[Case]:
    from hpkernels.ops.group_lse import triton as group_lse
    from hpkernels.ops.group_lse.rows import Grouped

    groups = torch.zeros(len(x), dtype=torch.int64)
    for temperature in (0.8, 0.01):
        yield f"group_lse {temperature}", functools.partial(group_lse.group_lse, Grouped(x, groups), temperature)


def _group_grad_cases(x: torch.Tensor) -> Iterator[Case]:
    from hpkernels.ops.group_lse import triton as group_lse
    from hpkernels.ops.group_lse.rows import Grouped

    groups, vector = torch.zeros(len(x), dtype=torch.int64), torch.zeros(len(x))
    for temperature, (keys, of_keys) in itertools.product((0.8, 0.04), ((None, False), (x, False), (x, True))):
        rows = Grouped(x, groups, keys, None if keys is None else groups)
        name = f"group_grad {('itself', 'rows', 'keys')[(keys is not None) + of_keys]} {temperature} {x.shape[1]}"
        yield name, functools.partial(group_lse.group_lse_grad, rows, temperature, vector, vector, of_keys)


def _cluster_cases(x: torch.Tensor) -> Iterator[Case]:
    from hpkernels.ops.cluster_assign import triton as cluster_assign

    centroids, bias = torch.zeros(100, x.shape[1]), torch.zeros(100)
    yield "cluster_assign", lambda: cluster_assign.cluster_assign(x, centroids, centroids, bias)


def _on_route(route: str, call: Callable[[], object]) -> object:
    """Both routes are shipped: a table of the user's may choose the other."""
    with tuning.forced("contrastive_grad", {"route": route}):
        return call()


# ------------------------------------------------------------------ what the compiler says


_LOAD_16 = r"cp\.async\.c\S+ .*?, 0x10\b|ld\.global\S*\.v4\.[bfsu]32|ld\.global\S*\.v2\.[bfsu]64"


def resources(kernel: object) -> dict[str, int]:
    """Registers and stack bytes of a thread, shared bytes of a block, and instruction counts of a compiled kernel."""
    if isinstance(kernel, Exception):
        return {"error": str(kernel)}
    common = {
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "products": kernel.asm["ttir"].count("tt.dot "),
        "narrow_offsets": len(narrow_offsets(kernel.asm["ttir"])),
    }
    return common | (_amd_resources(kernel) if "amdgcn" in kernel.asm else _nvidia_resources(kernel))


def _nvidia_resources(kernel: object) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK"))
    ptx = kernel.asm["ptx"]
    return {
        "registers": registers,
        "stack": stack,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "cp_async": ptx.count("cp.async.c"),
        "loads_16": len(re.findall(_LOAD_16, ptx)),
    }


def _amd_resources(kernel: object) -> dict[str, int]:
    """Scalar registers may be spilled to lanes of vector registers; what goes to memory is the stack."""
    assembly = kernel.asm["amdgcn"]
    notes = ("vgpr_count", "agpr_count", "vgpr_spill_count", "sgpr_spill_count", "private_segment_fixed_size")
    vgpr, agpr, vgpr_spills, sgpr_spills, stack = (int(re.search(rf"\.{k}:\s+(\d+)", assembly)[1]) for k in notes)
    return {
        "vgpr": vgpr,  # accumulation registers included
        "agpr": agpr,
        "vgpr_spills": vgpr_spills,
        "sgpr_spills": sgpr_spills,
        "stack": stack,
        "mfma": len(re.findall(r"\bv_mfma", assembly)),
        "loads_16": len(re.findall(r"\b(?:global|buffer)_load_dwordx4", assembly)),
    }


def faults(name: str, arch: str, figures: dict[str, int]) -> list[str]:
    """What a shipped configuration may not do."""
    if "error" in figures:
        return [figures["error"]]
    found = []
    if figures["shared"] > SHARED_LIMIT[arch]:
        found.append(f"{figures['shared']} bytes of shared memory, {SHARED_LIMIT[arch]} usable")
    if figures["stack"]:
        found.append(f"{figures['stack']} bytes of stack: registers are spilled")
    if figures["narrow_offsets"]:
        found.append(f"{figures['narrow_offsets']} offsets are products of 32 bits")
    half = name.split()[1] in ("float16", "bfloat16")
    if figures["products"] and not figures["loads_16"]:
        found.append("no load of 16 bytes")
    if figures["products"] and half:
        if arch == "90" and (figures["wgmma"] == 0 or figures["mma"] > 0):
            found.append(f"{figures['wgmma']} wgmma and {figures['mma']} mma instructions")
        if arch == "80" and figures["mma"] == 0:
            found.append("no mma instruction")
        if arch == "gfx942" and figures["mfma"] == 0:
            found.append("no mfma instruction")
    return found


def shipped(arch: str) -> dict[str, str]:
    """Every launch on `arch` by name, with a hash of the kernel's source and all it calls; nothing is compiled."""
    with Recorder(arch, compile=False) as recorder:
        for _, call in cases(**CHOICE.get(arch, {})):
            call()
    return recorder.launches


def compiled(arch: str, only: Callable[[str], bool] = lambda case: True, **choice: tuple) -> dict[str, dict]:
    """Figures of every launch of the chosen cases, by launch name."""
    with Recorder(arch, compile=True) as recorder:
        for case, call in cases(**choice):
            if only(case):
                call()
    return {name: {**resources(kernel), "source": recorder.launches[name]} for name, kernel in recorder.kernels.items()}


def check() -> list[str]:
    """What is wrong with the committed table: faults, and configurations that it lacks or has of an older source."""
    table = json.loads(RESULTS.read_text())["kernels"]
    wrong = []
    for arch in TARGETS:
        for name, figures in table[arch].items():
            wrong += [f"{arch} {name}: {fault}" for fault in faults(name, arch, figures)]
        launches = shipped(arch)
        for name, source in launches.items():
            if table[arch].get(name, {}).get("source") != source:
                wrong.append(f"{arch} {name}: changed or new; run `python -m tests.triton_kernels.aot`")
        wrong += [f"{arch} {name}: no longer shipped" for name in table[arch].keys() - launches.keys()]
    return wrong


def compile_all(jobs: int, match: str, widths: list[int], archs: list[str]) -> dict[str, dict]:
    """Figures by target and launch name."""
    work = []
    for arch in archs:
        choice = CHOICE.get(arch, dict(dtypes=DTYPES, widths=WIDTHS))
        chosen = (width for width in choice["widths"] if width in widths)
        work += [(arch, dtype, width, match) for width in chosen for dtype in choice["dtypes"]]
    rows: dict[str, dict] = {arch: {} for arch in archs}
    with ProcessPoolExecutor(jobs) as pool:
        for (arch, *_), part in zip(work, pool.map(_job, work), strict=True):
            rows[arch].update(part)
    return rows


def _job(job: tuple[str, torch.dtype, int, str]) -> dict[str, dict]:
    arch, dtype, width, match = job
    torch.set_num_threads(1)
    return compiled(arch, lambda case: match in case, dtypes=(dtype,), widths=(width,))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare aot.json with the kernels; compile nothing")
    parser.add_argument("--match", help="compile the cases whose name contains this and print; write nothing")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--widths", type=int, nargs="*", default=list(WIDTHS))
    parser.add_argument("--archs", nargs="*", choices=TARGETS, default=list(TARGETS))
    arguments = parser.parse_args()
    if arguments.check:
        wrong = check()
        print(*wrong, sep="\n")
        return int(bool(wrong))
    rows = compile_all(arguments.jobs, arguments.match or "", arguments.widths, arguments.archs)
    wrong = []
    for arch, kernels in rows.items():
        for name, figures in sorted(kernels.items()):
            print(f"{arch} {name}: " + ", ".join(f"{k} {v}" for k, v in figures.items() if k != "source"))
            wrong += [f"{arch} {name}: {fault}" for fault in faults(name, arch, figures)]
    if arguments.match is None:
        head = {
            "command": "python -m tests.triton_kernels.aot",
            "date": datetime.date.today().isoformat(),
            "triton": triton.__version__,
            "torch": torch.__version__,
            "note": "compiled ahead of time; nothing here ran on a GPU",
        }
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        others = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}  # what else was compiled keeps its place
        RESULTS.write_text(json.dumps({**others, **head, "kernels": rows}, indent=1, sort_keys=True) + "\n")
    print(*wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

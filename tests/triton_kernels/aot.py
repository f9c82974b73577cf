"""Compile every Triton kernel, in every shipped configuration, for absent GPUs, by every Triton that counts.

The wrappers of the kernels are called with tensors of the sizes that training makes (recorder.py), in bf16 and in fp32
with either form of its products. One dtype and width for AMD.

    python -m tests.triton_kernels.aot            brings this Triton's part of benchmarks/results/aot.json up to date
    python -m tests.triton_kernels.aot --check    whether every part is of the kernels as they are now

The parts are those of TRITONS: the oldest and the newest that the supported versions of torch bring, and the one that
most machines for rent have. Another Triton needs no other torch:

    pip install --no-deps --target FOLDER "triton==3.5.*" && PYTHONPATH=FOLDER python -m tests.triton_kernels.aot

Needs a process without TRITON_INTERPRET. No figure in aot.json was measured on a GPU: registers, stack and shared
memory are the assembler's, instruction counts are from PTX, or from the assembly of an AMD GPU.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import itertools
import json
import multiprocessing
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
import triton

from hpkernels import tuning
from hpkernels.common.bits import words
from tests.triton_kernels.figures import faults, resources
from tests.triton_kernels.recorder import TARGETS, Launch, Recorder, compile_for

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "aot.json"
TRITONS = ("3.5", "3.6", "3.8")  # CONTRIBUTING.md has their versions of torch
DTYPES = (torch.bfloat16, torch.float32)  # one of each class of the configuration tables
PRECISIONS = ("ieee", "tf32")  # what a user may set torch's products of fp32 tensors to, beside the default
WIDTHS = (64, 128, 256, 512, 1024)  # one of each class; others are padded to one of these
MAIN_WIDTH = 512  # kernels whose configuration does not depend on the width are compiled once
# Rows of a batch, and its tokens an image. Which sizes are multiples of 16 decides what is compiled: 64 images of 28 x
# 28 tokens (224 pixels by 8), of 23 x 23 (322 by DINOv2's 14), of 40 x 40 (320 by 8), and a size that nothing divides.
PAPER = 64 * 784
BATCHES = {PAPER: 784, 64 * 529: 529, 64 * 1600: 1600, 5 * 143: 143}
CHOICE = {  # what a target is compiled for, if not all
    "80": dict(batches=(PAPER,)),
    "gfx942": dict(dtypes=(torch.bfloat16,), widths=(MAIN_WIDTH,), batches=(PAPER,)),
}


# ------------------------------------------------------------------ what is shipped

Case = tuple[str, Callable[[], object]]


def cases(
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    widths: tuple[int, ...] = WIDTHS,
    batches: tuple[int, ...] = tuple(BATCHES),
) -> Iterator[Case]:
    """Calls that between them launch every kernel in every configuration for these dtypes, widths and batches.

    Batches other than the paper's have the main width. The same call may launch what another has launched.
    """
    from hpkernels.ops.normalize import triton as normalize

    normalize._output_dtype = lambda x: x.dtype  # what it answers on a GPU
    for dtype, width, rows in itertools.product(dtypes, widths, batches):
        if rows == PAPER or width == MAIN_WIDTH:
            for name, call in _cases(torch.empty(rows, width, dtype=dtype)):
                yield f"{name} {rows}", call
                for setting in PRECISIONS if dtype == torch.float32 and rows == PAPER else ():
                    yield f"{name} {rows} {setting}", functools.partial(_in_precision, setting, call)


def _cases(x: torch.Tensor) -> Iterator[Case]:
    from hpkernels.ops.normalize import triton as normalize

    width = x.shape[1]
    yield f"normalize_rows {width}", lambda: normalize.normalize_rows(x, "x")
    yield f"normalize_rows_grad {width}", lambda: normalize.normalize_rows_grad(x.float(), x)
    yield from _contrastive_grad_cases(x)
    yield from _group_grad_cases(x)
    if width == MAIN_WIDTH:
        yield from _cluster_cases(x)
        yield from _group_lse_cases(x)
        yield from _search_cases(x)
        yield from _contrastive_stats_cases(x)
        yield from _pair_bits_cases(x)
        yield from _pair_average_cases(x)
        if len(x) == PAPER:
            yield from _local_mix_cases(x.dtype)


def _in_precision(setting: str, call: Callable[[], object]) -> object:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, setting
    try:
        return call()
    finally:
        matmul.fp32_precision = before


def _masks(x: torch.Tensor, number: int) -> list[torch.Tensor]:
    """Pairs of all rows."""
    return list(torch.empty(number, len(x), words(len(x)), dtype=torch.int32))


def _negatives(x: torch.Tensor) -> torch.Tensor:
    """Columns of each token position."""
    return torch.empty(BATCHES[len(x)], words(len(x)), dtype=torch.int32)


def _pair_bits_cases(x: torch.Tensor) -> Iterator[Case]:
    from hpkernels.ops.pair_bits import triton as pair_bits

    n, tokens = len(x), BATCHES[len(x)]
    bits, extra = _masks(x, 2)
    yield "random_bits", lambda: pair_bits.random_bits(torch.tensor(1), tokens, n, 0.02)
    yield "count_bits", lambda: pair_bits.count_bits(bits)
    yield "count_bits of two", lambda: pair_bits.count_bits(bits, extra)
    yield "transpose_bits", lambda: pair_bits.transpose_bits(bits, n)
    yield "transpose_bits negatives", lambda: pair_bits.transpose_bits(_negatives(x), n)


def _pair_average_cases(x: torch.Tensor) -> Iterator[Case]:
    from hpkernels.ops.pair_average import triton as pair_average
    from hpkernels.ops.pair_average.rows import Rows, Weights

    n, images = len(x), len(x) // BATCHES[len(x)]
    rows = Rows(*torch.empty(3, 2, n), *torch.empty(2, n))
    for weighting in ("pairs", "anchors", "separate"):
        for extra in (0.5, torch.zeros(())):
            weights, inverses = Weights(extra, images, images, weighting), torch.empty(2, images)
            average, grad = pair_average.pair_average, pair_average.pair_average_grad
            yield f"pair_average {weighting}", functools.partial(average, rows, weights, 1.0)
            yield f"pair_average_grad {weighting}", functools.partial(grad, torch.zeros(()), rows, weights, inverses)


def _local_mix_cases(dtype: torch.dtype) -> Iterator[Case]:
    from hpkernels.ops.local_mix import triton as local_mix
    from hpkernels.ops.local_mix.weighting import Weighting

    for side in (7, 11, 14, 16, 22, 23, 28, 40, 64):  # each power of two that holds a row, and what training has
        images = 1 if side == 64 else 64
        attention = torch.empty(images, 2, side * side, side * side, dtype=dtype)  # one head would be its own kernel
        yield (
            f"neighbor_weights {side}",
            lambda a=attention, n=side: local_mix.neighbor_weights(a, Weighting(n, n, 28.0, 0.1, 0.9)),
        )
        rows = torch.empty(images, 6, side * side, 64, dtype=dtype)
        yield (
            f"neighbor_weights_qk {side}",
            lambda x=rows, n=side: local_mix.neighbor_weights_qk(x, x, 0.125, Weighting(n, n, 28.0, 0.1, 0.9)),
        )
    code, weights = torch.empty(64, 784, 512, dtype=dtype), torch.empty(64, 784, 9)
    yield "neighbor_mix", lambda: local_mix.neighbor_mix(code, weights, 28, 28)
    yield "neighbor_mix_grad", lambda: local_mix.neighbor_mix_grad(code, code, weights, 28, 28, True, True)


def _search_cases(x: torch.Tensor) -> Iterator[Case]:
    from hpkernels.ops.similarity_search import triton as search

    n, width = x.shape
    theta, groups, keys = torch.zeros(n), torch.zeros(n, dtype=torch.int64), torch.empty(2048, width, dtype=x.dtype)
    key_groups = torch.zeros(2048, dtype=torch.int64)
    yield f"max_similarity {width}", lambda: search.max_similarity(x, x)
    yield f"pairs_above {width}", lambda: search.pairs_above(x, theta, None, None)
    yield f"pairs_above keys {width}", lambda: search.pairs_above(x, theta, x, theta)
    for k in (1, 16, 32, 64, 128, 256, 300):
        yield f"topk {k} {width}", lambda k=k: search.topk_similarity(x, keys, k, True, None, None)
        yield f"topk {k} groups {width}", lambda k=k: search.topk_similarity(x, keys, k, False, groups, key_groups)


def _contrastive_stats_cases(x: torch.Tensor) -> Iterator[Case]:
    from hpkernels.ops.contrastive import triton as contrastive
    from hpkernels.ops.contrastive.masks import Masks

    (bits, turned, extra, extra_turned), negatives = _masks(x, 4), _negatives(x)
    forms = (
        ("all", (bits, None, None, None, None)),
        ("all", (bits, None, extra, None, None)),
        ("dense", (bits, None, extra, None, negatives)),
        ("dense", (bits, turned, extra, extra_turned, negatives)),
        ("sparse", (bits, None, extra, None, negatives)),
        ("sparse", (bits, None, None, None, None)),
    )
    for temperature, first_row, (mode, masks) in itertools.product((0.8, 0.01), (0, 32), forms):
        if first_row and mode == "sparse":  # the same kernels
            continue
        whole = Masks(*masks, mode, first_row)
        part = whole._replace(**{
            name: mask[first_row:] for name, mask in whole._asdict().items()
            if name.startswith(("positives", "extra")) and mask is not None
        })  # fmt: skip
        name = f"stats {mode} {sum(m is not None for m in masks)} from {first_row} {temperature}"
        yield name, functools.partial(contrastive.contrastive_stats, x[None], part, temperature)


def _contrastive_grad_cases(x: torch.Tensor) -> Iterator[Case]:
    from hpkernels.ops.contrastive import triton as contrastive
    from hpkernels.ops.contrastive.masks import Masks

    (bits, turned, extra, extra_turned), negatives = _masks(x, 4), _negatives(x)
    vector = torch.zeros(1, len(x))
    for mode, masks in (
        ("all", (bits, None, None, None, None)),
        ("all", (bits, None, extra, None, None)),
        ("dense", (bits, None, extra, None, negatives)),
        ("dense", (bits, turned, extra, extra_turned, negatives)),
        ("sparse", (bits, None, extra, None, negatives)),
        ("sparse", (bits, turned, extra, extra_turned, negatives)),
    ):
        routes = ("lists",) if mode == "sparse" else ("fused", "workspace")
        temperatures = (0.8, 0.04)[: len(routes)]  # lists ignore it
        routes = routes if x.shape[1] == MAIN_WIDTH else routes[:1]  # the workspace's tiles ignore the width
        for route, temperature in itertools.product(routes, temperatures):
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


# ------------------------------------------------------------------ the table

SHARE = 8  # kernels a process takes at a time
_wanted: dict[str, dict[str, Launch]] = {}  # what the processes, forks of this one, are to compile


def shipped(arch: str, only: Callable[[str], bool] = lambda case: True, **choice: tuple) -> dict[str, Launch]:
    """Every launch on `arch` by name, or those of the chosen cases; nothing is compiled."""
    with Recorder(arch, compile=False) as recorder:
        for case, call in cases(**CHOICE.get(arch, {}) | choice):
            if only(case):
                call()
    return recorder.calls


def version() -> str:
    """Of this Triton, as the table names its parts."""
    return ".".join(triton.__version__.split(".")[:2])


def recorded() -> dict[str, dict]:
    """{version of Triton: its part of the table}."""
    return json.loads(RESULTS.read_text()).get("tritons", {}) if RESULTS.exists() else {}


def check() -> list[str]:
    """What is wrong with the committed table: faults, and configurations that it lacks or has of an older source."""
    parts, launches = recorded(), {arch: shipped(arch) for arch in TARGETS}
    wrong = [f"Triton {missing}: no part of the table" for missing in sorted(set(TRITONS) - parts.keys())]
    for (of, part), (arch, now) in itertools.product(parts.items(), launches.items()):
        kernels, where = part["kernels"][arch], f"Triton {of}, {arch}"
        known = {_form(name, of): figures["source"] for name, figures in kernels.items()}
        wrong += [
            f"{where} {name}: {fault}" for name, figures in kernels.items() for fault in faults(name, arch, figures, of)
        ]
        stale = [name for name, launch in now.items() if known.get(_form(name, of)) != launch.source]
        wrong += [f"{where} {name}: changed or new; run `python -m tests.triton_kernels.aot`" for name in stale]
        gone = known.keys() - {_form(name, of) for name in now}
        wrong += [f"{where} {name}: no longer shipped" for name in sorted(gone)]
    return wrong


def _form(name: str, of: str) -> str:
    """A launch's name, without what this Triton and that of a part may differ in: the forms of fp32 products."""
    return name if of == version() else re.sub(r" PRECISION=\w+", "", name)


def compile_all(jobs: int) -> dict[str, dict]:
    """Figures by target and launch name; what this Triton's part has of the same source is not compiled again."""
    known = recorded().get(version(), {}).get("kernels", {})
    wanted, rows = {}, {}
    for arch in TARGETS:
        launches, old = shipped(arch), known.get(arch, {})
        kept = {name for name, row in old.items() if name in launches and row.get("source") == launches[name].source}
        rows[arch] = {name: old[name] for name in kept if "error" not in old[name]}
        wanted[arch] = {name: launch for name, launch in launches.items() if name not in rows[arch]}
    for arch, found in compile_launches(wanted, jobs).items():
        rows[arch] |= found
    return rows


def compile_launches(wanted: dict[str, dict[str, Launch]], jobs: int) -> dict[str, dict]:
    """Figures by target and launch name. The processes are forks, as launches cannot be sent to others."""
    _wanted.update(wanted)
    work = []
    for arch, launches in wanted.items():
        names = sorted(launches)
        work += [(arch, names[first : first + SHARE]) for first in range(0, len(names), SHARE)]
    rows: dict[str, dict] = {arch: {} for arch in wanted}
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork")) as pool:
        for (arch, _), found in zip(work, pool.map(_share, work), strict=True):
            rows[arch] |= found
    return rows


def _share(job: tuple[str, list[str]]) -> dict[str, dict]:
    arch, names = job
    launches = [_wanted[arch][name] for name in names]
    kernels = compile_for(arch, launches)
    return {
        name: resources(kernel) | {"source": launch.source}
        for name, launch, kernel in zip(names, launches, kernels, strict=True)
    }


def write(rows: dict[str, dict]) -> None:
    """This Triton's part in the place of its last; one line a kernel."""
    part = {
        "triton": triton.__version__,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
        "kernels": rows,
    }
    head = {
        "command": "python -m tests.triton_kernels.aot",
        "note": "compiled ahead of time; nothing here ran on a GPU",
        "tritons": recorded() | {version(): part},
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(_lines(head) + "\n")


def _lines(value: dict, depth: int = 0) -> str:
    """JSON with a line for each dict that holds no other."""
    if not any(isinstance(inner, dict) for inner in value.values()):
        return json.dumps(value, sort_keys=True)
    pad = " " * (depth + 1)
    rows = (
        f"{pad}{json.dumps(key)}: {_lines(inner, depth + 1) if isinstance(inner, dict) else json.dumps(inner)}"
        for key, inner in sorted(value.items())
    )
    return "{\n" + ",\n".join(rows) + "\n" + " " * depth + "}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare aot.json with the kernels; compile nothing")
    parser.add_argument("--match", help="compile the cases whose name contains this and print; write nothing")
    parser.add_argument("--widths", type=int, nargs="*", default=list(WIDTHS), help="with --match")
    parser.add_argument("--archs", nargs="*", choices=TARGETS, default=list(TARGETS), help="with --match")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.check:
        wrong = check()
        print(*wrong, sep="\n")
        return int(bool(wrong))
    began = time.monotonic()
    if arguments.match is None:
        rows = compile_all(arguments.jobs)
        write(rows)
    else:
        wanted = {}
        for arch in arguments.archs:
            widths = [width for width in CHOICE.get(arch, {}).get("widths", WIDTHS) if width in arguments.widths]
            wanted[arch] = shipped(arch, lambda case: arguments.match in case, widths=widths)
        rows = compile_launches(wanted, arguments.jobs)
    wrong = []
    for arch, kernels in rows.items():
        for name, figures in sorted(kernels.items()):
            print(f"{arch} {name}: " + ", ".join(f"{k} {v}" for k, v in figures.items() if k != "source"))
            wrong += [f"{arch} {name}: {fault}" for fault in faults(name, arch, figures, version())]
    used = [resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(use.ru_utime + use.ru_stime for use in used)
    number = sum(map(len, rows.values()))
    print(
        f"Triton {triton.__version__}: {number} kernels, {time.monotonic() - began:.0f} s, {seconds:.0f} of processors"
    )
    print(*wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

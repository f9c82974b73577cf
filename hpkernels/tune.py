"""Tune the contrastive op on the GPU at hand: `python -m hpkernels.tune [--op ...] [--out FILE]`.

The tiles and routes of the Triton kernels; and, asked for by --op backend/..., which backend is the faster one.

Synthetic tensors only, and only when asked: nothing is ever tuned inside a training step. For each op, dtype and shape
every candidate configuration is compiled; those that spill registers or need more than the GPU has are dropped; the
rest are timed, and the fastest one that agrees with the fp64 reference and repeats bit for bit 30 times is written.
Use the table with HPKERNELS_TUNING=FILE (see hpkernels.tuning).
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from hpkernels import dispatch, tuning

OPS = (  # the routes come last: they are compared with the tiles found before
    "contrastive_stats", "contrastive_stats_sparse", "contrastive_grad_fused", "contrastive_grad_workspace",
    "contrastive_grad_sparse", "contrastive_rows_sparse", "contrastive_columns_sparse", "contrastive_grad",
)  # fmt: skip
BACKENDS = tuple(
    f"backend/{name}/{form}" for name in ("contrastive_stats", "contrastive_grad") for form in ("dense", "sparse")
)  # after the tiles, too
CHOICES = ("contrastive_grad", *BACKENDS)  # between whole ways: what one has compiled is not its own
WIDTHS, ROWS = (64, 128, 256, 512, 768), (2048, 16384, 50176)
DTYPES = {"half": torch.bfloat16, "single": torch.float32}
REPEATS = 30
CHECK_ROWS = 384  # small enough for the fp64 reference, more than one tile of every candidate
TOLERANCE = {("stats", "half"): 1e-5, ("stats", "single"): 1e-5, ("grad", "half"): 1e-2, ("grad", "single"): 1e-5}

Call = Callable[[], tuple[Tensor, ...]]
Timer = Callable[[Call], float]  # milliseconds


def candidates(op: str, kind: str, d: int) -> list[dict]:
    """Configurations worth a try for rows of width d."""
    half = kind == "half"
    if op in BACKENDS:
        return [{"backend": name} for name in ("triton", "cuda") if dispatch.MISSING[name] is None]
    if op == "contrastive_grad":
        return [{"route": "fused"}, {"route": "workspace"}]
    sides, steps = ((64, 128), (64,)) if half else ((32, 64), (16,))
    found = []
    for warps, stages in itertools.product((4, 8), (2, 3, 4) if half else (1, 2)):
        launch = {"num_warps": warps, "num_stages": stages}
        if op in ("contrastive_stats", "contrastive_grad_workspace"):
            for m, n, k in itertools.product(sides, sides, steps):
                found.append({"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, **launch})
        elif op == "contrastive_stats_sparse":
            for k in (64, 128) if half else (16,):
                found.append({"BLOCK_C": 64, "BLOCK_R": 64 if half else 32, "BLOCK_K": k, **launch})
        else:
            whole = max(64, 1 << (d - 1).bit_length())
            widths = [(min(256, whole), False)] + ([(whole, True)] if half and whole <= 512 else [])
            tall = 64 if half else 32
            tiles = {
                "contrastive_grad_fused": [{"BLOCK_M": tall, "BLOCK_N": n} for n in (32, 64)],
                "contrastive_grad_sparse": [{"BLOCK_C": tall}],
                "contrastive_rows_sparse": [{"BLOCK_C": tall, "BLOCK_R": r} for r in (32, 64)],
                "contrastive_columns_sparse": [{"BLOCK_C": c, "BLOCK_R": tall} for c in (16, 32, 64)],
            }[op]
            for (width, resident), side in itertools.product(widths, tiles):
                found.append({**side, "BLOCK_D": width, "BLOCK_K": steps[0], "RESIDENT": resident, **launch})
    return [config for i, config in enumerate(found) if config not in found[:i]]


def problem(op: str, dtype: torch.dtype, d: int, n: int, device: torch.device) -> Callable[..., tuple[Tensor, ...]]:
    """run(module, dtype): `op` by a backend's module on random unit rows; P and Q 0.2 % dense, R = n / 4."""
    from hpkernels.ops.contrastive.masks import Masks
    from hpkernels.ops.pair_bits import triton as pair_bits

    def bits(seed: int, rows: int, rate: float) -> Tensor:
        return pair_bits.random_bits(torch.tensor(seed, device=device), rows, n, rate)

    generator = torch.Generator(device).manual_seed(0)
    x = torch.nn.functional.normalize(torch.randn(1, n, d, device=device, generator=generator), dim=-1).to(dtype)
    P, Q = bits(1, n, 0.002), bits(2, n, 0.002)
    sparse = op.endswith("sparse")
    negatives = bits(3, n // 4, 0.02 if sparse else 0.5)
    turned = [pair_bits.transpose_bits(pairs, n) for pairs in (P, Q)]
    masks = Masks(P, turned[0], Q, turned[1], negatives, "sparse" if sparse else "dense")
    vectors = [torch.randn(1, n, device=device, generator=generator) / n for _ in range(3)]
    vectors = [torch.full((1, n), float(torch.tensor(n).log()), device=device), *vectors]

    def run(module: ModuleType, as_dtype: torch.dtype = dtype) -> tuple[Tensor, ...]:
        rows = x.to(as_dtype)
        if "stats" in op:
            return tuple(module.contrastive_stats(rows, masks, 0.8))
        exact = [v.to(as_dtype) if as_dtype == torch.float64 else v for v in vectors]
        return (module.contrastive_grad(rows, masks, 0.8, *exact),)

    return run


def kernels_of(op: str, dtype: torch.dtype, d: int, n: int, device: torch.device) -> ModuleType:
    """The module that a choice in force is about."""
    backend = tuning.lookup(op, dtype, d, n, device)["backend"] if op in BACKENDS else "triton"
    return dispatch.implementation("contrastive", backend)


def agrees(op: str, dtype: torch.dtype, d: int, device: torch.device) -> bool:
    """Whether the configuration in force gives the fp64 reference's numbers on a small problem."""
    from hpkernels.ops.contrastive import reference

    run = problem(op, dtype, d, CHECK_ROWS, device)
    kernels = kernels_of(op, dtype, d, CHECK_ROWS, device)
    allowed = TOLERANCE["stats" if "stats" in op else "grad", tuning.dtype_class(dtype)]
    pairs = zip(run(kernels), run(reference, torch.float64), strict=True)
    return all((ours.double() - oracle).norm() <= allowed * oracle.norm() for ours, oracle in pairs)


def repeats(call: Call, times: int = REPEATS) -> bool:
    """Whether `call` gives the same bits every time."""
    first = call()
    return all(all(map(torch.equal, first, call())) for _ in range(times - 1))


def gpu_timer(call: Call) -> float:
    """Median milliseconds of a call, warm clocks and a cleared L2 between calls."""
    from triton.testing import do_bench

    return do_bench(call, warmup=50, rep=200, return_mode="median")


def spills() -> int:
    """Most bytes of registers that any contrastive kernel compiled so far in this process spills."""
    from triton.runtime.jit import JITFunction

    from hpkernels.ops.contrastive.triton import columns, dense, dense_grad, lists, sparse, sparse_grad

    most = 0
    for module in (columns, dense, dense_grad, lists, sparse, sparse_grad):
        for function in vars(module).values():
            if isinstance(function, JITFunction):
                for cache in function.device_caches.values():
                    most = max([most, *(kernel.n_spills or 0 for kernel in cache[0].values())])
                    cache[0].clear()
    return most


def _run(run: Callable[..., tuple[Tensor, ...]], *choice) -> tuple[Tensor, ...]:
    return run(kernels_of(*choice))


def best(
    configs: list[dict], op: str, call: Call, timer: Timer, check: Callable[[], bool], spilled: Callable[[], int]
) -> tuple[dict, float] | None:
    """The fastest configuration that compiles without spills, passes `check` and repeats, with its milliseconds."""
    timed = []
    for config in configs:
        with tuning.forced(op, config):
            spilled()
            try:
                call()
                if op not in CHOICES and spilled():
                    continue
                timed.append((timer(call), config))
            except Exception as error:  # the compiler or the GPU refuses a configuration in many ways: it is dropped
                print(f"  dropped {config}: {type(error).__name__}: {str(error).splitlines()[:1]}", file=sys.stderr)
    for milliseconds, config in sorted(timed, key=lambda pair: pair[0]):
        with tuning.forced(op, config):
            if check() and repeats(call):
                return config, milliseconds
    return None


def write(file: Path, found: list[dict], family: str) -> None:
    """Adds entries to a table, in place of those with the same key."""

    def key(entry: dict) -> tuple:
        return entry["op"], entry["dtype"], entry["d"], entry["log2_n"]

    old = json.loads(file.read_text())["entries"] if file.exists() else []
    new = {key(entry) for entry in found}
    rows = ",\n".join("  " + json.dumps(entry) for entry in [e for e in old if key(e) not in new] + found)
    file.write_text(f'{{\n "family": {json.dumps(family)},\n "entries": [\n{rows}\n ]\n}}\n')
    tuning.forget()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m hpkernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="*", choices=OPS + BACKENDS, default=list(OPS))
    parser.add_argument("--dtype", nargs="*", choices=list(DTYPES), default=["half"])
    parser.add_argument("--widths", nargs="*", type=int, default=list(WIDTHS), help="D")
    parser.add_argument("--rows", nargs="*", type=int, default=list(ROWS), help="N")
    parser.add_argument("--out", type=Path, default=Path("hpkernels_tuning.json"))
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("hpkernels.tune: no CUDA device here: nothing was tuned or written", file=sys.stderr)
        return 1
    device = torch.device("cuda", torch.cuda.current_device())
    print(f"{torch.cuda.get_device_name(device)}: {'op':28} {'dtype':6} {'D':>5} {'N':>7} {'ms':>9}  configuration")
    found = tune(options.op, options.dtype, options.widths, options.rows, device, gpu_timer, spills, options.out)
    print(f"{len(found)} entries in {options.out}; use them with HPKERNELS_TUNING={options.out.resolve()}")
    return 0


def tune(
    ops: list[str], kinds: list[str], widths: list[int], rows: list[int], device: torch.device,
    timer: Timer, spilled: Callable[[], int], out: Path,
) -> list[dict]:  # fmt: skip
    """Finds, prints and writes the best configuration of every op, dtype, width and number of rows; uses it at once."""
    found, today = [], datetime.date.today().isoformat()
    for op, kind, d, n in itertools.product([op for op in OPS + BACKENDS if op in ops], kinds, widths, rows):
        timed = partial(_run, problem(op, DTYPES[kind], d, n, device), op, DTYPES[kind], d, n, device)
        correct = partial(agrees, op, DTYPES[kind], d, device)
        winner = best(candidates(op, kind, d), op, timed, timer, correct, spilled)
        if winner is None:
            print(f"{op:28} {kind:6} {d:5} {n:7}         -  none passed")
            continue
        config, milliseconds = winner
        print(f"{op:28} {kind:6} {d:5} {n:7} {milliseconds:9.3f}  {config}", flush=True)
        entry = dict(op=op, dtype=kind, d=d, log2_n=n.bit_length() - 1, measured=today, config=config)
        found.append(entry)
        write(out, [entry], torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter")
        os.environ["HPKERNELS_TUNING"] = str(out)  # the routes are compared with the tiles found before
    return found


if __name__ == "__main__":
    sys.exit(main())

"""Compile every CUDA C++ kernel for GPUs that are not here, and keep what the compiler says of it.

    python -m tests.cuda.aot            brings benchmarks/results/aot_cuda.json up to date: compiles what has changed
    python -m tests.cuda.aot --check    whether the table is of the sources as they are now, and within limits

Needs nvcc for the first. No figure was measured on a GPU: registers, stack, spills and static shared memory are the
assembler's, instruction counts are from PTX.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import re
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
SOURCES = CSRC / "cuda"
RESULTS = ROOT / "benchmarks" / "results" / "aot_cuda.json"
ARCHS = ("80", "90a")
# Kernels that move rows of memory: their loads must be 16 bytes wide.
WIDE = ("count_bits", "transpose_bits", "symmetrize", "normalize_rows", "neighbor_mix", "cluster_assign", "cluster_sum",
        *(f"neighbor_weights_kernel<{kind}>" for kind in ("bf16, 8", "fp16, 8", "float, 4")))  # fmt: skip
COUNTS = {
    "mma": r"\bmma\.sync",
    "ldmatrix": r"\bldmatrix\.",
    "cp_async_16": r"\bcp\.async\.cg\S* .*?, 16\b",
    "loads_16": r"\bld\.global\S*\.v4\.[bfsu]32|\bld\.global\S*\.v2\.[bfsu]64",
}
DYNAMIC_SHARED = {
    "tiles of products": "32 KiB for each of a kernel's 2 or 3 stages of 128 x 128 tiles",
    "cluster_assign_kernel": "80 KiB for 16-bit rows, 48 KiB for fp32; cluster_total_kernel: 2 KiB",
    "neighbor_weights_kernel": "4 (T + 288) bytes a warp, T tokens; as many warps as fit 48 KiB, at most 8",
    "set_pairs_kernel": "8 KiB",
    "transpose_bits_kernel, symmetrize_kernel": "2 and 4 KiB",
}


def sources() -> dict[str, Path]:
    """The files with kernels, by their place in csrc/cuda."""
    return {str(path.relative_to(SOURCES)): path for path in SOURCES.rglob("*.cu")}


def source_hash(source: Path) -> str:
    """Of a file and all of ours that it includes, without comments and white space."""
    texts, pending = {}, [source.resolve()]
    while pending:
        path = pending.pop()
        if path in texts:
            continue
        code = re.sub(r"//.*", "", path.read_text())
        texts[path] = "".join(code.split())
        included = [CSRC / name for name in re.findall(r'#include "([^"]+)"', code)]
        pending += [header for header in included if header.exists()]
    return hashlib.sha256("".join(texts[path] for path in sorted(texts)).encode()).hexdigest()[:16]


def compile_kernels(source: Path, arch: str) -> dict[str, dict[str, int]]:
    """Figures of the kernels of one file, by name with its template arguments."""
    with tempfile.TemporaryDirectory() as folder:
        includes = [f"-I{path}" for path in (CSRC, pybind11.get_include(), sysconfig.get_path("include"))]
        target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
        command = ["nvcc", "-std=c++17", "-O3", *includes, target, "-cubin", "-Xptxas", "-v", "--keep", "--keep-dir",
                   folder, str(source), "-o", f"{folder}/kernels.cubin"]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{source.name} for sm_{arch}:\n{done.stderr}")
        (ptx,) = Path(folder).glob("*.ptx")
        bodies = dict(re.findall(r"\.entry (\w+)\((.*?)\n}", ptx.read_text(), re.S))
    kernels = {}
    for mangled, report in re.findall(r"Compiling entry function '(\w+)'.*?\n(.*?Used [^\n]*)", done.stderr, re.S):
        numbers = {
            "registers": r"Used (\d+) registers",
            "stack": r"(\d+) bytes stack frame",
            "spill_stores": r"(\d+) bytes spill stores",
            "spill_loads": r"(\d+) bytes spill loads",
            "shared": r"(\d+) bytes smem",
        }
        found = {name: re.search(pattern, report) for name, pattern in numbers.items()}
        figures = {name: int(match[1]) if match else 0 for name, match in found.items()}
        counts = {name: len(re.findall(pattern, bodies[mangled])) for name, pattern in COUNTS.items()}
        kernels[_readable(mangled)] = figures | counts
    return kernels


def _readable(mangled: str) -> str:
    name = subprocess.run(["c++filt", mangled], check=True, capture_output=True, text=True).stdout.strip()
    name = re.sub(r"\(anonymous namespace\)::|hpk::gpu::|\bvoid ", "", name)
    depth = 0
    for at, letter in enumerate(name):  # up to the list of arguments: the first bracket outside <>
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return name[:at]
    return name


def faults(kernel: str, figures: dict[str, int]) -> list[str]:
    """What a kernel may not do."""
    found = [f"{figures[name]} bytes of {name}" for name in ("stack", "spill_stores", "spill_loads") if figures[name]]
    half = "bf16" in kernel or "fp16" in kernel
    if half and figures["cp_async_16"] and not (figures["mma"] and figures["ldmatrix"]):
        found.append(f"{figures['mma']} mma and {figures['ldmatrix']} ldmatrix instructions")
    if figures["mma"] and not figures["cp_async_16"] + figures["loads_16"]:
        found.append("products of operands that are not copied 16 bytes at a time")
    if kernel.startswith(WIDE) and not figures["loads_16"]:
        found.append("no load of 16 bytes")
    return found


def table_faults(files: dict[str, dict]) -> list[str]:
    return [
        f"{file} sm_{arch} {kernel}: {fault}"
        for file, entry in files.items()
        for arch, kernels in entry["kernels"].items()
        for kernel, figures in kernels.items()
        for fault in faults(kernel, figures)
    ]


def check() -> list[str]:
    """What is wrong with the committed table: faults, and files that it lacks or has in an older form."""
    files = recorded()
    return [f"{name}: changed, new or gone: `python -m tests.cuda.aot`" for name in stale(files)] + table_faults(files)


def recorded() -> dict[str, dict]:
    return json.loads(RESULTS.read_text())["files"] if RESULTS.exists() else {}


def stale(files: dict[str, dict]) -> list[str]:
    """Names of files that a table does not have as they are now, or has although they are gone."""
    hashes = {name: source_hash(path) for name, path in sources().items()}
    return sorted(name for name in hashes | files if files.get(name, {}).get("source") != hashes.get(name))


def compile_all(names: list[str], jobs: int) -> dict[str, dict]:
    work = [(SOURCES / name, arch) for name in names for arch in ARCHS]
    with ThreadPoolExecutor(jobs) as pool:
        done = list(pool.map(lambda job: compile_kernels(*job), work))
    files = {name: {"source": source_hash(SOURCES / name), "kernels": {}} for name in names}
    for (source, arch), kernels in zip(work, done, strict=True):
        files[str(source.relative_to(SOURCES))]["kernels"][arch] = kernels
    return files


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare aot_cuda.json with the sources; compile nothing")
    parser.add_argument("--files", nargs="*", help="compile these and print; write nothing")
    parser.add_argument("--all", action="store_true", help="compile files that have not changed, too")
    parser.add_argument("--jobs", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.check:
        wrong = check()
    else:
        known = {} if arguments.files or arguments.all else recorded()
        names = arguments.files or [name for name in stale(known) if (SOURCES / name).exists()]
        files = known | compile_all(names, arguments.jobs)
        files = {name: entry for name, entry in files.items() if (SOURCES / name).exists()}
        wrong = table_faults(files)
        for file, entry in files.items():
            for arch, kernels in entry["kernels"].items():
                for kernel, figures in sorted(kernels.items()):
                    print(f"{file} sm_{arch} {kernel}: " + ", ".join(f"{k} {v}" for k, v in figures.items()))
        if not arguments.files:
            version = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
            head = {
                "command": "python -m tests.cuda.aot",
                "date": datetime.date.today().isoformat(),
                "nvcc": re.search(r"release .*?, V(\S+)", version)[1],
                "note": "compiled ahead of time; nothing here ran on a GPU",
                "dynamic_shared": DYNAMIC_SHARED,
            }
            RESULTS.write_text(json.dumps({**head, "files": files}, indent=1, sort_keys=True) + "\n")
    print(*wrong, sep="\n")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

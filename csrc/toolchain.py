"""What setup.py builds with: the compilers that this machine has, and what the environment variables ask for.

Every wrong value is one sentence, before anything is compiled.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mpopcnt"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
AVX512_BF16 = [*AVX512, "-mavx512bf16", "-mavx512vnni"]
# From the oldest to the newest: each contains the ones before it.
ISAS = {"baseline": [], "avx2": AVX2, "avx512": AVX512, "avx512_bf16": AVX512_BF16}

CUDA_ARCHS = "80;90a;90-virtual"
OLDEST_CUDA_ARCH = 80  # asynchronous copies and bf16 products
# One release for all parts, and the first of CUDA 13: PTX of a later one needs a later driver.
CUDA_PACKAGES = [f"nvidia-{part}==13.0.*" for part in ("cuda-nvcc", "nvvm", "cuda-crt", "cuda-runtime")]

NO_COMPILER = (
    "hpkernels needs a C++17 compiler (GCC 9 or Clang 10, or newer) to build, and {name!r} was not found: install one "
    "with `apt install g++` (Debian, Ubuntu), `dnf install gcc-c++` (Fedora) or `xcode-select --install` (macOS), "
    "or name yours in the environment variable CXX."
)
NO_CUDA_COMPILER = (
    "no CUDA compiler was found (nvcc in CUDA_HOME or on the PATH; an isolated build on Linux, as `pip install` makes "
    "by default, fetches one from the package index)"
)


def find_compiler() -> list[str]:
    """The C++ compiler as a command: CXX, else the first usual name on the PATH."""
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [["c++"], ["g++"], ["clang++"]]
    for command in candidates:
        if shutil.which(command[0]):
            return command
    raise SystemExit(NO_COMPILER.format(name=candidates[0][0]))


def wanted_isas() -> list[str]:
    newest = os.environ.get("HPKERNELS_CPU_MAX_ISA", "") or list(ISAS)[-1]
    if newest not in ISAS:
        raise SystemExit(f"HPKERNELS_CPU_MAX_ISA must be one of {', '.join(ISAS)}, got {newest!r}")
    return list(ISAS)[: list(ISAS).index(newest) + 1]


def accepts(compiler: list[str], flags: list[str]) -> bool:
    """Whether the compiler knows the instruction-set flags and targets an x86-64 machine."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <immintrin.h>\nint main() { return 0; }\n")
        command = [*compiler, *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def job_count() -> int:
    text = os.environ.get("HPKERNELS_JOBS", "") or str(os.cpu_count() or 1)
    if not text.isdigit() or int(text) < 1:
        raise SystemExit(f"HPKERNELS_JOBS must be a positive integer, got {text!r}")
    return int(text)


def cuda_wanted() -> str:
    text = os.environ.get("HPKERNELS_CUDA", "") or "auto"
    if text not in ("0", "1", "auto"):
        raise SystemExit(f"HPKERNELS_CUDA must be 0, 1 or auto, got {text!r}")
    return text


def find_nvcc() -> str | None:
    """The CUDA compiler: of CUDA_HOME, of the PATH, or of the compiler packages in this environment; None without."""
    home = os.environ.get("CUDA_HOME")
    installed = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None
    installed = installed or shutil.which("nvcc")
    if installed:
        return installed
    found = (path for folder in sys.path for path in sorted(Path(folder).glob("nvidia/cu*/bin/nvcc")))
    return next((str(path) for path in found if (path.parents[1] / "nvvm/bin/cicc").exists()), None)


def cuda_archs() -> list[str]:
    """The targets as names of the compiler: sm_80 is machine code, compute_90 is PTX.

    HPKERNELS_CUDA_ARCHS lists them, "80" for machine code, "90-virtual" for PTX, from which drivers compile for what
    comes after, "90+PTX" for both. The default is the machine code of the GPUs here or, as by "all", CUDA_ARCHS.
    """
    text = os.environ.get("HPKERNELS_CUDA_ARCHS", "") or present_archs() or "all"
    text = CUDA_ARCHS if text == "all" else text
    archs = []
    for entry in filter(None, re.split(r"[;, ]+", text)):
        match = re.fullmatch(r"(\d+)(a?)(-virtual|\+PTX)?", entry)
        if match is None or int(match[1]) < OLDEST_CUDA_ARCH:
            raise SystemExit(
                f"HPKERNELS_CUDA_ARCHS must list targets such as {CUDA_ARCHS!r}, {OLDEST_CUDA_ARCH} or newer, "
                f"got {entry!r} in {text!r}"
            )
        name = match[1] + match[2]
        archs += [f"sm_{name}"] * (match[3] != "-virtual") + [f"compute_{name}"] * (match[3] is not None)
    if not archs:
        raise SystemExit(f"HPKERNELS_CUDA_ARCHS must list targets such as {CUDA_ARCHS!r}, got {text!r}")
    return list(dict.fromkeys(archs))


def present_archs() -> str:
    """HPKERNELS_CUDA_ARCHS for the GPUs of this machine; empty where there are none, or one that needs more than these.

    A GPU newer than Hopper runs the PTX, so that the compiler need not know it.
    """
    if not shutil.which("nvidia-smi"):
        return ""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    said = subprocess.run(query, capture_output=True, text=True).stdout.split()
    known = {"8.0": "80", "8.6": "86", "8.7": "87", "8.9": "89", "9.0": "90a"}
    return ";".join(sorted({known[gpu] for gpu in said})) if said and known.keys() >= set(said) else ""


def code_flags(archs: list[str]) -> list[str]:
    """Each PTX is made once, and machine code from it: that of sm_90a too, whose own instructions nothing here uses."""
    targets: dict[str, list[str]] = {}
    for arch in archs:
        number = arch.partition("_")[2]
        plain = f"compute_{number.rstrip('a')}"
        targets.setdefault(plain if plain in archs else f"compute_{number}", []).append(arch)
    return [f"-gencode=arch={virtual},code=[{','.join(codes)}]" for virtual, codes in targets.items()]


def lasting(nvcc: str, link: Path) -> str:
    """The compiler by a path that the next build has too: an isolated one has the packages in a place of its own."""
    packages = Path(nvcc).parents[1]
    if packages.parent.name != "nvidia":
        return nvcc
    link.unlink(missing_ok=True)
    link.symlink_to(packages)
    return str(link / "bin" / "nvcc")

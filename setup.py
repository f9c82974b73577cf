"""Builds hpkernels' native extensions. No torch is needed at build time: they take raw pointers.

Each extension is a folder of C++ sources and a builder: `hpkernels._cpu` is always built; an optional extension joins
by adding a `NativeExtension` to `extensions()` and a `build_<name>` method.

csrc/cpu/*.cpp            compiled once, for the oldest CPU of the architecture: bindings, thread pool, dispatch
csrc/cpu/kernels/*.cpp    compiled once per instruction set of `KERNELS`, inside the namespace given by -DHPK_ISA
csrc/cpu/kernels_bf16/    likewise for the instruction sets with bf16 products, `KERNELS_BF16`

Environment: CXX (the compiler), HPKERNELS_JOBS (parallel compilations, default: all CPUs).
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi", "-mbmi2", "-mlzcnt", "-mpopcnt"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
AVX512_BF16 = [*AVX512, "-mavx512bf16", "-mavx512vnni"]
# Ordered: each set contains the ones before it. The link order below relies on that.
KERNELS = {"baseline": [], "avx2": AVX2, "avx512": AVX512}
KERNELS_BF16 = {"avx512_bf16": AVX512_BF16}

NO_COMPILER = (
    "hpkernels needs a C++17 compiler (GCC 9 or Clang 10, or newer) to build, and {name!r} was not found: install one "
    "with `apt install g++` (Debian, Ubuntu), `dnf install gcc-c++` (Fedora) or `xcode-select --install` (macOS), "
    "or name yours in the environment variable CXX."
)


class NativeExtension(Extension):
    """An extension whose sources are found in `folder` by the builder of the same name."""

    def __init__(self, name: str, folder: str):
        sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*.cpp"))
        headers = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.h"))
        super().__init__(name, sources=sources, depends=headers, language="c++")
        self.folder = ROOT / folder


class BuildNative(build_ext):
    def build_extension(self, ext):
        getattr(self, "build" + ext.name.rpartition(".")[2])(ext)

    def build_cpu(self, ext):
        import pybind11

        compiler = _find_compiler()
        variants = KERNELS | KERNELS_BF16
        isas = [name for name, flags in variants.items() if name == "baseline" or _accepts(compiler, flags)]
        includes = [f"-I{path}" for path in (ROOT / "csrc", pybind11.get_include(), *_python_includes())]
        common = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno",
                  "-fno-trapping-math", "-pthread", "-Wall", "-Wextra", "-Wno-psabi",
              # GCC 12 finds its own intrinsics headers wanting.
              "-Wno-unknown-warning-option", "-Wno-uninitialized", "-Wno-maybe-uninitialized", *includes]
        common += [f"-DHPK_HAVE_{name.upper()}=1" for name in isas]
        temp = Path(self.build_temp) / "cpu"
        jobs = [(source, temp / f"{source.stem}.o", common) for source in sorted(ext.folder.glob("*.cpp"))]
        # Inline functions of the standard library may be emitted by several variants, and the linker keeps the first
        # it meets: objects are linked from the oldest instruction set to the newest, so that copy runs everywhere.
        for subfolder, variants in (("kernels", KERNELS), ("kernels_bf16", KERNELS_BF16)):
            for isa in (name for name in variants if name in isas):
                for source in sorted((ext.folder / subfolder).glob("*.cpp")):
                    flags = [*common, *variants[isa], f"-DHPK_ISA={isa}", f"-DHPK_ISA_{isa.upper()}=1"]
                    jobs.append((source, temp / isa / f"{source.stem}.o", flags))
        newest_header = max(Path(ROOT, path).stat().st_mtime for path in [*ext.depends, "setup.py"])
        stale = [job for job in jobs if self.force or not _is_current(*job[:2], newest_header)]
        with ThreadPoolExecutor(_job_count()) as pool:
            list(pool.map(lambda job: _compile(compiler, *job), stale))
        self._link(compiler, ext, [str(output) for _, output, _ in jobs])

    def _link(self, compiler, ext, objects):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared", "-Wl,-s"]
        _run([*compiler, *shared, *objects, "-pthread", "-o", str(target)])


def _find_compiler():
    """The C++ compiler as a command: CXX, else the first usual name on the PATH."""
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [["c++"], ["g++"], ["clang++"]]
    for command in candidates:
        if shutil.which(command[0]):
            return command
    raise SystemExit(NO_COMPILER.format(name=candidates[0][0]))


def _accepts(compiler, flags):
    """Whether the compiler knows the instruction-set flags and targets an x86-64 machine."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <immintrin.h>\nint main() { return 0; }\n")
        command = [*compiler, *flags, "-c", str(source), "-o", str(source.with_suffix(".o"))]
        return subprocess.run(command, capture_output=True).returncode == 0


def _python_includes():
    import sysconfig

    return dict.fromkeys(sysconfig.get_path(name) for name in ("include", "platinclude"))


def _is_current(source, output, newest_header):
    return output.exists() and output.stat().st_mtime > max(source.stat().st_mtime, newest_header)


def _compile(compiler, source, output, flags):
    output.parent.mkdir(parents=True, exist_ok=True)
    _run([*compiler, *flags, "-c", str(source), "-o", str(output)])


def _run(command):
    result = subprocess.run(command, capture_output=True, text=True)
    if result.stderr:
        print(result.stderr, file=sys.stderr)
    if result.returncode:
        raise SystemExit(f"hpkernels: this command failed with status {result.returncode}:\n{shlex.join(command)}")


def _job_count():
    text = os.environ.get("HPKERNELS_JOBS", "") or str(os.cpu_count() or 1)
    if not text.isdigit() or int(text) < 1:
        raise SystemExit(f"HPKERNELS_JOBS must be a positive integer, got {text!r}")
    return int(text)


def extensions():
    return [NativeExtension("hpkernels._cpu", "csrc/cpu")]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative})

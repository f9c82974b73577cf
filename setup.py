"""Builds hpkernels' native extensions. No torch is needed at build time: they take raw pointers.

Each extension is a folder of C++ sources and a `build_<name>` method: `hpkernels._cpu` is always built,
`hpkernels._cuda` when a CUDA compiler can be had.

csrc/cpu/*.cpp            compiled once, for the oldest CPU of the architecture: bindings, thread pool, dispatch
csrc/cpu/kernels/*.cpp    compiled once per instruction set of `KERNELS`, inside the namespace given by -DHPK_ISA
csrc/cpu/kernels_bf16/    likewise for the instruction sets with bf16 products, `KERNELS_BF16`
csrc/cuda/*.cu, *.cpp     each compiled once by nvcc, for all targets of HPKERNELS_CUDA_ARCHS

The CUDA compiler is $CUDA_HOME/bin/nvcc, else nvcc on the PATH, else (Linux) that of NVIDIA's compiler packages, which
an isolated build fetches as build requirements.

Environment: CXX (the compiler), HPKERNELS_JOBS (parallel compilations, default: all CPUs), HPKERNELS_CPU_MAX_ISA (the
newest instruction set that _cpu is built for, default: all that the compiler knows), HPKERNELS_CUDA (0: build without
_cuda; 1: fail without a CUDA compiler; auto), HPKERNELS_CUDA_ARCHS (default "80;90a;90-virtual": machine code for sm_80
and sm_90a, and PTX for 90, from which drivers compile for what comes after; "90+PTX" means both).
"""

import os
import platform
import re
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


class NativeExtension(Extension):
    """An extension whose sources are found in `folder` by the builder of the same name."""

    def __init__(self, name: str, folder: str):
        self.folder = ROOT / folder
        headers = [*_files(ROOT / "csrc/shared", ".h"), *_files(self.folder, ".h", ".cuh")]
        super().__init__(name, sources=_files(self.folder, ".cpp", ".cu"), depends=headers, language="c++")


class BuildNative(build_ext):
    def run(self):
        if _cuda_wanted() != "0" and _find_nvcc() is None:
            print(f"hpkernels: built without hpkernels._cuda: {NO_CUDA_COMPILER}", file=sys.stderr)
        super().run()
        if all(extension.name != "hpkernels._cuda" for extension in self.extensions):
            # One of an earlier build would go into the package, though this build is without.
            Path(self.get_ext_fullpath("hpkernels._cuda")).unlink(missing_ok=True)

    def build_extension(self, ext):
        getattr(self, "build" + ext.name.rpartition(".")[2])(ext)

    def build_cpu(self, ext):
        import pybind11

        compiler = _find_compiler()
        variants = KERNELS | KERNELS_BF16
        isas = [name for name in _wanted_isas() if name == "baseline" or _accepts(compiler, variants[name])]
        includes = [f"-I{path}" for path in (ROOT / "csrc", pybind11.get_include(), *_python_includes())]
        common = [
            "-std=c++17",
            *self._optimisation(),
            "-fPIC",
            "-fvisibility=hidden",
            "-ffp-contract=fast",
            "-fno-math-errno",
            "-fno-trapping-math",
            "-pthread",
            "-Wall",
            "-Wextra",
            "-Wno-psabi",
            # GCC 12 finds its own intrinsics headers wanting.
            "-Wno-unknown-warning-option",
            "-Wno-uninitialized",
            "-Wno-maybe-uninitialized",
            *includes,
        ]
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
        self._compile([(source, output, [*compiler, *flags]) for source, output, flags in jobs], ext)
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
        if not self.debug and sys.platform != "darwin":
            shared.append("-Wl,-s")
        self._link(ext, [*compiler, *shared, *(str(output) for _, output, _ in jobs), "-pthread"])

    def _optimisation(self):
        """Of a debug build, `build_ext --debug`: what sanitizers (.ci/sanitize) and debuggers read best."""
        return ["-O1", "-g1", "-D_GLIBCXX_ASSERTIONS"] if self.debug else ["-O3"]

    def build_cuda(self, ext):
        import pybind11

        nvcc, archs = _find_nvcc(), _cuda_archs()
        command = [nvcc, *_host_compiler()]
        includes = [f"-I{path}" for path in (ROOT / "csrc", pybind11.get_include(), *_python_includes())]
        flags = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", *includes, *_code_flags(archs)]
        flags.append(f'-DHPK_CUDA_ARCHS="{";".join(archs)}"')
        # Objects for other targets lie elsewhere, so that a change of the targets compiles anew.
        temp = Path(self.build_temp) / "cuda" / "_".join(archs)
        # The long ones first: started last, one would be compiled alone while other processors wait.
        kernels = sorted(ext.folder.glob("*.cu"), key=lambda path: -path.stat().st_size)
        sources = [*kernels, *sorted(ext.folder.glob("*.cpp"))]
        jobs = [(source, temp / f"{source.name}.o", [*command, *flags]) for source in sources]
        self._compile(jobs, ext)
        libraries = Path(nvcc).resolve().parents[1] / "lib"  # where the compiler packages have them
        link = [*command, "-shared", "-cudart", "static", f"-L{libraries}", "-Xlinker", "-s,--exclude-libs=ALL"]
        self._link(ext, [*link, *(str(output) for _, output, _ in jobs)])

    def _compile(self, jobs, ext):
        """Runs `command -c source -o output` for those (source, output, command) that are not up to date."""
        newest_header = max(Path(ROOT, path).stat().st_mtime for path in [*ext.depends, "setup.py"])
        stale = [job for job in jobs if self.force or not _is_current(*job[:2], newest_header)]
        with ThreadPoolExecutor(_job_count()) as pool:
            list(pool.map(lambda job: _compile(*job), stale))

    def _link(self, ext, command):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        _run([*command, "-o", str(target)])


def _files(folder, *suffixes):
    return sorted(str(path.relative_to(ROOT)) for path in folder.rglob("*") if path.suffix in suffixes)


def _find_compiler():
    """The C++ compiler as a command: CXX, else the first usual name on the PATH."""
    named = shlex.split(os.environ.get("CXX", ""))
    candidates = [named] if named else [["c++"], ["g++"], ["clang++"]]
    for command in candidates:
        if shutil.which(command[0]):
            return command
    raise SystemExit(NO_COMPILER.format(name=candidates[0][0]))


def _wanted_isas():
    known = [*KERNELS, *KERNELS_BF16]
    newest = os.environ.get("HPKERNELS_CPU_MAX_ISA", "") or known[-1]
    if newest not in known:
        raise SystemExit(f"HPKERNELS_CPU_MAX_ISA must be one of {', '.join(known)}, got {newest!r}")
    return known[: known.index(newest) + 1]


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


def _compile(source, output, command):
    output.parent.mkdir(parents=True, exist_ok=True)
    _run([*command, "-c", str(source), "-o", str(output)])


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


def _cuda_wanted():
    text = os.environ.get("HPKERNELS_CUDA", "") or "auto"
    if text not in ("0", "1", "auto"):
        raise SystemExit(f"HPKERNELS_CUDA must be 0, 1 or auto, got {text!r}")
    return text


def _find_nvcc():
    """The CUDA compiler: of CUDA_HOME, of the PATH, or of the compiler packages in this environment; None without."""
    home = os.environ.get("CUDA_HOME")
    installed = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else None
    installed = installed or shutil.which("nvcc")
    if installed:
        return installed
    found = (path for folder in sys.path for path in sorted(Path(folder).glob("nvidia/cu*/bin/nvcc")))
    return next((str(path) for path in found if (path.parents[1] / "nvvm/bin/cicc").exists()), None)


def _host_compiler():
    compiler = _find_compiler()
    return ["-ccbin", compiler[0]] if len(compiler) == 1 else []


def _cuda_archs():
    """HPKERNELS_CUDA_ARCHS as names of the compiler: sm_80 is machine code, compute_90 is PTX."""
    text = os.environ.get("HPKERNELS_CUDA_ARCHS", "") or CUDA_ARCHS
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


def _code_flags(archs):
    pairs = ((f"compute_{arch.partition('_')[2]}", arch) for arch in archs)
    return [f"-gencode=arch={virtual},code={code}" for virtual, code in pairs]


def extensions():
    cpu, cuda = NativeExtension("hpkernels._cpu", "csrc/cpu"), NativeExtension("hpkernels._cuda", "csrc/cuda")
    if _cuda_wanted() == "0":
        return [cpu]
    _cuda_archs()  # a wrong value is an error before anything is compiled
    if _find_nvcc() is not None:
        return [cpu, cuda]
    if _cuda_wanted() == "1" and not _asked_for_requirements():
        raise SystemExit(f"HPKERNELS_CUDA is 1, but {NO_CUDA_COMPILER}")
    return [cpu]


def build_requirements():
    """What an isolated build installs besides pyproject.toml's requirements."""
    missing = _cuda_wanted() != "0" and _find_nvcc() is None
    machine = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
    return CUDA_PACKAGES if missing and machine and _asked_for_requirements() else []


def _asked_for_requirements():
    """Whether a build front end asks for `build_requirements`; a plain `python setup.py` would fetch them itself."""
    return "setuptools.build_meta" in sys.modules and sys.argv[1:2] == ["egg_info"]


setup(ext_modules=extensions(), setup_requires=build_requirements(), cmdclass={"build_ext": BuildNative})

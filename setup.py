"""Builds hpkernels' native extensions through ninja. No torch is needed at build time: they take raw pointers.

`hpkernels._cpu` is always built, `hpkernels._cuda` when a CUDA compiler can be had. csrc/toolchain.py
finds the compilers, csrc/ninja_file.py has their commands:

csrc/cpu/**/*.isa.cpp     compiled once per instruction set, inside the namespace given by -DHPK_ISA
csrc/cpu/**/*.bf16.cpp    likewise for the instruction sets with bf16 products
csrc/cpu/**/*.cpp         the others once, for the oldest CPU of the architecture
csrc/cuda/**/*.cu         by nvcc, for all targets of HPKERNELS_CUDA_ARCHS; *.cpp there by the C++ compiler
csrc/shared/*.cpp         once for each extension

Objects stay in build/, so that the next build, of whichever kind, compiles what has changed. Beside its place in the
package, what was built also goes into the hpkernels/ here: whoever runs Python in a clone runs compiled code.

Environment: CXX (the compiler), HPKERNELS_JOBS (parallel compilations, default: all CPUs), HPKERNELS_CPU_MAX_ISA (the
newest instruction set that _cpu is built for, default: all that the compiler knows), HPKERNELS_CUDA (0: build without
_cuda; 1: fail without a CUDA compiler; auto), HPKERNELS_CUDA_ARCHS (targets, see `toolchain.cuda_archs`).
"""

import platform
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))  # a build front end does not have it there
import toolchain  # noqa: E402

source_hash = runpy.run_path(str(ROOT / "hpkernels/common/sources.py"))["source_hash"]


class BuildNative(build_ext):
    def finalize_options(self):
        given = self.build_temp
        super().finalize_options()
        # Not setuptools' own choice, which for an editable install is a temporary folder.
        kind = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}{'-debug' * bool(self.debug)}"
        self.folder = Path(given or ROOT / "build" / kind).resolve()

    def run(self):
        if toolchain.cuda_wanted() != "0" and toolchain.find_nvcc() is None:
            print(f"hpkernels: built without hpkernels._cuda: {toolchain.NO_CUDA_COMPILER}", file=sys.stderr)
        super().run()

    def build_extensions(self):
        import ninja
        from ninja_file import NinjaFile

        jobs = toolchain.job_count()
        if self.force:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        names = [extension.name for extension in self.extensions]
        with open(self.folder / "build.ninja", "w") as file:
            NinjaFile(self.folder, bool(self.debug), source_hash).write(file, names)
        program = Path(ninja.BIN_DIR, "ninja")
        run = [str(program) if program.is_file() else "ninja"]  # pip puts that of an isolated build on the PATH
        if subprocess.run([*run, "-j", str(jobs)], cwd=self.folder).returncode:
            raise SystemExit("hpkernels: the command above failed; its compiler says why")
        for name in ("hpkernels._cpu", "hpkernels._cuda"):
            places = [Path(self.get_ext_fullpath(name))]
            places += [] if self.debug else [ROOT / self.get_ext_filename(name)]
            for place in places:
                _put(self.folder / f"{name}.so" if name in names else None, place)
        if not self.debug:
            commands = subprocess.run([*run, "-t", "compdb"], cwd=self.folder, capture_output=True).stdout
            (ROOT / "build").mkdir(exist_ok=True)
            (ROOT / "build" / "compile_commands.json").write_bytes(commands)  # where editors look


def _put(library, place):
    """Replaces what lies there, which may be in use; by nothing, where a build is without the extension."""
    if library is None:
        return place.unlink(missing_ok=True)
    place.parent.mkdir(parents=True, exist_ok=True)
    part = place.with_suffix(".part")
    shutil.copy(library, part)
    return part.replace(place)


def extensions():
    cpu, cuda = Extension("hpkernels._cpu", []), Extension("hpkernels._cuda", [])
    if toolchain.cuda_wanted() == "0":
        return [cpu]
    toolchain.cuda_archs()  # a wrong value is an error before anything is compiled
    if toolchain.find_nvcc() is not None:
        return [cpu, cuda]
    if toolchain.cuda_wanted() == "1" and not asked_for_requirements():
        raise SystemExit(f"HPKERNELS_CUDA is 1, but {toolchain.NO_CUDA_COMPILER}")
    return [cpu]


def build_requirements():
    """What an isolated build installs besides pyproject.toml's requirements."""
    missing = toolchain.cuda_wanted() != "0" and toolchain.find_nvcc() is None
    machine = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
    return toolchain.CUDA_PACKAGES if missing and machine and asked_for_requirements() else []


def asked_for_requirements():
    """Whether a build front end asks for `build_requirements`; a plain `python setup.py` would fetch them itself."""
    return "setuptools.build_meta" in sys.modules and sys.argv[1:2] == ["egg_info"]


setup(ext_modules=extensions(), setup_requires=build_requirements(), cmdclass={"build_ext": BuildNative})

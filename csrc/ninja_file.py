"""What ninja is told: the commands that compile and link the extensions, with paths that the next build has too."""

from __future__ import annotations

import filecmp
import os
import shlex
import shutil
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import ninja
import pybind11
import toolchain

CSRC = Path(__file__).resolve().parent
SMALL = ["-O1"]  # for bindings, which compute nothing


class NinjaFile:
    """Objects go to `folder`, and so do the extensions, as NAME.so; `source_hash` gives that of each."""

    def __init__(self, folder: Path, debug: bool, source_hash: Callable[[str], str]):
        self.folder, self.debug, self.source_hash = folder, debug, source_hash
        self.compiler = toolchain.find_compiler()
        # Copied, as an isolated build unpacks it to another place each time.
        headers = folder / "include"
        shutil.copytree(pybind11.get_include(), headers, copy_function=_copy_changed, dirs_exist_ok=True)
        python = dict.fromkeys(sysconfig.get_path(name) for name in ("include", "platinclude"))
        self.common = ["-std=c++17", *(f"-I{path}" for path in (CSRC, headers, *python))]
        self.host = [*self.compiler, *self.common, "-fPIC", "-fvisibility=hidden", "-pthread"]

    def write(self, file: TextIO, names: list[str]) -> None:
        self.ninja = ninja.Writer(file, width=120)
        depends = {"depfile": "$out.d", "deps": "gcc"}
        self.ninja.rule("compile", "$tool -MMD -MF $out.d -c $in -o $out", description="compile $out", **depends)
        self.ninja.rule("link", "$tool $in -o $out $libraries", description="link $out")
        for name in reversed(names):  # the CUDA kernels first, which take the longest
            {"hpkernels._cpu": self._cpu, "hpkernels._cuda": self._cuda}[name](name)

    def _cpu(self, name: str) -> None:
        wanted = toolchain.wanted_isas()
        isas = [isa for isa in wanted if isa == "baseline" or toolchain.accepts(self.compiler, toolchain.ISAS[isa])]
        # What sanitizers (.ci/sanitize) and debuggers read best.
        speed = ["-O1", "-g1", "-D_GLIBCXX_ASSERTIONS"] if self.debug else ["-O3"]
        exact = ["-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math"]
        # GCC 12 finds its own intrinsics headers wanting.
        quiet = ["-Wno-psabi", "-Wno-unknown-warning-option", "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
        flags = [*self.host, *speed, *exact, "-Wall", "-Wextra", *quiet, *(f"-DHPK_HAVE_{i.upper()}=1" for i in isas)]
        every = sorted((CSRC / "cpu").rglob("*.cpp"))
        once = [path for path in every if not path.name.endswith((".isa.cpp", ".bf16.cpp"))]
        objects = [self._compile("once", path, flags) for path in once if path.name != "bindings.cpp"]
        objects.append(self._compile("once", CSRC / "cpu" / "bindings.cpp", [*flags, *SMALL]))
        objects.append(self._hash("once", name))
        # Inline functions of the standard library may be emitted by several variants, and the linker keeps the first
        # it meets: objects are linked from the oldest instruction set to the newest, so that copy runs everywhere.
        for isa in isas:
            own = [*flags, *toolchain.ISAS[isa], f"-DHPK_ISA={isa}", f"-DHPK_ISA_{isa.upper()}=1"]
            kind = ".bf16.cpp" if isa.endswith("bf16") else ".isa.cpp"
            objects += [self._compile(isa, path, own) for path in every if path.name.endswith(kind)]
        mac = sys.platform == "darwin"
        shared = ["-bundle", "-undefined", "dynamic_lookup"] if mac else ["-shared"]
        strip = [] if mac or self.debug else ["-Wl,-s"]
        self._link(name, [*self.compiler, *shared, *strip], objects, ["-pthread"])

    def _cuda(self, name: str) -> None:
        nvcc = toolchain.lasting(toolchain.find_nvcc(), self.folder / "cuda_packages")
        archs = toolchain.cuda_archs()
        command = [nvcc, *(["-ccbin", self.compiler[0]] if len(self.compiler) == 1 else [])]
        flags = [*command, *self.common, "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", *toolchain.code_flags(archs)]
        toolkit = Path(nvcc).parents[1] / "include"
        if (toolkit / "cuda_runtime.h").exists():  # as system headers, which are no dependencies: pip dates them anew
            flags += ["-isystem", str(toolkit)]
        sources = sorted((CSRC / "cuda").rglob("*.cu"))
        objects = [self._compile("cuda", path, flags) for path in sources]
        plain = sorted((CSRC / "cuda").rglob("*.cpp"))
        told = f'-DHPK_CUDA_ARCHS="{";".join(archs)}"'
        objects += [self._compile("cuda", path, [*self.host, *SMALL, told]) for path in plain]
        objects.append(self._hash("cuda", name))
        libraries = Path(nvcc).resolve().parents[1] / "lib"  # where the compiler packages have them
        shared = ["-shared", "-cudart", "static", f"-L{libraries}", "-Xlinker", "-s,--exclude-libs=ALL"]
        self._link(name, [*command, *shared], objects, [])

    def _hash(self, place: str, name: str) -> str:
        definition = f'-DHPK_SOURCE_HASH="{self.source_hash(name.rpartition(".")[2])}"'
        return self._compile(place, CSRC / "shared" / "source_hash.cpp", [*self.host, definition])

    def _compile(self, place: str, source: Path, command: list[str]) -> str:
        """The object of a source, which is compiled by `command` into folder `place`."""
        output = f"{place}/{source.relative_to(CSRC)}.o"
        self.ninja.build([output], "compile", [str(source)], variables={"tool": _words(command)})
        return output

    def _link(self, name: str, command: list[str], objects: list[str], libraries: list[str]) -> None:
        variables = {"tool": _words(command), "libraries": _words(libraries)}
        self.ninja.build([f"{name}.so"], "link", objects, variables=variables)


def _words(command: list[str]) -> str:
    return shlex.join(command).replace("$", "$$")


def _copy_changed(source: str, target: str) -> None:
    if not os.path.exists(target) or not filecmp.cmp(source, target, shallow=False):
        shutil.copyfile(source, target)

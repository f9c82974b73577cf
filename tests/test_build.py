"""The package builds in an environment without torch, and says what is missing where it cannot."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOADERS = ("/lib64/ld-linux-x86-64", "/lib/ld-linux-aarch64")
BUILD_REQUIREMENTS = ["setuptools", "_distutils_hack", "pybind11", "ninja", "pip"]
QUICK = {"HPKERNELS_CUDA": "0", "HPKERNELS_CPU_MAX_ISA": "baseline"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources, so that building leaves no trace in the working tree."""
    target = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "assets")
    for name in ("csrc", "hpkernels", "hpseg"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target)
    return target


@pytest.fixture(scope="module")
def python_without_torch(tmp_path_factory):
    """The interpreter of a fresh virtual environment that holds the build requirements and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    script = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.check_output([python, "-c", script], text=True).strip())
    for name in BUILD_REQUIREMENTS:
        found = importlib.util.find_spec(name)
        if found is None:
            pytest.skip(f"this environment lacks {name}, which building needs: pip install '.[test]' brings it")
        package = Path(found.origin).parent
        for folder in (package, *package.parent.glob(f"{name}-*.dist-info")):
            shutil.copytree(folder, site / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(Path(importlib.import_module("ninja").BIN_DIR, "ninja"), python.parent)
    return python


@pytest.fixture(scope="module")
def path_without_nvcc(tmp_path_factory):
    """A PATH with the host's C++ compiler and its tools, and no CUDA compiler."""
    folder = tmp_path_factory.mktemp("tools")
    for name in ("c++", "g++", "as", "ld"):
        if shutil.which(name):
            (folder / name).symlink_to(shutil.which(name))
    return str(folder)


def run(python, *arguments, cwd, **environment):
    command = [str(python), *arguments]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HPKERNELS_", "PIP_"))}
    return subprocess.run(command, cwd=cwd, env=clean | environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def installed(checkout, python_without_torch):
    """A fresh checkout, after `pip install .` in it."""
    leftover = (
        checkout / "hpkernels" / Path(importlib.import_module("hpkernels._cpu").__file__).name.replace("_cpu", "_cuda")
    )
    leftover.touch()
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
    result = run(python_without_torch, "-m", "pip", "install", *options, ".", cwd=checkout, **QUICK)
    assert result.returncode == 0, result.stdout + result.stderr
    assert not leftover.exists()  # of an earlier build, which HPKERNELS_CUDA=0 takes out
    return checkout


def extensions_in(folder):
    return sorted(path.name.partition(".")[0] for path in folder.iterdir() if path.suffix in (".so", ".pyd"))


def test_install_without_torch(installed, python_without_torch, tmp_path):
    missing = run(python_without_torch, "-c", "import torch", cwd=tmp_path)
    assert "No module named 'torch'" in missing.stderr

    load = (
        "import importlib.util, pathlib, sysconfig\n"
        "folder = pathlib.Path(sysconfig.get_path('platlib')) / 'hpkernels'\n"
        "(path,) = [p for p in folder.iterdir() if p.name.startswith('_cpu.') and p.suffix in ('.so', '.pyd')]\n"
        "spec = importlib.util.spec_from_file_location('_cpu', path)\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.isa(), *module.isas())\n"
    )
    loaded = run(python_without_torch, "-c", load, cwd=tmp_path)
    assert loaded.returncode == 0, loaded.stderr
    chosen, *supported = loaded.stdout.split()
    assert supported[0] == "baseline" and chosen == supported[-1]

    lowered = run(python_without_torch, "-c", load, cwd=tmp_path, HPKERNELS_CPU_ISA="baseline")
    assert lowered.stdout.split()[0] == "baseline"
    refused = run(python_without_torch, "-c", load, cwd=tmp_path, HPKERNELS_CPU_ISA="abacus")
    assert "HPKERNELS_CPU_ISA is 'abacus', expected one of: baseline" in refused.stderr


SAY = (
    "import hpkernels, torch, pathlib; from hpkernels import dispatch, _cpu; x = torch.eye(3)\n"
    "print(pathlib.Path(hpkernels.__file__).parents[1], pathlib.Path(_cpu.__file__).parents[1], _cpu.isas())\n"
    "print(dispatch.choose(x.device), hpkernels.max_similarity(x, x).tolist())"
)


def ask(folder, code=SAY, **environment):
    """What this interpreter, which has torch, says in a folder."""
    environment = {"PYTHONDONTWRITEBYTECODE": "1", **environment}
    return run(sys.executable, "-c", code, cwd=folder, **environment)


def test_a_clone_runs_what_was_installed(installed, python_without_torch, tmp_path):
    """From inside the clone, whose package hides the installed one, and from outside."""
    script = "import sysconfig; print(sysconfig.get_path('platlib'))"
    site = Path(run(python_without_torch, "-c", script, cwd=tmp_path).stdout.strip())
    assert extensions_in(site / "hpkernels") == extensions_in(installed / "hpkernels") == ["_cpu"]
    outside = tmp_path / "site"
    outside.mkdir()
    (outside / "hpkernels").symlink_to(site / "hpkernels")
    for answer, place in ((ask(installed), installed), (ask(tmp_path, PYTHONPATH=str(outside)), outside)):
        assert answer.returncode == 0, answer.stderr
        assert answer.stdout.split("\n")[0] == f"{place} {place} ['baseline']"
        assert answer.stdout.split("\n")[1] == "cpu [1.0, 1.0, 1.0]"
    info = run(sys.executable, "-m", "hpkernels.info", cwd=installed)
    assert "_cpu: built; instruction set baseline of baseline" in info.stdout, info.stderr


@pytest.fixture
def tree(installed, tmp_path):
    """A copy of the clone that was built, to break."""
    shutil.copytree(installed, tmp_path / "tree", ignore=shutil.ignore_patterns("build", "hpseg", "__pycache__"))
    return tmp_path / "tree"


@pytest.mark.parametrize("how", ["missing", "stale", "old"])
def test_a_clone_without_its_extension(tree, how):
    """A sentence, and never the reference in silence; asked for it runs."""
    sentence = f"run `pip install .` or `pip install -e .` in {tree}"
    if how == "missing":
        for library in (tree / "hpkernels").glob("_cpu.*"):
            library.unlink()
        sentence = f"the extension hpkernels._cpu was not built: {sentence}"
    else:
        sentence = f"the extension hpkernels._cpu is stale, csrc/ has changed since it was built: {sentence}"
    if how == "stale":
        with open(tree / "csrc/shared/bits.h", "a") as header:
            header.write("// changed\n")
    if how == "old":  # from before there was a hash
        (library,) = (tree / "hpkernels").glob("_cpu.*")
        library.unlink()
        library.with_name("_cpu.py").write_text("def isas(): return []\n")
    info = run(sys.executable, "-m", "hpkernels.info", cwd=tree)
    assert info.returncode == 0 and f"_cpu: {sentence}\n" in info.stdout, info.stderr
    assert "normalize (normalize_rows): none\n" in info.stdout
    code = "import hpkernels, torch; print(hpkernels.max_similarity(torch.eye(3), torch.eye(3){}).tolist())"
    answer = ask(tree, code.format(""))
    assert answer.stderr.strip().splitlines()[-1] == f"ImportError: {sentence}"
    assert sentence in ask(tree, code.format(", backend='cpu'")).stderr
    assert ask(tree, code.format(", backend='reference'")).stdout == "[1.0, 1.0, 1.0]\n"
    assert ask(tree, code.format(""), HPKERNELS_BACKEND="reference").stdout == "[1.0, 1.0, 1.0]\n"


def test_only_the_extension_of_changed_sources_is_stale(tree):
    kernels = tree / "csrc/cuda/pair_bits/pair_bits.cu"
    kernels.write_text(kernels.read_text() + "\n")
    assert ask(tree).returncode == 0


def test_an_installed_package_has_no_sources_to_compare(tree, tmp_path):
    (tmp_path / "away").mkdir()
    shutil.move(tree / "hpkernels", tmp_path / "away")
    code = "from hpkernels.common.sources import in_source_tree; print(in_source_tree())"
    assert ask(tmp_path / "away", code).stdout == "False\n"
    for library in (tmp_path / "away" / "hpkernels").glob("_cpu.*"):
        library.unlink()
    answer = ask(tmp_path / "away", "from hpkernels import dispatch; print(dispatch.MISSING['cpu'])")
    assert answer.stdout == "the extension hpkernels._cpu was not built: reinstall with a C++17 compiler\n"


def objects_in(folder):
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in folder.rglob("*.o")}


def test_only_what_a_change_touches_is_compiled(installed, python_without_torch):
    """By another kind of build and with pybind11 elsewhere; the header's dependants, and the hash."""
    (folder,) = (path for path in (installed / "build").iterdir() if (path / "build.ninja").exists())
    before = objects_in(folder)
    assert "baseline/cpu/normalize/kernels.isa.cpp.o" in before and "once/cpu/bindings.cpp.o" in before
    headers = folder.parents[1] / "elsewhere"
    shutil.copytree(importlib.import_module("pybind11").__path__[0], headers / "pybind11")
    again = {"cwd": installed, "PYTHONPATH": str(headers), **QUICK}
    command = ["setup.py", "build_ext", "--inplace"]
    assert run(python_without_torch, *command, **again).returncode == 0
    assert objects_in(folder) == before
    header = installed / "csrc/cpu/products/products.h"
    content = header.read_text()
    header.write_text(content + "// changed\n")
    changed = run(python_without_torch, *command, **again)
    assert changed.returncode == 0, changed.stderr
    assert {name for name, time in objects_in(folder).items() if time != before[name]} == {
        "baseline/cpu/products/kernels.isa.cpp.o", "once/cpu/bindings.cpp.o", "once/shared/source_hash.cpp.o",
    }  # fmt: skip
    assert ask(installed).returncode == 0  # built from what is there
    commands = json.loads((installed / "build" / "compile_commands.json").read_text())
    sources = {entry["file"] for entry in commands if entry["file"].endswith(".cpp")}
    assert sources == {str(path) for path in (installed / "csrc").rglob("*.cpp")
                       if "cuda" not in path.parts and not path.name.endswith(".bf16.cpp")}  # fmt: skip


@pytest.mark.parametrize("environment", [{"CXX": "no-such-compiler"}, {"PATH": "", "CXX": ""}])
def test_a_missing_compiler_is_one_sentence(checkout, environment):
    result = run(sys.executable, "setup.py", "build_ext", cwd=checkout, **environment)
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("hpkernels needs a C++17 compiler")
    for hint in ("apt install g++", "dnf install gcc-c++", "xcode-select --install", "CXX"):
        assert hint in last
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "environment, sentence",
    [
        ({"HPKERNELS_JOBS": "many"}, "HPKERNELS_JOBS must be a positive integer, got 'many'"),
        (
            {"HPKERNELS_CPU_MAX_ISA": "sse"},
            "HPKERNELS_CPU_MAX_ISA must be one of baseline, avx2, avx512, avx512_bf16, got 'sse'",
        ),
        ({"HPKERNELS_CUDA": "yes"}, "HPKERNELS_CUDA must be 0, 1 or auto, got 'yes'"),
        (
            {"HPKERNELS_CUDA_ARCHS": "80;hopper"},
            "HPKERNELS_CUDA_ARCHS must list targets such as '80;90a;90-virtual', 80 or newer, "
            "got 'hopper' in '80;hopper'",
        ),
        (
            {"HPKERNELS_CUDA_ARCHS": "75"},
            "HPKERNELS_CUDA_ARCHS must list targets such as '80;90a;90-virtual', 80 or newer, got '75' in '75'",
        ),
    ],
)
def test_a_wrong_switch_is_one_sentence(checkout, environment, sentence):
    result = run(sys.executable, "setup.py", "build_ext", cwd=checkout, **environment)
    assert result.returncode != 0
    assert result.stderr.strip().splitlines()[-1] == sentence


def test_without_a_cuda_compiler(checkout, python_without_torch, path_without_nvcc):
    """Asked for, it is an error; else one line of notice, before the compiler of C++ is looked for."""
    command = [python_without_torch, "setup.py", "build_ext"]
    place = {"cwd": checkout, "PATH": path_without_nvcc, "CUDA_HOME": "", "CXX": "no-such-compiler"}
    demanded = run(*command, **place, HPKERNELS_CUDA="1")
    assert demanded.returncode != 0
    last = demanded.stderr.strip().splitlines()[-1]
    assert last.startswith("HPKERNELS_CUDA is 1, but no CUDA compiler was found (nvcc in CUDA_HOME or on the PATH;")
    notice = "hpkernels: built without hpkernels._cuda: no CUDA compiler was found"
    assert notice in run(*command, **place).stderr
    assert "hpkernels._cuda" not in run(*command, **place, HPKERNELS_CUDA="0").stderr


@pytest.mark.parametrize(
    "gpus, named, archs",
    [
        ("8.0", "", ["sm_80"]),
        ("9.0\n8.6\n9.0", "", ["sm_86", "sm_90a"]),
        ("9.0", "all", ["sm_80", "sm_90a", "compute_90"]),
        ("9.0", "80+PTX", ["sm_80", "compute_80"]),
        ("12.0", "", ["sm_80", "sm_90a", "compute_90"]),  # from PTX
        ("7.5", "", ["sm_80", "sm_90a", "compute_90"]),
        ("", "", ["sm_80", "sm_90a", "compute_90"]),  # a driver without a GPU
    ],
)
def test_targets_of_the_gpus_here(tmp_path, gpus, named, archs):
    """Machine code for them alone; the flags make each PTX once."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nprintf '{gpus}\\n'\n")
    tool.chmod(0o755)
    code = "import toolchain as t, json; print(json.dumps([t.cuda_archs(), t.code_flags(t.cuda_archs())]))"
    said = run(
        sys.executable, "-c", code, cwd=ROOT / "csrc", PATH=f"{tmp_path}:/usr/bin:/bin", HPKERNELS_CUDA_ARCHS=named
    )
    found, flags = json.loads(said.stdout)
    assert found == archs
    if "compute_90" in archs:
        expected = ["-gencode=arch=compute_80,code=[sm_80]", "-gencode=arch=compute_90,code=[sm_90a,compute_90]"]
        assert flags == expected


@pytest.mark.skipif(sys.platform != "linux", reason="the compiler packages are for Linux")
def test_build_requirements(checkout, python_without_torch, path_without_nvcc, tmp_path):
    """An isolated build asks for NVIDIA's compiler packages exactly where no nvcc is found and none was refused."""
    query = "from setuptools import build_meta as b; print(*b.get_requires_for_build_wheel())"

    def asked(**environment):
        place = {"PATH": path_without_nvcc, "CUDA_HOME": "", **environment}
        result = run(python_without_torch, "-c", query, cwd=checkout, **place)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip().splitlines()[-1].split()

    for switch in ("", "1", "auto"):
        assert [name.partition("==")[0] for name in asked(HPKERNELS_CUDA=switch)] == [
            "nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime",
        ]  # fmt: skip
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.touch(mode=0o755)
    for environment in ({"HPKERNELS_CUDA": "0"}, {"CUDA_HOME": str(tmp_path)}, {"PATH": str(nvcc.parent)}):
        assert not any(name.startswith("nvidia") for name in asked(**environment))


# Of csrc/cuda/bindings.cpp what does without the other ops.
SMALL_BINDINGS = """
#include <pybind11/pybind11.h>
#include "cuda/common/device.h"
#include "cuda/pair_bits/pair_bits.h"
PYBIND11_MODULE(_cuda, m) {
  using namespace hpk::gpu;
  m.attr("device_type") = device_type();
  m.attr("archs") = HPK_CUDA_ARCHS;
  m.attr("cuda_version") = cuda_version();
  m.def("driver_version", &driver_version);
  m.def("count_bits", &count_bits);
}
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler")
def test_the_cuda_extension(checkout, python_without_torch, tmp_path):
    """One op's kernels: it imports without a GPU, says what it is for, needs no CUDA library, is compiled once."""
    small = tmp_path / "checkout"
    shutil.copytree(checkout, small, ignore=shutil.ignore_patterns("build", "*.so"))
    shutil.rmtree(small / "csrc" / "cpu")
    (small / "csrc" / "cpu").mkdir()
    (small / "csrc" / "cpu" / "bindings.cpp").touch()
    for source in (small / "csrc" / "cuda").rglob("*.cu"):
        if source.stem not in ("device", "pair_bits"):
            source.unlink()
    (small / "csrc" / "cuda" / "bindings.cpp").write_text(SMALL_BINDINGS)
    command = ["setup.py", "build_ext", "--inplace"]
    switches = {"HPKERNELS_CUDA": "1", "HPKERNELS_CUDA_ARCHS": "80;90-virtual"}
    result = run(python_without_torch, *command, cwd=small, **switches)
    assert result.returncode == 0, result.stdout + result.stderr

    (library,) = (small / "hpkernels").glob("_cuda.*")
    needed = subprocess.check_output(["ldd", str(library)], text=True)
    assert {line.split()[0].partition(".so")[0] for line in needed.splitlines()} <= {
        "libc", "libm", "libstdc++", "libgcc_s", "libdl", "librt", "libpthread", "linux-vdso", *LOADERS,
    }  # fmt: skip
    code = "import _cuda as c; print(c.device_type, c.archs, c.cuda_version // 1000 >= 11, c.driver_version() >= 0)"
    loaded = run(python_without_torch, "-c", code, cwd=library.parent)
    assert loaded.stdout.split() == ["cuda", "sm_80;compute_90", "True", "True"], loaded.stderr

    def objects():
        return {path: path.stat().st_mtime_ns for path in (small / "build").rglob("*.cu.o")}

    before = objects()
    assert len(before) == 2
    assert run(python_without_torch, *command, cwd=small, **switches).returncode == 0
    assert objects() == before
    (small / "csrc" / "cuda" / "common" / "device.cu").touch()
    assert run(python_without_torch, *command, cwd=small, **switches).returncode == 0
    assert [path.name for path, time in objects().items() if time != before[path]] == ["device.cu.o"]
    assert run(python_without_torch, *command, cwd=small, HPKERNELS_CUDA="0").returncode == 0
    assert not library.exists()  # it would go into a package that is built without

"""The package builds in an environment without torch, and says what is missing where it cannot."""

import importlib.util
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOADERS = ("/lib64/ld-linux-x86-64", "/lib/ld-linux-aarch64")
BUILD_REQUIREMENTS = ["setuptools", "_distutils_hack", "pybind11", "pip"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the sources, so that building leaves no trace in the working tree."""
    target = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "assets")
    for name in ("csrc", "src"):
        shutil.copytree(ROOT / name, target / name, ignore=ignore)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        if (ROOT / name).exists():
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


def test_install_without_torch(checkout, python_without_torch, tmp_path):
    missing = run(python_without_torch, "-c", "import torch", cwd=tmp_path)
    assert "No module named 'torch'" in missing.stderr

    options = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
    command = ["-m", "pip", "install", *options, str(checkout)]
    result = run(python_without_torch, *command, cwd=tmp_path, HPKERNELS_CUDA="0")
    assert result.returncode == 0, result.stdout + result.stderr

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


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler")
def test_the_cuda_extension(checkout, python_without_torch, tmp_path):
    """One op's kernels: it imports without a GPU, says what it is for, needs no CUDA library, is compiled once."""
    small = tmp_path / "checkout"
    shutil.copytree(checkout, small)
    for source in (small / "csrc" / "cuda").glob("*.cu"):
        if source.stem not in ("device", "pair_bits"):
            source.unlink()
    shutil.rmtree(small / "csrc" / "cpu")
    (small / "csrc" / "cpu").mkdir()
    (small / "csrc" / "cpu" / "none.cpp").touch()
    command = ["setup.py", "build_ext", "--inplace"]
    switches = {"HPKERNELS_CUDA": "1", "HPKERNELS_CUDA_ARCHS": "80;90-virtual"}
    result = run(python_without_torch, *command, cwd=small, **switches)
    assert result.returncode == 0, result.stderr

    (library,) = (small / "src" / "hpkernels").glob("_cuda.*")
    needed = subprocess.check_output(["ldd", str(library)], text=True)
    assert {line.split()[0].partition(".so")[0] for line in needed.splitlines()} <= {
        "libc", "libm", "libstdc++", "libgcc_s", "libdl", "librt", "libpthread", "linux-vdso", *LOADERS,
    }  # fmt: skip
    code = "import _cuda as c; print(c.device_type, c.archs, c.cuda_version // 1000 >= 11, c.driver_version() >= 0)"
    loaded = run(python_without_torch, "-c", code, cwd=library.parent)
    assert loaded.stdout.split() == ["cuda", "sm_80;compute_90", "True", "True"], loaded.stderr

    def objects():
        return {path: path.stat().st_mtime_ns for path in small.rglob("*.cu.o")}

    before = objects()
    assert len(before) == 2
    assert run(python_without_torch, *command, cwd=small, **switches).returncode == 0
    assert objects() == before
    (small / "csrc" / "cuda" / "device.cu").touch()
    assert run(python_without_torch, *command, cwd=small, **switches).returncode == 0
    assert [path.name for path, time in objects().items() if time != before[path]] == ["device.cu.o"]
    assert run(python_without_torch, *command, cwd=small, HPKERNELS_CUDA="0").returncode == 0
    assert not library.exists()  # it would go into a package that is built without

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


def run(python, *arguments, cwd, **environment):
    command = [str(python), *arguments]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HPKERNELS_", "PIP_"))}
    return subprocess.run(command, cwd=cwd, env=clean | environment, capture_output=True, text=True)


def test_install_without_torch(checkout, python_without_torch, tmp_path):
    missing = run(python_without_torch, "-c", "import torch", cwd=tmp_path)
    assert "No module named 'torch'" in missing.stderr

    options = ["--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check"]
    result = run(python_without_torch, "-m", "pip", "install", *options, str(checkout), cwd=tmp_path)
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


def test_jobs_must_be_a_number(checkout):
    result = run(sys.executable, "setup.py", "build_ext", cwd=checkout, HPKERNELS_JOBS="many")
    assert result.returncode != 0
    assert result.stderr.strip().splitlines()[-1] == "HPKERNELS_JOBS must be a positive integer, got 'many'"

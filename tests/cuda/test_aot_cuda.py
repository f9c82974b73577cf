"""Every CUDA C++ kernel compiles for sm_80 and sm_90a within its limits (see aot.py)."""

from __future__ import annotations

import json
import shutil

import pytest

from tests.cuda import aot

compiles = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler")


def test_the_committed_table_is_of_these_sources_and_within_limits():
    assert aot.check() == []


def test_what_is_refused():
    good = {"registers": 99, "stack": 0, "spill_stores": 0, "spill_loads": 0, "shared": 0}
    good |= {"mma": 64, "ldmatrix": 24, "cp_async_16": 8, "loads_16": 0}
    assert aot.faults("pairs_above_kernel<bf16>", good) == []
    for change in ({"stack": 8}, {"spill_loads": 4}, {"mma": 0}, {"ldmatrix": 0}, {"cp_async_16": 0}):
        assert len(aot.faults("pairs_above_kernel<bf16>", good | change)) == 1
    assert aot.faults("neighbor_mix_kernel<float, false>", good | {"mma": 0}) == ["no load of 16 bytes"]


@compiles
def test_a_small_file_compiles():
    """The same kernels, within limits; figures may differ with the compiler's version."""
    recorded = json.loads(aot.RESULTS.read_text())["files"]["pair_bits/pair_bits.cu"]["kernels"]["90a"]
    compiled = aot.compile_kernels(aot.SOURCES / "pair_bits/pair_bits.cu", "90a")
    assert compiled.keys() == recorded.keys()
    assert not [fault for kernel, figures in compiled.items() for fault in aot.faults(kernel, figures)]


@compiles
@pytest.mark.slow
def test_every_file_compiles():
    names = sorted(aot.sources())
    assert aot.table_faults(aot.compile_all(names, 2)) == []

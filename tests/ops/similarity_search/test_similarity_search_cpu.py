"""The searches of the CPU against themselves for every engine, instruction set and thread count, bit for bit."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from hpkernels import _cpu
from tests import poison
from tests.ops.similarity_search.searches import canonical, same, topk, unit_rows, unpack
from tests.ops.ways import instruction_set

OP = "similarity_search"
pytestmark = pytest.mark.only("cpu")


@pytest.fixture
def threads():
    """Sets the number of threads for a test that asks for more."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_one_canonical_value_decides_everything(kernels):
    queries, keys = unit_rows(200, 100), unit_rows(300, 100, seed=1)
    keys[7] = keys[211] = queries[5]
    s = canonical(kernels, queries, keys)
    assert torch.equal(kernels.max_similarity(queries, keys), s.amax(1))
    for column in (0, 7, 211, 299):  # thresholds that some pair meets exactly: not above it
        found = unpack(kernels.pairs_above(queries, s[:, column].contiguous(), keys, None), 300)
        assert torch.equal(found, s > s[:, column, None])
    square = canonical(kernels, queries, queries)
    assert torch.equal(square, square.T)
    limits = square[:, 3].contiguous()
    expected = (square > torch.minimum(limits[:, None], limits[None])) & ~torch.eye(200, dtype=torch.bool)
    assert torch.equal(unpack(kernels.pairs_above(queries, limits, None, None), 200), expected)


@pytest.fixture
def variants():
    """Calls a function once per vector width and screening engine with fused multiply-add, and gives all results."""
    if "avx2" not in _cpu.isas():
        pytest.skip("this machine or compiler lacks avx2: there is one variant only")
    screens = ["automatic", "int8", "bf16", "exact"]

    def call(function):
        results = []
        for name in _cpu.isas()[1:]:
            with instruction_set(name):
                for screen in screens if name == "avx512_bf16" else screens[:1]:
                    _cpu.set_search_screen(screen)
                    results.append(function())
        return results

    yield call
    _cpu.set_search_screen("automatic")


widest = pytest.mark.only(f"cpu-{_cpu.isas()[-1]}")  # for tests that go through the others themselves


def all_searches(kernels, queries, keys, limits):
    found = kernels.topk_similarity(queries, keys, 9, False, None, None)
    pairs = kernels.pairs_above(queries, limits, keys, None), kernels.pairs_above(queries, limits, None, None)
    return kernels.max_similarity(queries, keys), *found, *pairs


@widest
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e-18, 1e-30, 1e-41, 1e12, 1e18, 1e30])
def test_screening_never_shows(kernels, variants, scale):
    """Vector widths and screening engines agree bit for bit, whatever the size of the numbers."""
    queries, keys = unit_rows(70, 70) * scale, unit_rows(200, 70, seed=1) * scale
    queries[1], queries[2], queries[3, ::2], keys[4], keys[9, 1:] = 0, queries[5] / scale, 1e-40, keys[3], 0
    limits = canonical(kernels, queries, keys)[:, 3].nan_to_num(0).contiguous()
    first, *others = variants(lambda: all_searches(kernels, queries, keys, limits))
    assert all(same(other, first) for other in others)


@widest
@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-3, 0.1])
def test_screening_never_shows_in_a_crowd(kernels, variants, spread):
    """Rows close to one another leave many pairs open: most are computed, and the choice of an engine may change."""
    crowd = torch.nn.functional.normalize(unit_rows(1, 40) + spread * unit_rows(600, 40), dim=1)
    queries, keys = crowd[:250].contiguous(), crowd[200:].contiguous()
    limits = canonical(kernels, queries, keys).median(1).values
    first, *others = variants(lambda: all_searches(kernels, queries, keys, limits))
    assert all(same(other, first) for other in others)


@widest
def test_unset_memory_never_shows(kernels, variants):
    queries, keys = unit_rows(130, 50), unit_rows(201, 50, seed=1)
    with poison.filled(False):
        limits = canonical(kernels, queries, keys)[:, 3].contiguous()
        expected = all_searches(kernels, queries, keys, limits)
    assert poison.is_on()
    assert all(same(found, expected) for found in variants(lambda: all_searches(kernels, queries, keys, limits)))


def test_an_unknown_screen_is_refused():
    with pytest.raises(ValueError, match="expected automatic, int8, bf16 or exact, got 'guess'"):
        _cpu.set_search_screen("guess")


def test_thread_counts_agree_bitwise(kernels, same_for_all_threads):
    x, keys = unit_rows(500, 48), unit_rows(784, 48, seed=1)
    limits = kernels.max_similarity(x, keys)

    def search():
        found = kernels.topk_similarity(x, x, 11, True, None, None)
        return kernels.max_similarity(x, keys), *found, kernels.pairs_above(x, limits, None, None)

    same_for_all_threads(search)


def test_topk_ties_of_any_numbers_go_to_the_lower_index(kernels):
    rows = unit_rows(5, 24)
    keys = rows.repeat(40, 1)  # key j is row j mod 5
    values, indices = kernels.topk_similarity(rows, keys, 100, False, None, None)
    for row, s, found in zip(range(5), values, indices):
        assert found[:40].tolist() == list(range(row, 200, 5))
        order = sorted(range(100), key=lambda n: (-s[n].item(), found[n].item()))
        assert order == list(range(100))
    assert torch.equal(values[:, 0], values[:, 39])


def test_topk_without_self_and_in_groups(kernels):
    x, groups = unit_rows(230, 33), torch.arange(230) * 7 % 5
    groups[:3] = torch.tensor([9, -4, -4])  # groups of one and of two rows
    _, indices = kernels.topk_similarity(x, x, 3, True, None, None)
    assert (indices != torch.arange(230)[:, None]).all()

    for exclude_self in (False, True):
        found = kernels.topk_similarity(x, x, 60, exclude_self, groups, groups)
        assert same(found, topk(canonical(kernels, x, x), 60, exclude_self, groups, groups))

    values, indices = kernels.topk_similarity(x, x[:4], 2, False, groups, torch.full((4,), 77))
    assert (values == -torch.inf).all() and (indices == -1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_promoted(kernels, dtype):
    x, keys = unit_rows(60, 40), unit_rows(90, 40, seed=1).to(dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert torch.equal(kernels.max_similarity(x, keys), kernels.max_similarity(x.to(wide), keys.to(wide)))
    strided = keys.T.contiguous().T
    assert torch.equal(
        kernels.topk_similarity(x, strided, 5, False, None, None)[1],
        kernels.topk_similarity(x.to(wide), keys.to(wide), 5, False, None, None)[1],
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_input_is_refused(kernels, bad):
    x, keys = unit_rows(70, 30), unit_rows(50, 30)
    broken = x.clone()
    broken[69, 29] = bad
    with pytest.raises(ValueError, match="queries.*finite"):
        kernels.max_similarity(broken, keys)
    with pytest.raises(ValueError, match="keys.*finite"):
        kernels.topk_similarity(keys, broken, 3, False, None, None)
    with pytest.raises(ValueError, match="x.*finite"):
        kernels.pairs_above(broken.double(), torch.zeros(70), None, None)


@widest
def test_calls_from_several_threads_at_once(kernels, threads):
    threads(3)
    x, keys = unit_rows(400, 64), unit_rows(300, 64, seed=1)
    expected, wrong = kernels.max_similarity(x, keys), []

    def repeat():
        for _ in range(20):
            if not torch.equal(kernels.max_similarity(x, keys), expected):
                wrong.append(True)

    workers = [threading.Thread(target=repeat) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@widest
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_its_own_threads(kernels, threads):
    threads(2)
    x, keys = unit_rows(400, 64), unit_rows(300, 64, seed=1)
    expected = kernels.max_similarity(x, keys)
    child = os.fork()
    if child == 0:
        same_there = torch.equal(kernels.max_similarity(x, keys), expected)
        os._exit(0 if same_there else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

"""The search ops on the CPU: against fp64, and against themselves for every engine and thread count, bit for bit."""

import os
import threading

import numpy as np
import pytest
import torch

from hpkernels import _cpu
from hpkernels.ops.similarity_search import cpu as native

ISAS = ["baseline", "avx2", "avx512", "avx512_bf16"]
SHAPES = [(0, 5, 4), (1, 1, 1), (2, 63, 16), (63, 2, 48), (65, 129, 384), (129, 65, 520), (193, 385, 31)]
SHAPES += [(196, 784, 384), (784, 196, 16)]


@pytest.fixture(params=ISAS)
def isa(request):
    if request.param not in _cpu.isas():
        pytest.skip(f"this machine or compiler lacks {request.param}")
    before = _cpu.isa()
    _cpu.set_isa(request.param)
    yield request.param
    _cpu.set_isa(before)


@pytest.fixture(autouse=True)
def threads():
    """Sets the number of threads for a test that asks for more."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def unit_rows(rows, columns, dtype=torch.float32, seed=0):
    x = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1000 * rows))
    return torch.nn.functional.normalize(x, dim=1).to(dtype)


def unpack(bits, columns):
    dense = np.unpackbits(bits.numpy().view(np.uint8).reshape(len(bits), 4 * bits.shape[1]), axis=1, bitorder="little")
    assert not dense[:, columns:].any(), "padding bits must be zero"
    return torch.from_numpy(dense[:, :columns].astype(bool))


def canonical(queries, keys):
    """All s_ij as the ops see them: each key's values from a search for all M largest."""
    values, indices = native.topk_similarity(queries, keys, len(keys), False, None, None)
    return torch.empty_like(values).scatter_(1, indices, values)


def tolerance(dtype, columns):
    return 4 * torch.finfo(dtype).eps * columns**0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "count", "columns"), SHAPES)
def test_against_fp64(isa, rows, count, columns, dtype):
    queries, keys = unit_rows(rows, columns, dtype), unit_rows(count, columns, dtype, seed=1)
    exact, near = queries.double() @ keys.double().T, tolerance(dtype, columns)

    torch.testing.assert_close(native.max_similarity(queries, keys).double(), exact.amax(1), atol=near, rtol=0)
    for k in {1, min(5, count), count}:
        values, indices = native.topk_similarity(queries, keys, k, False, None, None)
        assert values.dtype == torch.float32 and indices.dtype == torch.int64
        torch.testing.assert_close(values.double(), exact.topk(k, 1).values, atol=near + 1e-7, rtol=0)
        torch.testing.assert_close(exact.gather(1, indices), values.double(), atol=near + 1e-7, rtol=0)

    thresholds = torch.linspace(-0.1, 0.2, rows, dtype=dtype)
    key_thresholds = torch.linspace(0.3, -0.05, count, dtype=dtype)
    for others, key_limits in ((keys, None), (keys, key_thresholds), (None, None)):
        s = exact if others is keys else queries.double() @ queries.double().T
        limit = thresholds.double()[:, None].expand_as(s)
        if key_limits is not None or others is None:
            limit = torch.minimum(limit, (thresholds if others is None else key_limits).double()[None])
        found = unpack(native.pairs_above(queries, thresholds, others, key_limits), s.shape[1])
        expected = s > limit
        if others is None:
            expected.fill_diagonal_(False)
        assert not ((found != expected) & ((s - limit).abs() > near)).any()
        assert others is keys or torch.equal(found, found.T)


def test_one_canonical_value_decides_everything(isa):
    queries, keys = unit_rows(200, 100), unit_rows(300, 100, seed=1)
    keys[7] = keys[211] = queries[5]
    s = canonical(queries, keys)
    assert torch.equal(native.max_similarity(queries, keys), s.amax(1))
    for column in (0, 7, 211, 299):  # thresholds that some pair meets exactly: not above it
        found = unpack(native.pairs_above(queries, s[:, column].contiguous(), keys, None), 300)
        assert torch.equal(found, s > s[:, column, None])
    square = canonical(queries, queries)
    assert torch.equal(square, square.T)
    limits = square[:, 3].contiguous()
    expected = (square > torch.minimum(limits[:, None], limits[None])) & ~torch.eye(200, dtype=torch.bool)
    assert torch.equal(unpack(native.pairs_above(queries, limits, None, None), 200), expected)


@pytest.fixture
def variants():
    """Calls a function once per vector width and screening engine with fused multiply-add, and gives all results."""
    if "avx2" not in _cpu.isas():
        pytest.skip("this machine or compiler lacks avx2: there is one variant only")
    before = _cpu.isa()
    screens = ["automatic", "int8", "bf16", "exact"]

    def call(function):
        results = []
        for name in _cpu.isas()[1:]:
            _cpu.set_isa(name)
            for screen in screens if name == "avx512_bf16" else screens[:1]:
                _cpu.set_search_screen(screen)
                results.append(function())
        return results

    yield call
    _cpu.set_search_screen("automatic")
    _cpu.set_isa(before)


def all_searches(queries, keys, limits):
    topk = native.topk_similarity(queries, keys, 9, False, None, None)
    pairs = native.pairs_above(queries, limits, keys, None), native.pairs_above(queries, limits, None, None)
    return native.max_similarity(queries, keys), *topk, *pairs


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e-18, 1e-30, 1e-41, 1e12, 1e18, 1e30])
def test_screening_never_shows(variants, scale):
    """Vector widths and screening engines agree bit for bit, whatever the size of the numbers."""
    queries, keys = unit_rows(70, 70) * scale, unit_rows(200, 70, seed=1) * scale
    queries[1], queries[2], queries[3, ::2], keys[4], keys[9, 1:] = 0, queries[5] / scale, 1e-40, keys[3], 0
    limits = canonical(queries, keys)[:, 3].nan_to_num(0).contiguous()
    first, *others = variants(lambda: all_searches(queries, keys, limits))
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(first, other))


@pytest.mark.parametrize("spread", [0.0, 1e-6, 1e-3, 0.1])
def test_screening_never_shows_in_a_crowd(variants, spread):
    """Rows close to one another leave many pairs open: most are computed, and the choice of an engine may change."""
    crowd = torch.nn.functional.normalize(unit_rows(1, 40) + spread * unit_rows(600, 40), dim=1)
    queries, keys = crowd[:250].contiguous(), crowd[200:].contiguous()
    limits = canonical(queries, keys).median(1).values
    first, *others = variants(lambda: all_searches(queries, keys, limits))
    for other in others:
        assert all(torch.equal(x, y) for x, y in zip(first, other))


def test_unset_memory_never_shows(variants):
    queries, keys = unit_rows(130, 50), unit_rows(201, 50, seed=1)
    limits = canonical(queries, keys)[:, 3].contiguous()
    expected = all_searches(queries, keys, limits)
    _cpu.poison_memory(True)
    try:
        results = variants(lambda: all_searches(queries, keys, limits))
    finally:
        _cpu.poison_memory(False)
    for other in results:
        assert all(torch.equal(x, y) for x, y in zip(expected, other))


def test_an_unknown_screen_is_refused():
    with pytest.raises(ValueError, match="expected automatic, int8, bf16 or exact, got 'guess'"):
        _cpu.set_search_screen("guess")


def test_thread_count_never_shows(isa, threads):
    x, keys = unit_rows(500, 48), unit_rows(784, 48, seed=1)
    limits = native.max_similarity(x, keys)
    results = []
    for count in (1, 2, 3):
        threads(count)
        topk = native.topk_similarity(x, x, 11, True, None, None)
        results.append((native.max_similarity(x, keys), *topk, native.pairs_above(x, limits, None, None)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


def test_topk_ties_go_to_the_lower_index(isa):
    rows = unit_rows(5, 24)
    keys = rows.repeat(40, 1)  # key j is row j mod 5
    values, indices = native.topk_similarity(rows, keys, 100, False, None, None)
    for row, s, found in zip(range(5), values, indices):
        assert found[:40].tolist() == list(range(row, 200, 5))
        order = sorted(range(100), key=lambda n: (-s[n].item(), found[n].item()))
        assert order == list(range(100))
    assert torch.equal(values[:, 0], values[:, 39])


def test_topk_without_self_and_in_groups(isa):
    x, groups = unit_rows(230, 33), torch.arange(230) * 7 % 5
    groups[:3] = torch.tensor([9, -4, -4])  # groups of one and of two rows
    _, indices = native.topk_similarity(x, x, 3, True, None, None)
    assert (indices != torch.arange(230)[:, None]).all()

    for exclude_self in (False, True):
        values, indices = native.topk_similarity(x, x, 60, exclude_self, groups, groups)
        allowed = groups[:, None] == groups[None]
        if exclude_self:
            allowed.fill_diagonal_(False)
        s = canonical(x, x).masked_fill(~allowed, -torch.inf)
        expected, order = torch.sort(s, dim=1, descending=True, stable=True)
        assert torch.equal(values, expected[:, :60])
        assert torch.equal(indices, order[:, :60].masked_fill(expected[:, :60] == -torch.inf, -1))

    values, indices = native.topk_similarity(x, x[:4], 2, False, groups, torch.full((4,), 77))
    assert (values == -torch.inf).all() and (indices == -1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_promoted(dtype):
    x, keys = unit_rows(60, 40), unit_rows(90, 40, seed=1).to(dtype)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    assert torch.equal(native.max_similarity(x, keys), native.max_similarity(x.to(wide), keys.to(wide)))
    strided = keys.T.contiguous().T
    assert torch.equal(
        native.topk_similarity(x, strided, 5, False, None, None)[1],
        native.topk_similarity(x.to(wide), keys.to(wide), 5, False, None, None)[1],
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_input_is_refused(isa, bad):
    x, keys = unit_rows(70, 30), unit_rows(50, 30)
    broken = x.clone()
    broken[69, 29] = bad
    with pytest.raises(ValueError, match="queries.*finite"):
        native.max_similarity(broken, keys)
    with pytest.raises(ValueError, match="keys.*finite"):
        native.topk_similarity(keys, broken, 3, False, None, None)
    with pytest.raises(ValueError, match="x.*finite"):
        native.pairs_above(broken.double(), torch.zeros(70), None, None)


def test_thresholds_may_be_infinite_or_nan(isa):
    x = unit_rows(140, 20)
    limits = torch.full((140,), torch.inf)
    limits[3], limits[139] = -torch.inf, torch.nan
    found = unpack(native.pairs_above(x, limits, None, None), 140)
    expected = torch.zeros(140, 140, dtype=torch.bool)
    expected[3], expected[:, 3] = True, True
    expected[3, 3] = expected[3, 139] = expected[139, 3] = False
    assert torch.equal(found, expected)
    found = unpack(native.pairs_above(x, limits, x, None), 140)
    assert torch.equal(found.any(1).nonzero().flatten(), torch.tensor([3]))


def test_calls_from_several_threads_at_once(threads):
    threads(3)
    x, keys = unit_rows(400, 64), unit_rows(300, 64, seed=1)
    expected, wrong = native.max_similarity(x, keys), []

    def repeat():
        for _ in range(20):
            if not torch.equal(native.max_similarity(x, keys), expected):
                wrong.append(True)

    workers = [threading.Thread(target=repeat) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_its_own_threads(threads):
    threads(2)
    x, keys = unit_rows(400, 64), unit_rows(300, 64, seed=1)
    expected = native.max_similarity(x, keys)
    child = os.fork()
    if child == 0:
        same = torch.equal(native.max_similarity(x, keys), expected)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0

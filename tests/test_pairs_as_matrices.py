"""mask @ x, means, slices, lists and files of a PairMask, against dense matrices in fp64."""

from __future__ import annotations

import io
import pickle

import pytest
import torch

import hpkernels as hk
from hpkernels.ops.pair_bits import op, sums

SHAPES = [(1, 1, 1), (3, 31, 2), (40, 129, 5), (33, 64, 7), (70, 200, 16), (0, 7, 3), (7, 0, 3), (5, 4, 0)]
RATES = [0.0, 0.02, 0.4, 1.0]


def masks(shape, rate):
    dense = torch.rand(shape) < rate
    return hk.PairMask.from_dense(dense), dense


@pytest.fixture(params=["whole", "blocks", "listed", "multiplied"])
def how(request, monkeypatch):
    """One block or many, and either way to do them."""
    if request.param == "blocks":
        monkeypatch.setattr(sums, "_BLOCK_PAIRS", 300)
    if request.param in ("listed", "multiplied"):
        monkeypatch.setattr(sums, "LISTED_RATE", 2.0 if request.param == "listed" else -1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows, columns, depth", SHAPES)
def test_sums_and_means(rows, columns, depth, dtype, how, backend, monkeypatch):
    monkeypatch.setenv("HPKERNELS_BACKEND", backend)
    for rate in RATES:
        mask, dense = masks((rows, columns), rate)
        x = torch.randn(columns, depth).to(dtype)
        exact = dense.double() @ x.double()
        # Sums of fp32 numbers, rounded to x's dtype once; in the sense of the sum of sizes.
        eps = torch.finfo(dtype).eps if dtype != torch.float64 else 2.0**-52
        bound = eps * exact.abs() + (2.0**-52 if dtype == torch.float64 else 2.0**-23) * 8 * (
            dense.double() @ x.double().abs()
        )
        assert torch.equal(mask @ x, mask.matmul(x))
        assert (mask @ x).dtype == dtype and (mask @ x).shape == (rows, depth)
        assert ((mask @ x).double() - exact).abs().le(bound).all()
        counts = dense.sum(1).clamp_min(1)[:, None]
        assert (mask.mean(x).double() - exact / counts).abs().le(2 * bound / counts).all()
        if depth:
            assert torch.equal(mask @ x[:, 0], (mask @ x[:, :1])[:, 0])
            assert torch.equal(mask.mean(x[:, 0]), mask.mean(x[:, :1])[:, 0])


def test_a_mean_of_many_halves_is_no_infinity():
    x = torch.full((100, 2), 60000.0, dtype=torch.float16)
    assert torch.equal(hk.PairMask.random(1.0, (3, 100), 1).mean(x), x[:3])


@pytest.mark.parametrize("symmetric", [False, True])
def test_gradients(symmetric, how, backend, monkeypatch):
    monkeypatch.setenv("HPKERNELS_BACKEND", backend)
    dense = torch.rand(9, 9) < 0.3
    dense = dense | dense.T if symmetric else dense[:5]
    mask = hk.PairMask.from_dense(dense, symmetric=symmetric)
    x = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: mask @ x, x)
    assert torch.autograd.gradgradcheck(lambda x: (mask @ x) ** 2, x)
    assert torch.autograd.gradcheck(mask.mean, x)
    assert torch.autograd.gradcheck(lambda x: mask @ x[:, 0], x)
    half = x.detach().half().requires_grad_()
    (mask @ half).sum().backward()
    assert torch.equal(half.grad, dense.sum(0)[:, None].half().expand(9, 3))


def test_a_gradient_that_is_not_finite_is_handed_on():
    """As torch does: it is not the caller's x."""
    x = torch.ones(70, 2, requires_grad=True)
    (MASK @ x).backward(torch.full((len(MASK.bits), 2), torch.inf))
    assert not x.grad.isfinite().all()


def test_op_checks(backend):
    mask, x = hk.PairMask.random(0.3, (9, 40), 1), torch.randn(40, 3, requires_grad=True)
    torch.library.opcheck(op._pair_sum, (mask.bits, False, x, "cpu" if backend == "reference" else backend))
    torch.library.opcheck(op.pairs_from_coo, (mask.to_coo(), 9, 40))


def test_one_compiled_graph_for_all_sizes():
    def step(x, dense):
        mask = hk.PairMask.from_dense(dense)
        return mask.matmul(x), mask.mean(x[:, 0]), mask[1:].matmul(x)

    compiled = torch.compile(step, dynamic=True, fullgraph=True, backend="eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (20, 32, 36, 44, 128, 52, 60, 96, 132, 256, 68):
            given = torch.randn(n, 6), torch.rand(n - 3, n) < 0.3
            torch.testing.assert_close(compiled(*given), step(*given))


def test_bits_of_the_sums_for_any_thread_count(how, same_for_all_threads):
    mask, x = hk.PairMask.random(0.02, (700, 900), 1), torch.randn(900, 33)
    same_for_all_threads(lambda: (mask @ x, mask.mean(x)))


def test_autocast_changes_nothing(backend, monkeypatch):
    monkeypatch.setenv("HPKERNELS_BACKEND", backend)
    mask, x = hk.PairMask.random(0.4, (20, 90), 1), torch.randn(90, 3)
    plain = mask @ x
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(mask @ x, plain)


@pytest.mark.parametrize("shape", [(70, 200), (1, 1), (0, 7), (7, 0), (5, 128)])
@pytest.mark.parametrize("rate", RATES)
def test_lists_of_pairs(shape, rate):
    mask, dense = masks(shape, rate)
    assert torch.equal(mask.to_coo(), dense.nonzero().T)
    crow, col = mask.to_csr()
    csr = dense.double().to_sparse_csr()
    assert torch.equal(crow, csr.crow_indices()) and torch.equal(col, csr.col_indices())
    order = torch.randperm(mask.to_coo().shape[1])
    twice = torch.cat([mask.to_coo()[:, order], mask.to_coo()], 1)
    for again in (hk.PairMask.from_coo(twice, shape), hk.PairMask.from_csr(crow, col, shape)):
        assert torch.equal(again.bits, mask.bits) and again.shape == shape


def test_rows_of_a_mask():
    mask, dense = masks((70, 200), 0.3)
    for rows in (slice(3, 9), slice(None), slice(-5, None), slice(5, 5), slice(60, 900)):
        assert torch.equal(mask[rows].to_dense(), dense[rows]) and not mask[rows].symmetric
    square = hk.PairMask.from_labels(torch.arange(9) % 2)
    assert square[:].symmetric and not square[1:].symmetric
    assert mask[3:9].bits.data_ptr() == mask.bits[3:].data_ptr()


def test_other_devices():
    mask = hk.PairMask.from_labels(torch.arange(9) % 2)
    assert mask.to("cpu") is mask
    moved = mask.to(torch.device("meta"))
    assert moved.device.type == "meta" and moved.symmetric and moved.shape == mask.shape


def test_files_are_read_by_the_safe_loader():
    for mask in (hk.PairMask.from_labels(torch.arange(900) % 2), hk.PairMask.random(0.3, (800, 70), 1)[10:12]):
        file = io.BytesIO()
        torch.save({"pairs": mask}, file)
        assert len(file.getvalue()) < mask.nbytes + 4096  # of a slice not the whole
        file.seek(0)
        again = torch.load(file, weights_only=True)["pairs"]
        for one in (again, pickle.loads(pickle.dumps(mask))):
            assert torch.equal(one.bits, mask.bits) and (one.shape, one.symmetric) == (mask.shape, mask.symmetric)


def test_a_file_that_holds_no_mask():
    mask, file = hk.PairMask.random(0.3, (8, 70), 1), io.BytesIO()
    mask.columns = 300  # what a kernel would read past the end
    torch.save(mask, file)
    file.seek(0)
    with pytest.raises(Exception, match="bits: expected 12 words a row for 300 columns"):
        torch.load(file, weights_only=True)


MASK = hk.PairMask.random(0.5, (8, 70), 1)
PAIRS = MASK.to_coo()


@pytest.mark.parametrize("call, error, message", [
    (lambda: MASK @ [1.0], TypeError, "x: expected a torch.Tensor, got list"),
    (lambda: MASK @ torch.ones(70, 2).long(), TypeError, "x: expected float16"),
    (lambda: MASK @ torch.ones(8, 2), ValueError, "x: expected 70 rows on cpu, got a float32 tensor of shape"),
    (lambda: MASK @ torch.ones(70, 2, 2), ValueError, "x: expected 1 or 2 dimensions"),
    (lambda: MASK @ torch.ones(70, 2, device="meta"), ValueError, "x: expected 70 rows on cpu"),
    (lambda: MASK @ torch.full((70, 2), torch.inf), ValueError, "x: expected finite numbers"),
    (lambda: MASK.mean(torch.full((70,), torch.nan)), ValueError, "x: expected finite numbers"),
    (lambda: MASK[3], TypeError, r"rows: expected a slice, as in mask\[2:5\], got 3"),
    (lambda: MASK[::2], ValueError, "rows: expected a slice without a step"),
    (lambda: hk.PairMask.from_coo(PAIRS, (7, 70)), ValueError, "indices: expected rows from 0 to 6, got 7"),
    (lambda: hk.PairMask.from_coo(-PAIRS, (8, 70)), ValueError, "indices: expected rows from 0 to 7, got -7"),
    (lambda: hk.PairMask.from_coo(PAIRS, (8, 3)), ValueError, "indices: expected columns from 0 to 2, got 69"),
    (lambda: hk.PairMask.from_coo(PAIRS.int(), (8, 70)), TypeError, "indices: expected an int64 tensor of 2 dim"),
    (lambda: hk.PairMask.from_coo(PAIRS.T, (8, 70)), ValueError, r"indices: expected shape \(2, E\), got"),
    (lambda: hk.PairMask.from_coo(PAIRS, 8), TypeError, "shape: expected a pair of ints"),
    (lambda: hk.PairMask.from_csr(PAIRS[0], PAIRS[1], (8, 70)), ValueError, "crow_indices: expected 9 numbers, got"),
    (
        lambda: hk.PairMask.from_csr(torch.tensor([0, 2, 1, 3]), torch.tensor([1, 2, 3]), (3, 9)), ValueError,
        "crow_indices: expected numbers from 0 to 3",
    ),
])  # fmt: skip
def test_bad_input(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()

"""Wrong input is refused by name, value and expectation; nothing crashes, hangs or turns into silent NaN."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import forward_ad

import hpkernels as hk
from hpkernels import dispatch, info

Z, F, POOL = torch.randn(12, 6), torch.randn(12, 5), torch.randn(4, 5)
HEADS = torch.randn(2, 3, 16, 8)  # queries or keys
FEW_ROWS = hk.PairMask.random(0.5, (5, 12), 1)
HEAD = {"head_features": Z, "head_pool": Z}
LABELS = torch.arange(12) % 3
CODE, ATTENTION, TAPS = torch.randn(2, 16, 3), torch.randn(2, 16, 16), torch.rand(2, 16, 9)
LOSS_ERRORS = [
    ({"z": "text"}, TypeError, "z: expected a torch.Tensor, got str"),
    ({"z": Z.int()}, TypeError, "z: expected float16"),
    ({"z": Z[0]}, ValueError, "z: expected 2 or 3 dimensions"),
    ({"features": F[:7]}, ValueError, "features: expected 12 rows"),
    ({"features": F.long()}, TypeError, "features: expected float16"),
    ({"pool": torch.randn(4, 6)}, ValueError, "pool: expected vectors of length 5"),
    ({"pool": [[0.0]]}, TypeError, "pool: expected a torch.Tensor, got list"),
    ({"pool": POOL[:0]}, ValueError, "pool: expected at least one row"),
    ({"pool": None}, ValueError, "exactly one of the two, got neither"),
    ({"positives_per_anchor": 3}, ValueError, "exactly one of the two, got both"),
    ({"pool": None, "positives_per_anchor": 12}, ValueError, "positives_per_anchor: expected 1 <= k <= 11"),
    ({"pool": None, "positives_per_anchor": 0}, ValueError, "positives_per_anchor: expected 1 <= k"),
    ({"pool": None, "positives_per_anchor": 2.0}, TypeError, "positives_per_anchor: expected an int, got 2.0"),
    ({"tokens_per_image": 5}, ValueError, "tokens_per_image: expected a positive divisor of N = 12, got 5"),
    ({"tokens_per_image": 0}, ValueError, "tokens_per_image: expected a positive divisor"),
    ({"z": Z.view(3, 4, 6), "tokens_per_image": 6}, ValueError, "tokens_per_image: expected 4 as in z"),
    ({"temperature": 0.0}, ValueError, "temperature: expected a finite number > 0, got 0.0"),
    ({"temperature": float("nan")}, ValueError, "temperature: expected a finite number > 0"),
    ({"temperature": torch.tensor(1.0)}, TypeError, "temperature: expected a Python number"),
    ({"base_temperature": -1}, ValueError, "base_temperature: expected a finite number > 0, got -1"),
    ({"negative_rate": 1.5}, ValueError, r"negative_rate: expected a number in \[0, 1\], got 1.5"),
    ({"negative_rate": float("nan")}, ValueError, "negative_rate"),
    ({"negative_mask": torch.ones(3, 12)}, TypeError, "negative_mask: expected a bool tensor"),
    ({"negative_mask": torch.ones(5, 12, dtype=torch.bool)}, ValueError, "negative_mask: expected shape"),
    ({"weighting": "sum"}, ValueError, "weighting: expected one of 'pairs', 'anchors', 'separate', got 'sum'"),
    ({"head_in_denominator": 1}, TypeError, "head_in_denominator: expected True or False, got 1"),
    ({"head_weight": 0.5}, ValueError, "head_weight: expected 0.0 without head_features, got 0.5"),
    ({"head_weight": torch.tensor(0.5)}, ValueError, "head_weight: expected 0.0 without head_features"),
    ({"head_weight": "x"}, TypeError, "head_weight: expected a float or a 0-dim tensor"),
    ({"head_features": Z, "head_pool": Z, "head_weight": float("inf")}, ValueError, "head_weight: expected a finite"),
    ({"head_features": Z}, ValueError, "head_pool: expected a pool for head_features"),
    ({"head_pool": Z}, ValueError, "head_pool: expected only together with head_features"),
    ({"head_features": Z[:3], "head_pool": Z}, ValueError, "head_features: expected 12 rows"),
    ({"head_features": Z, "head_pool": POOL}, ValueError, "head_pool: expected vectors of length 6"),
    ({"z_local": Z[:, :3]}, ValueError, "z_local: expected the shape of z"),
    ({"seed": 1.5}, TypeError, "seed: expected an int or a 0-dim int64 tensor, got 1.5"),
    ({"seed": torch.ones(2, dtype=torch.int64)}, TypeError, "seed: expected an int or a 0-dim int64"),
    ({"seed": 2**64}, ValueError, "seed: expected a 64-bit integer"),
    ({"backend": "metal"}, ValueError, "backend: 'metal' cannot be used here"),
    ({"backend": ""}, ValueError, "backend: '' cannot be used here"),
    ({"backend": 0}, TypeError, "backend: expected one of 'reference', 'cpu', 'triton', 'cuda' or None, got 0"),
    ({"z": Z.to_sparse()}, TypeError, "z: expected a dense tensor, got a sparse_coo float32 tensor of shape"),
    (
        {"features": torch.nested.nested_tensor([F, F])},
        TypeError,
        "features: expected a dense tensor, got a nested float32",
    ),
    ({"pool": POOL.to_mkldnn()}, TypeError, "pool: expected a dense tensor, got a _mkldnn float32 tensor"),
    ({"temperature": True}, TypeError, "temperature: expected a Python number > 0, got True"),
    ({"temperature": 1e-10}, ValueError, r"temperature: expected a number from 1e-09 to 1e\+09, got 1e-10"),
    ({"base_temperature": 1e300}, ValueError, "base_temperature: expected a number from 1e-09 to"),
    ({"negative_rate": True}, TypeError, "negative_rate: expected a Python number in"),
    ({"tokens_per_image": 2**64}, ValueError, "tokens_per_image: expected a 64-bit integer"),
    (
        {"negative_mask": torch.ones(12, 12, dtype=torch.bool, device="meta")},
        ValueError,
        "negative_mask: expected a tensor on cpu",
    ),
    ({"return_stats": 1}, TypeError, "return_stats: expected True or False, got 1"),
    ({"seed": torch.tensor(1, device="meta")}, ValueError, "seed: expected a tensor on cpu"),
    (HEAD | {"head_weight": 1e30}, ValueError, r"head_weight: expected a finite number from 0 to 1e\+09, got 1e\+30"),
    (HEAD | {"head_weight": 10**400}, ValueError, "head_weight: expected a finite number from 0 to"),
    (
        HEAD | {"head_weight": torch.tensor(torch.nan)},
        ValueError,
        r"head_weight: expected a finite number from 0 to 1e\+09, got nan",
    ),
    (HEAD | {"head_weight": torch.tensor(-1.0)}, ValueError, "head_weight: expected a finite number from 0 to"),
    (
        HEAD | {"head_weight": torch.tensor(1j)},
        ValueError,
        "head_weight: expected a float or a 0-dim tensor, got a complex64",
    ),
    (HEAD | {"head_weight": torch.tensor(1.0, device="meta")}, ValueError, "head_weight: expected a tensor on cpu"),
    ({"process_group": object()}, TypeError, "process_group: expected a torch.distributed.ProcessGroup or None, got"),
]


@pytest.mark.parametrize("change, error, message", LOSS_ERRORS, ids=lambda v: str(v)[:40] if isinstance(v, str) else "")
def test_loss_refuses(change, error, message):
    arguments = {"z": Z, "features": F, "pool": POOL, "tokens_per_image": None} | change
    with pytest.raises(error, match=message):
        hk.hidden_positive_loss(**arguments)


SEARCH_ERRORS = [
    (lambda: hk.max_similarity(Z, F), ValueError, "keys: expected vectors of length 6 as in queries"),
    (lambda: hk.max_similarity(Z, Z[:0]), ValueError, "keys: expected at least one row"),
    (lambda: hk.max_similarity(Z, Z.to("meta")), ValueError, "keys: expected a tensor on cpu"),
    (lambda: hk.topk_similarity(Z, Z, 13), ValueError, "k: expected 1 <= k <= 12"),
    (lambda: hk.topk_similarity(Z, Z, True), TypeError, "k: expected an int, got True"),
    (lambda: hk.topk_similarity(Z, Z, 2, query_groups=torch.zeros(12).long()), ValueError, "key_groups: expected with"),
    (
        lambda: hk.topk_similarity(Z, Z, 2, query_groups=torch.zeros(12), key_groups=torch.zeros(12)),
        TypeError,
        "query_groups: expected an int64 tensor",
    ),
    (lambda: hk.pairs_above(Z, Z[0]), ValueError, r"thresholds: expected one per row of x \(12\)"),
    (lambda: hk.pairs_above(Z, Z[:, 0], key_thresholds=Z[:, 0]), ValueError, "key_thresholds: expected only together"),
    (lambda: hk.pairs_above(Z, Z[:, 0], keys=F), ValueError, "keys: expected vectors of length 6"),
    (lambda: hk.hidden_positives(Z), ValueError, "exactly one of the two, got neither"),
    (lambda: hk.local_mix(torch.randn(2, 16, 3), torch.randn(2, 15, 15), (4, 4)), ValueError, "attention: expected"),
    (lambda: hk.local_mix(torch.randn(2, 3, 4, 5), torch.randn(2, 20, 20), (5, 4)), ValueError, "code: expected"),
    (lambda: hk.local_mix(torch.randn(2, 16, 3), torch.randn(2, 16, 16), 4), TypeError, "grid: expected a pair"),
    (lambda: hk.local_mix(torch.randn(2, 16, 3), torch.randn(2, 16, 16), (4, 4), sigma=0.0), ValueError, "sigma"),
    (
        lambda: hk.neighbor_weights(torch.randn(2, 16, 16), (4, 4), low_quantile=0.9, high_quantile=0.1),
        ValueError,
        "low_quantile: expected at most high_quantile",
    ),
    (lambda: hk.neighbor_weights(torch.full((1, 4, 4), torch.nan), (2, 2)), ValueError, "attention: expected logits"),
    (lambda: hk.local_mix(torch.randn(2, 16, 3), (HEADS,), (4, 4)), ValueError, "attention: expected logits or a pair"),
    (lambda: hk.local_mix(torch.randn(2, 16, 3), (HEADS, HEADS), (4, 4), sigma=-1), ValueError, "sigma: expected"),
    (lambda: hk.neighbor_weights_qk(HEADS[0], HEADS, (4, 4)), ValueError, "queries: expected 4 dimensions"),
    (lambda: hk.neighbor_weights_qk(HEADS.int(), HEADS, (4, 4)), TypeError, "queries: expected float16"),
    (
        lambda: hk.neighbor_weights_qk(HEADS, HEADS, (4, 5)),
        ValueError,
        r"queries: expected \(B, heads, 20, d\) for grid",
    ),
    (
        lambda: hk.neighbor_weights_qk(HEADS[:, :0], HEADS[:, :0], (4, 4)),
        ValueError,
        "queries: expected at least one head",
    ),
    (lambda: hk.neighbor_weights_qk(HEADS, HEADS[:, :1], (4, 4)), ValueError, "keys: expected the shape of queries"),
    (lambda: hk.neighbor_weights_qk(HEADS, HEADS.to("meta"), (4, 4)), ValueError, "keys: expected a tensor on cpu"),
    (
        lambda: hk.neighbor_weights_qk(HEADS, HEADS, (4, 4), scale=0),
        ValueError,
        "scale: expected a finite number > 0, got 0",
    ),
    (lambda: hk.neighbor_weights_qk(HEADS, HEADS / 0, (4, 4)), ValueError, "keys: expected finite numbers"),
    (lambda: hk.neighbor_weights_qk(HEADS * torch.nan, HEADS, (4, 4)), ValueError, "queries: expected finite numbers"),
    (lambda: hk.neighbor_mix(torch.randn(2, 16, 3), torch.randn(2, 16, 8), (4, 4)), ValueError, "weights: expected"),
    (lambda: hk.PairMask.random(2.0, (3, 3), 1), ValueError, "rate: expected a number in"),
    (lambda: hk.PairMask.from_dense(Z), TypeError, "dense: expected a bool tensor"),
    (lambda: hk.PairMask.from_labels(Z), TypeError, "labels: expected an integer tensor"),
    (lambda: hk.masked_contrastive_loss(Z, Z), TypeError, "positives: expected a PairMask, got Tensor"),
    (
        lambda: hk.masked_contrastive_loss(Z, hk.PairMask.random(0.5, (12, 11), 1)),
        ValueError,
        r"positives: expected a PairMask of shape \(12, 12\)",
    ),
    (
        lambda: hk.masked_contrastive_loss(Z, hk.PairMask.random(0.5, (12, 12), 1), negatives=FEW_ROWS),
        ValueError,
        "negatives: expected a number of rows that divides N = 12",
    ),
    (lambda: hk.max_similarity(Z.to_sparse_csr(), Z), TypeError, "queries: expected a dense tensor, got a sparse_csr"),
    (
        lambda: hk.topk_similarity(Z, Z, 2, exclude_self="no"), TypeError,
        "exclude_self: expected True or False, got 'no'",
    ),
    (
        lambda: hk.topk_similarity(Z, Z, 2, query_groups=LABELS.to_sparse(), key_groups=LABELS),
        TypeError,
        "query_groups: expected a dense tensor, got a sparse_coo int64",
    ),
    (lambda: hk.supervised_contrastive_loss(Z, LABELS.to_sparse()), TypeError, "labels: expected a dense tensor"),
    (
        lambda: hk.supervised_contrastive_loss(Z, LABELS, ignore_index=2**70), ValueError,
        "ignore_index: expected a 64-bit",
    ),
    (lambda: hk.supervised_contrastive_loss(Z, LABELS, form=["supcon"]), ValueError, "form: expected one of"),
    (lambda: hk.local_mix(CODE, ATTENTION[:1], (4, 4)), ValueError, "attention: expected 2 images on cpu, as code"),
    (lambda: hk.local_mix(CODE, (HEADS[:1], HEADS[:1]), (4, 4)), ValueError, "attention: expected 2 images on cpu"),
    (lambda: hk.local_mix(CODE, ATTENTION.to("meta"), (4, 4)), ValueError, "attention: expected 2 images on cpu"),
    (lambda: hk.neighbor_weights(ATTENTION, (4.0, 4.0)), TypeError, "grid: expected an int, got 4.0"),
    (lambda: hk.neighbor_weights(ATTENTION, (None, 4)), TypeError, "grid: expected an int, got None"),
    (lambda: hk.neighbor_weights(ATTENTION, (4, 4), sigma=1e300), ValueError, "sigma: expected a number from 1e-09 to"),
    (
        lambda: hk.neighbor_weights_qk(HEADS, HEADS, (4, 4), scale=1e-30), ValueError,
        "scale: expected a number from 1e-09",
    ),
    (lambda: hk.kmeans(Z.to("meta"), 2), ValueError, "x: expected rows with numbers, got a float32 tensor .* on meta"),
    (lambda: hk.kmeans(Z, 2, spherical=1), TypeError, "spherical: expected True or False, got 1"),
    (lambda: hk.kmeans(Z, 2, seed=2**64), ValueError, "seed: expected a 64-bit integer"),
    (lambda: hk.kmeans(Z, 2, batch_size=2**64), ValueError, "batch_size: expected a 64-bit integer"),
    (
        lambda: hk.kmeans(Z, 2, init=Z[:2].numpy()), ValueError,
        "init: expected one of 'k-means\\+\\+', 'random', got array",
    ),
    (lambda: hk.assign_clusters(Z, Z, spherical=None), TypeError, "spherical: expected True or False, got None"),
    (lambda: hk.outlier_distances(Z, Z, spherical="x"), TypeError, "spherical: expected True or False, got 'x'"),
    (lambda: hk.PairMask(torch.zeros(3, 4).int(), 4.0), TypeError, "columns: expected an int, got 4.0"),
    (
        lambda: hk.PairMask(torch.zeros(3, 4).int(), 4, symmetric=1), TypeError,
        "symmetric: expected True or False, got 1",
    ),
    (lambda: hk.PairMask(torch.full((3, 4), -1).int(), 100), ValueError, "bits: expected zeros past the 100 columns"),
    (lambda: hk.PairMask(torch.zeros(3, 0).int(), -1), ValueError, "columns: expected at least 0, got -1"),
    (lambda: hk.PairMask.from_labels(LABELS * 1j), TypeError, "labels: expected an integer tensor, got a complex64"),
    (
        lambda: hk.PairMask.from_labels(LABELS, ignore_index="1"), TypeError,
        "ignore_index: expected an int or None, got '1'",
    ),
    (lambda: hk.PairMask.random(0.5, 3, 1), TypeError, r"shape: expected a pair of ints \(N, M\), got 3"),
    (lambda: hk.PairMask.random(0.5, (-4, 3), 1), ValueError, "shape: expected at least 0, got -4"),
    (
        lambda: hk.PairMask.random(0.5, (2**40, 2**40), 1), ValueError,
        r"shape: expected a mask of less than 2\^63 bytes",
    ),
    (
        lambda: hk.PairMask.random(0.5, (3, 3), 1, device="gpu"), ValueError,
        "device: expected a torch.device, the name of",
    ),
]  # fmt: skip


@pytest.mark.parametrize("call, error, message", SEARCH_ERRORS, ids=[e[2][:40] for e in SEARCH_ERRORS])
def test_other_functions_refuse(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["z", "z_local", "features", "pool", "head_features", "head_pool"])
def test_non_finite_input_is_named(name, bad, backend, device):
    arguments = {
        "z": Z, "z_local": Z + 1, "features": F, "pool": POOL, "head_features": Z + 2, "head_pool": Z + 3,
        "head_weight": 0.5,
    }  # fmt: skip
    arguments = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    arguments[name] = arguments[name].clone()
    arguments[name][2, 1] = bad
    if device.type == "cpu":
        with pytest.raises(ValueError, match=rf"^{name}: expected finite"):
            hk.hidden_positive_loss(**arguments, backend=backend)
    else:
        assert torch.isnan(hk.hidden_positive_loss(**arguments, backend=backend))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_searches_name_non_finite_input(bad, backend, device):
    if device.type != "cpu":
        pytest.skip("looking would synchronise the GPU")
    spoiled = Z.clone()
    spoiled[-1, -1] = bad
    for call, name in [
        (lambda: hk.max_similarity(spoiled, Z, backend=backend), "queries"),
        (lambda: hk.max_similarity(Z, spoiled, backend=backend), "keys"),
        (lambda: hk.topk_similarity(Z, spoiled, 2, backend=backend), "keys"),
        (lambda: hk.pairs_above(spoiled, Z[:, 0], backend=backend), "x"),
        (lambda: hk.pairs_above(Z, Z[:, 0], keys=spoiled, backend=backend), "keys"),
    ]:
        with pytest.raises(ValueError, match=rf"^{name}: expected finite"):
            call()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["code", "weights"])
def test_mixing_names_non_finite_input(name, bad, backend, device):
    if device.type != "cpu":
        pytest.skip("looking would synchronise the GPU")
    tensors = {"code": CODE.clone(), "weights": TAPS.clone()}
    tensors[name][1, 2, 1] = bad
    with pytest.raises(ValueError, match=rf"^{name}: expected finite"):
        hk.neighbor_mix(**tensors, grid=(4, 4), backend=backend)


DERIVED = {
    "hidden_positive_loss": lambda z, backend: hk.hidden_positive_loss(z, F, POOL, seed=1, backend=backend),
    "masked_contrastive_loss": lambda z, backend: hk.masked_contrastive_loss(
        z, hk.PairMask.from_labels(LABELS), backend=backend
    ),
    "supervised_contrastive_loss": lambda z, backend: hk.supervised_contrastive_loss(z, LABELS, backend=backend),
    "neighbor_mix": lambda z, backend: hk.neighbor_mix(z.view(2, 6, 6), TAPS[:, :6], (2, 3), backend=backend).sum(),
}


@pytest.mark.parametrize("name", DERIVED)
def test_derivatives_that_kernels_lack_are_refused(name):
    """Forward mode would else take them to be zero; torch.func fails in words of its own."""

    def forward_mode(function):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(Z, torch.ones_like(Z)))).tangent

    def slope(function):
        return torch.func.jvp(function, (Z,), (torch.ones_like(Z),))[1]

    def gradient(function):
        return torch.func.grad(function)(Z).sum()

    def of_many(function):
        return torch.func.grad(lambda z: torch.func.vmap(function)(z).sum())(Z[None]).sum()

    found = [way(lambda z: DERIVED[name](z, "reference")).item() for way in (forward_mode, slope, gradient, of_many)]
    assert found == pytest.approx(found[:1] * 4, rel=1e-4, abs=1e-5) and abs(found[0]) > 1e-4
    for way in (forward_mode, slope, gradient, of_many):
        with pytest.raises(RuntimeError, match='the kernels have a backward pass alone.*pass backend="reference"'):
            way(lambda z: DERIVED[name](z, "cpu"))


def test_check_variable_raises_on_a_gpu(cuda, monkeypatch):
    monkeypatch.setenv("HPKERNELS_CHECK", "1")
    z = Z.to(cuda)
    z[0, 0] = torch.nan
    with pytest.raises(ValueError, match="^z: expected finite"):
        hk.hidden_positive_loss(z, F.to(cuda), POOL.to(cuda))


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, timeout=120
    )


def test_backend_variable_overrides_and_explains():
    code = "import torch, hpkernels as h; x = torch.eye(3); print(h.max_similarity(x, x))"
    assert run_python(code, HPKERNELS_BACKEND="reference").returncode == 0
    result = run_python(code, HPKERNELS_BACKEND="triton", TRITON_INTERPRET="0")
    assert "HPKERNELS_BACKEND: 'triton' cannot be used here: it takes GPU tensors" in result.stderr


def test_float64_is_not_for_triton():
    gpu = torch.device("cuda")
    assert dispatch.why_not("triton", gpu, Z.double()) == "it computes in fp32, and an argument is float64"
    assert dispatch.choose(gpu, None, Z, None, Z.double()) == "reference"


def test_import_touches_neither_cuda_nor_triton():
    code = (
        "import sys, torch, hpkernels; "
        "assert not torch.cuda.is_initialized() and 'triton' not in sys.modules and 'timm' not in sys.modules"
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_info_says_what_runs_and_why_not():
    result = subprocess.run([sys.executable, "-m", "hpkernels.info"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "_cpu: built; instruction set" in result.stdout
    for folder in ("similarity_search", "contrastive", "local_mix", "pair_bits", "normalize"):
        assert f"  {folder} (" in result.stdout
    assert "triton: no: it takes GPU tensors" in result.stdout
    assert "cuda: no: it takes cuda tensors, not cpu tensors" in result.stdout and "\n_cuda: " in result.stdout


def test_info_where_things_are_otherwise(monkeypatch):
    """A GPU and a CUDA extension; no CPU extension; a backend that cannot be."""
    extension = SimpleNamespace(cuda_version=13010, archs="80;90a")
    monkeypatch.setitem(sys.modules, "hpkernels._cuda", extension)
    monkeypatch.setitem(dispatch.MISSING, "cuda", None)
    monkeypatch.setitem(dispatch.MISSING, "cpu", "the extension hpkernels._cpu was not built")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"GPU {i}")
    monkeypatch.setattr(dispatch, "why_not", lambda backend, device: dispatch.MISSING.get(backend))
    monkeypatch.setenv("HPKERNELS_BACKEND", "cpu")
    said = "\n".join(info._lines())
    assert "_cpu: the extension hpkernels._cpu was not built" in said
    assert "_cuda: built with CUDA 13.1 for 80, 90a" in said and "cuda devices: GPU 0, GPU 1" in said
    assert "HPKERNELS_BACKEND: cpu" in said and "\ncuda tensors\n" in said
    assert "  normalize (normalize_rows): none (HPKERNELS_BACKEND: " in said, said


@pytest.mark.parametrize(
    "archs, built, driver, capability, problem",
    [
        (["sm_80", "sm_90a", "compute_90"], 13000, 13000, (9, 0), None),
        (["sm_80", "sm_90a", "compute_90"], 13000, 13020, (8, 9), None),  # sm_80 code runs on all of 8.x
        (["sm_80", "sm_90a", "compute_90"], 13000, 13000, (10, 0), None),  # from PTX
        (["sm_80"], 12080, 12020, (8, 6), None),  # any driver of the major version
        (["sm_80"], 13000, 12080, (8, 0), "the driver serves CUDA up to 12.8, and the extension was built with 13.0"),
        (["sm_80", "compute_90"], 13010, 13000, (12, 0), "for sm_120 it holds PTX of CUDA 13.1 alone, and the driver"),
        (["sm_80", "compute_90"], 13000, 13000, (7, 5), "it was built for sm_80, compute_90, and this GPU is sm_75"),
        (["sm_90a"], 13000, 13000, (10, 3), "it was built for sm_90a, and this GPU is sm_103"),
        (["sm_86"], 13000, 13000, (8, 0), "it was built for sm_86, and this GPU is sm_80"),
        (["compute_90a"], 13000, 13000, (10, 0), "it was built for compute_90a, and this GPU is sm_100"),
        (["sm_80"], 13000, 0, (8, 0), "there is no NVIDIA driver"),
    ],
)  # fmt: skip
def test_which_gpus_the_cuda_extension_runs_on(archs, built, driver, capability, problem):
    found = dispatch.cuda_problem(archs, built, driver, capability)
    assert found is None if problem is None else found.startswith(problem)


def test_cuda_stands_in_where_triton_is_missing(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setitem(dispatch.MISSING, "cuda", None)
    monkeypatch.setattr(dispatch, "_cuda_problem", lambda device: None)
    assert dispatch.choose(gpu) == "fastest" and dispatch.choose(gpu, "cuda") == "cuda"
    monkeypatch.setitem(dispatch.MISSING, "triton", "the triton package is not installed")
    assert dispatch.choose(gpu) == "cuda" and dispatch.choose(gpu, None, Z.double()) == "reference"
    monkeypatch.setattr(dispatch, "_cuda_problem", lambda device: "there is no NVIDIA driver")
    assert dispatch.choose(gpu) == "reference"
    with pytest.raises(ValueError, match="^backend: 'cuda' cannot be used here: there is no NVIDIA driver"):
        dispatch.choose(gpu, "cuda")


def test_a_missing_cuda_extension_says_what_to_do(monkeypatch):
    monkeypatch.setitem(dispatch.MISSING, "cuda", dispatch._missing("_nowhere", "reinstall with a CUDA compiler"))
    reason = dispatch.why_not("cuda", torch.device("cuda"))
    assert reason == "the extension hpkernels._nowhere was not built: reinstall with a CUDA compiler"
    assert dispatch.why_not("cuda", torch.device("cpu")) == "it takes cuda tensors, not cpu tensors"

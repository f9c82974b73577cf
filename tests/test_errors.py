"""Wrong input is refused by name, value and expectation; nothing crashes, hangs or turns into silent NaN."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

import hpkernels as hk
from hpkernels import dispatch

Z, F, POOL = torch.randn(12, 6), torch.randn(12, 5), torch.randn(4, 5)
HEADS = torch.randn(2, 3, 16, 8)  # queries or keys
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
    (lambda: hk.neighbor_weights_qk(HEADS, HEADS, (4, 5)), ValueError, r"queries: expected \(B, heads, 20, d\) for grid"),
    (lambda: hk.neighbor_weights_qk(HEADS[:, :0], HEADS[:, :0], (4, 4)), ValueError, "queries: expected at least one head"),
    (lambda: hk.neighbor_weights_qk(HEADS, HEADS[:, :1], (4, 4)), ValueError, "keys: expected the shape of queries"),
    (lambda: hk.neighbor_weights_qk(HEADS, HEADS.to("meta"), (4, 4)), ValueError, "keys: expected a tensor on cpu"),
    (lambda: hk.neighbor_weights_qk(HEADS, HEADS, (4, 4), scale=0), ValueError, "scale: expected a finite number > 0, got 0"),
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
        lambda: hk.masked_contrastive_loss(Z, hk.PairMask.random(0.5, (12, 12), 1), negatives=hk.PairMask.random(0.5, (5, 12), 1)),
        ValueError,
        "negatives: expected a number of rows that divides N = 12",
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
        "z": Z, "z_local": Z + 1, "features": F, "pool": POOL, "head_features": Z + 2, "head_pool": Z + 3, "head_weight": 0.5
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
    assert dispatch.choose(gpu) == "triton" and dispatch.choose(gpu, "cuda") == "cuda"
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

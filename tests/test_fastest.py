"""Where two backends can run, each op takes the one that the tuning tables name; and what is asked for by name wins."""

from __future__ import annotations

import json
from contextlib import ExitStack

import pytest
import torch

import hpkernels as hk
from hpkernels import dispatch, info, tuning

GPU = torch.device("cuda")


def _table(path, **backends):
    entries = [
        dict(
            op=f"backend/{choice}", dtype="half", d=None, log2_n=None, measured="2031-02-03", config=dict(backend=name)
        )
        for choice, name in backends.items()
    ]
    path.write_text(json.dumps({"family": "test", "entries": entries}))
    return str(path)


@pytest.fixture
def both(monkeypatch):
    """A GPU that can run both."""
    monkeypatch.setitem(dispatch.MISSING, "cuda", None)
    monkeypatch.setitem(dispatch.MISSING, "triton", None)
    monkeypatch.setattr(dispatch, "_cuda_problem", lambda device: None)
    monkeypatch.setattr(tuning, "family", lambda device: "hopper")
    monkeypatch.delenv("HPKERNELS_TUNING", raising=False)
    monkeypatch.delenv("HPKERNELS_BACKEND", raising=False)


def test_names_win_and_what_is_not_built_is_never_chosen(both, monkeypatch):
    assert dispatch.choose(GPU) == dispatch.FASTEST
    assert dispatch.choose(GPU, "triton") == "triton" and dispatch.choose(GPU, "cuda") == "cuda"
    assert dispatch.choose(GPU, None, torch.zeros(1, dtype=torch.float64)) == "reference"
    assert dispatch.choose(torch.device("cpu")) in ("cpu", "reference")
    monkeypatch.setenv("HPKERNELS_BACKEND", "cuda")
    assert dispatch.choose(GPU) == "cuda"
    monkeypatch.delenv("HPKERNELS_BACKEND")
    for name, other in (("cuda", "triton"), ("triton", "cuda")):
        with monkeypatch.context() as patch:
            patch.setitem(dispatch.MISSING, name, "it was not built")
            assert dispatch.choose(GPU) == other
            with pytest.raises(ValueError, match="^backend: 'fastest' cannot be used here: it was not built"):
                dispatch.choose(GPU, dispatch.FASTEST)
    with pytest.raises(ValueError, match="^backend: 'fastest' cannot be used here: it takes GPU tensors"):
        dispatch.choose(torch.device("cpu"), dispatch.FASTEST)


def test_the_tables_name_the_backend_of_a_dtype_and_shape(both, monkeypatch, tmp_path):
    def backend(choice, dtype=torch.bfloat16, shape=(2, 50_176, 512)):
        return dispatch.fastest(choice, shape, dtype, GPU)[0]

    shipped = {e["op"]: e["config"]["backend"] for e in tuning.entries(tuning.FOLDER / "hopper.json") if "/" in e["op"]}
    assert shipped and set(shipped.values()) <= {"triton", "cuda"}
    assert all(backend(op.removeprefix("backend/")) == name for op, name in shipped.items())
    assert backend("count_bits", torch.int32) == backend("normalize_rows") == "triton"  # no table says so
    assert backend("random_bits", torch.int64, ()) == "triton"
    monkeypatch.setenv("HPKERNELS_TUNING", _table(tmp_path / "mine.json", count_bits="cuda", pairs_above="reference"))
    assert backend("count_bits", torch.int32) == "cuda" and backend("count_bits", torch.float32) == "triton"
    with pytest.raises(ValueError, match="^HPKERNELS_TUNING: expected a backend of triton, cuda for pairs_above"):
        backend("pairs_above")


def test_a_step_made_by_both(monkeypatch, tmp_path):
    pytest.importorskip("triton")
    from benchmarks import dry

    def ours(rate, backend=None):
        launches = dry.loss_step(rate, backend, images=4).launches
        return {launch.op for launch in launches if launch.function is None}  # those of hpkernels._cuda

    choices = {"contrastive_stats/dense": "cuda", "pairs_above": "cuda", "contrastive_grad/sparse": "cuda"}
    monkeypatch.setenv(
        "HPKERNELS_TUNING", _table(tmp_path / "mine.json", **choices, **{"contrastive_grad/dense": "triton"})
    )
    assert ours(1.0) == {"contrastive_stats", "pairs_above"} and ours(0.02) == {"contrastive_grad", "pairs_above"}
    assert ours(1.0, "triton") == set()
    everything = ours(1.0, "cuda")
    assert {"contrastive_stats", "contrastive_grad", "count_bits", "normalize_rows", "max_similarity"} <= everything
    monkeypatch.setenv("HPKERNELS_BACKEND", "cuda")
    assert ours(1.0) == everything


MIXED = ("contrastive_stats/dense", "contrastive_grad/sparse", "pairs_above", "count_bits", "normalize_rows_grad")


@pytest.fixture
def cpu_and_reference(monkeypatch):
    """Two backends of CPU tensors, so that a mixed call has numbers to look at."""
    if dispatch.MISSING["cpu"]:
        pytest.skip(dispatch.MISSING["cpu"])
    monkeypatch.setattr(dispatch, "_OF_FASTEST", ("cpu", "reference"))
    with ExitStack() as stack:
        for choice in MIXED:
            stack.enter_context(tuning.forced(f"backend/{choice}", {"backend": "reference"}))
        yield


def _step(backend, rate, compiled=False):
    torch.manual_seed(0)
    z, features, pool = torch.randn(96, 16, requires_grad=True), torch.randn(96, 24), torch.randn(4, 24)

    def loss(z):
        options = dict(tokens_per_image=12, negative_rate=rate, seed=torch.tensor(3), backend=backend)
        return hk.hidden_positive_loss(z, features, pool, **options)

    value = (torch.compile(loss, backend="eager", fullgraph=True) if compiled else loss)(z)
    value.backward()
    return value.detach(), z.grad


@pytest.mark.parametrize("rate", [0.05, 1.0])
@pytest.mark.parametrize("compiled", [False, True])
def test_backends_of_one_loss_may_differ(cpu_and_reference, rate, compiled):
    assert dispatch.choose(torch.device("cpu")) == dispatch.FASTEST
    for found, expected in zip(_step(None, rate, compiled), _step("cpu", rate), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_info_says_which_and_why(both, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: "a GPU")
    monkeypatch.setattr(info, "_cuda_line", lambda: "built")
    monkeypatch.setenv("HPKERNELS_TUNING", _table(tmp_path / "mine.json", pairs_above="cuda"))
    said = "\n".join(info._lines())
    assert "    pairs_above: cuda (measured, 2031-02-03)\n" in said
    assert "    count_bits: triton (default)\n" in said
    monkeypatch.delenv("HPKERNELS_TUNING")
    shipped = tuning.find("backend/contrastive_stats/dense", torch.bfloat16, 512, 50_176, GPU)
    times = ", ".join(f"{name} {ms:g}" for name, ms in shipped["ms"].items())
    line = f"    contrastive_stats/dense: {shipped['config']['backend']} (predicted, {times} ms)\n"
    assert line in "\n".join(info._lines())

"""How a step is made: accumulated gradients, --compile."""

from __future__ import annotations

import csv
import functools

import pytest
import torch
from runs import TOLERANCE, assert_runs_agree
from tiny import SMALL

import hpseg
from hpseg.methods.hp import HiddenPositives
from hpseg.run.errors import UsageError


def test_accumulated_gradients_are_the_mean_over_batches(photos, vit_file, tmp_path, monkeypatch):
    from hpseg.training import loop as training

    gradients = []

    def kept(parameters, limit, clip=torch.nn.utils.clip_grad_norm_):
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in parameters]))
        return clip([torch.nn.Parameter(torch.zeros(1))], limit)

    monkeypatch.setattr(training.nn.utils, "clip_grad_norm_", lambda parameters, limit: kept(list(parameters), limit))
    still = {**SMALL, "weights": vit_file, "lr": 0.0, "projection_lr": 0.0, "cluster_lr": 0.0, "weight_decay": 0.0}
    hpseg.train(photos, tmp_path / "apart", steps=2, **still)
    hpseg.train(photos, tmp_path / "together", steps=1, accumulate=2, **still)
    torch.testing.assert_close(gradients[2], (gradients[0] + gradients[1]) / 2)
    apart, together = (
        list(csv.DictReader((tmp_path / run / "log.csv").read_text().splitlines())) for run in ("apart", "together")
    )
    for name in ("loss", *HiddenPositives.TERMS):
        assert float(together[0][name]) == pytest.approx(sum(float(row[name]) for row in apart) / 2, rel=1e-5)


def test_compiled_once_and_not_per_step(photos, vit_file, tmp_path, monkeypatch):
    from torch._dynamo.testing import CompileCounter

    frames = []

    def traced(backend, function, torch_compile=torch.compile, **options):
        return torch_compile(function, **{**options, "backend": backend})

    settings = {**SMALL, "weights": vit_file, "renew_interval": 3, "clusters": "kmeans"}
    hpseg.train(photos, tmp_path / "eager", steps=12, **settings)
    for steps in (3, 12):
        torch._dynamo.reset()
        counter = CompileCounter()  # runs what was traced as it is
        monkeypatch.setattr(torch, "compile", functools.partial(traced, counter))
        hpseg.train(photos, tmp_path / str(steps), steps=steps, compile=True, **settings)
        frames.append(counter.frame_count)
    assert 3 < frames[0] == frames[1]
    assert_runs_agree(tmp_path / "eager", tmp_path / "12", TOLERANCE)
    torch._dynamo.reset()


def test_without_a_compiler(photos, vit_file, tmp_path, monkeypatch):
    import torch._inductor.config

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    torch._dynamo.reset()
    with pytest.raises(UsageError, match="compile: .* cannot compile for cpu here .*no-such-compiler.*--no-compile"):
        hpseg.train(photos, tmp_path / "run", weights=vit_file, compile=True, **SMALL)
    assert not (tmp_path / "run").exists()
    torch._dynamo.reset()

"""Hidden Positives: the schedule of lambda, the scale of the local mixture, and what search and loss are handed."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import SMALL

import hpkernels
import hpseg
from hpseg.methods.hp import HiddenPositives, lambda_at
from hpseg.models.backbone import Tokens
from hpseg.run.config import make_config
from hpseg.runtime.distributed import ALONE, Share


def test_lambda_schedule():
    config = make_config(steps=11, lambda_warmup=1)
    assert [lambda_at(step, config) for step in (0, 1, 2, 6, 11)] == [0, 0, 0.1, 0.5, 1]


def test_local_scale_is_the_factor_of_the_mixture():
    features, weights = torch.rand(2, 16, 32, generator=torch.Generator().manual_seed(0)), torch.rand(2, 16, 9)
    losses = {}
    for scale, factor in ((28.0, 1.0), (14.0, 2.0), (14.0, 1.0)):
        config = make_config(classes=3, dim=8, dropout=0.0, mining_dropout=0.0, local_scale=scale)
        torch.manual_seed(0)
        method = HiddenPositives(32, config)
        method.pools = [features[0], features[0, :, :8]]
        share = Share(ALONE, 2, torch.Generator().manual_seed(0))
        view = Tokens(features, factor * weights, (4, 4))
        losses[scale, factor] = method.losses(view, None, 0, 0, share)["contrastive"].item()
    assert losses[28, 1] == losses[14, 2] != losses[14, 1]


@pytest.mark.parametrize(
    "settings, expected",
    [({}, "fp32"), ({"dtype": "bf16"}, "bf16"), ({"dtype": "bf16", "loss_dtype": "fp32"}, "fp32")],
    ids=["fp32", "bf16", "bf16 but the loss"],
)
def test_search_and_loss_take_what_config_json_says(photos, vit_file, tmp_path, monkeypatch, settings, expected):
    loss, handed = hpkernels.hidden_positive_loss, set()

    def recorded(z, features, pool, **others):
        given = (z, features, pool, *(others.get(name) for name in ("z_local", "head_features", "head_pool")))
        handed.update((type(x) if x is None else x.dtype) for x in given)
        return loss(z, features, pool, **others)

    monkeypatch.setattr(hpkernels, "hidden_positive_loss", recorded)
    hpseg.train(photos, tmp_path / "run", weights=vit_file, steps=3, **{**SMALL, "lambda_warmup": 0, **settings})
    assert handed - {type(None)} == {torch.bfloat16 if expected == "bf16" else torch.float32}
    assert json.loads((tmp_path / "run" / "config.json").read_text())["loss_dtype"] == expected

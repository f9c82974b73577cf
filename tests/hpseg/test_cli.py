"""The command line answers at once and says what is wrong in one sentence."""

import subprocess
import sys
import time

import pytest
import torch

from hpseg.cli.main import VERBS, main
from hpseg.features.pools import draw_tokens
from hpseg.methods.hp import HiddenPositives, lambda_at
from hpseg.models.backbone import Tokens
from hpseg.models.heads import SegmentationHead, channel_dropout
from hpseg.run.config import Config, make_config
from hpseg.run.presets import PRESETS
from hpseg.runtime.distributed import ALONE, Share


def test_help_is_quick_and_imports_nothing_heavy():
    code = (
        "import sys; from hpseg.cli.main import main\ntry: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'timm', 'torchvision', 'numpy') if m in sys.modules])"
    )

    def help_of(*words):
        done = subprocess.run(
            [sys.executable, "-c", code, *words, "--help"], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip().endswith("[]"), words
        return done.stdout

    start = time.monotonic()
    text = help_of()
    assert time.monotonic() - start < 1.0
    assert all(f"    {verb} " in text for verb in VERBS)
    for verb, (module, _) in VERBS.items():
        if module.startswith("hpseg.cli."):
            assert f"usage: hpseg {verb} " in help_of(verb)
    assert "--batch-size" in help_of("train") and "--resume" in help_of("train")
    assert "--pixel-balance" in help_of("train", "--help-all")


def test_train_predict_and_errors(photos, vit_file, tmp_path, capsys):
    train = [
        "train",
        str(photos),
        "--out",
        str(tmp_path / "run"),
        "--classes",
        "3",
        "--weights",
        str(vit_file),
        "--steps",
        "2",
        "--size",
        "32",
        "--dim",
        "8",
        "--pool-size",
        "16",
        "--batch-size",
        "2",
        "--workers",
        "0",
    ]
    assert main(train) == 0
    assert Config.load(tmp_path / "run" / "config.json").dim == 8
    assert main(train) == 2
    assert "hpseg train: error: out:" in capsys.readouterr().err
    assert main([*train, "--resume"]) == 0
    assert main(["predict", str(tmp_path / "run"), str(photos / "a.jpg"), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "a.png").is_file()
    assert main(["predict", str(tmp_path / "run"), str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "none" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["train", str(photos), "--out", "x"])
    assert "--classes" in capsys.readouterr().err


def test_config_round_trip_and_presets(tmp_path):
    for name in PRESETS:
        config = make_config(name, seed=3)
        config.save(tmp_path / "c.json")
        assert Config.load(tmp_path / "c.json") == config and config.preset == name
    assert make_config("potsdam").negative_rate == 1.0


def test_lambda_schedule():
    config = make_config(steps=11, lambda_warmup=1)
    assert [lambda_at(step, config) for step in (0, 1, 2, 6, 11)] == [0, 0, 0.1, 0.5, 1]


def test_momentum_head_and_channel_dropout():
    torch.manual_seed(0)
    a, b = SegmentationHead(4, 3), SegmentationHead(4, 3)
    expected = 0.9 * a.linear.weight + 0.1 * b.linear.weight
    a.follow(b, 0.9)
    torch.testing.assert_close(a.linear.weight, expected)
    x = torch.ones(50, 3, 40)
    dropped = channel_dropout(x, 0.25, Share(ALONE, len(x), torch.Generator().manual_seed(0)))
    assert torch.equal(dropped, dropped[:, :1].expand_as(x))  # one mask per image
    assert dropped.unique().tolist() == pytest.approx([0, 1 / 0.75]) and dropped.mean() == pytest.approx(1, abs=0.05)
    f = torch.randn(2, 5, 4)
    torch.testing.assert_close(a(f), a.linear(f) + a.out(torch.relu(a.hidden(f))))


def test_pools_are_full_and_even():
    def encode(batches):
        for batch in batches:
            number = torch.tensor(batch, dtype=torch.float32).view(-1, 1, 1).expand(-1, 6, 2)
            yield number + torch.arange(6).view(1, 6, 1) / 10, Share(ALONE, len(batch), torch.Generator())

    pool = draw_tokens(5, 12, 100, encode, 2, torch.Generator().manual_seed(0))
    assert pool.shape == (12, 2)
    assert pool[:, 0].floor().long().bincount(minlength=5).sort().values.tolist() == [2, 2, 2, 3, 3]
    assert draw_tokens(50, 12, 100, encode, 5, torch.Generator().manual_seed(0))[:, 0].floor().unique().numel() == 12
    assert draw_tokens(50, 12, 4, encode, 5, torch.Generator().manual_seed(0))[:, 0].floor().unique().numel() == 4


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


def test_public_names_are_there():
    import hpseg

    for name in hpseg.__all__:
        assert getattr(hpseg, name) is not None
    for name in ("train", "load", "evaluate", "predict_files", "show", "export", "import_hp", "overlay"):
        assert callable(getattr(hpseg, name)), name  # not the module of that name
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hpseg.nothing  # noqa: B018

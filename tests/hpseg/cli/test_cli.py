"""The command line answers at once and says what is wrong in one sentence."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from hpseg.cli.main import VERBS, main
from hpseg.run.config import Config


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
    for verb in VERBS:
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

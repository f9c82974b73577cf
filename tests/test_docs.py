"""Every command and every Python example of docs/*.md runs, in the order of the page, on small stand-ins for the
inputs.

Commands run as they stand but for three things: training of heads, ViTs and probes is shortened, backbones of timm get
random weights, as a test downloads nothing, and `pip install` is left to whoever runs the tests.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hpseg.cli.main

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "tests" / "hpseg"))
from tiny import paint  # noqa: E402
from trees import MAKERS  # noqa: E402

PAGES = sorted(path.name for path in (ROOT / "docs").glob("*.md"))
QUICK = "--steps 4 --batch-size 2 --pool-size 64 --workers 0 --size 64 --predict-size 64 --dim 16 --lambda-warmup 2"
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]+)\)")


def blocks(page):
    return FENCE.findall((ROOT / "docs" / page).read_text())


def commands(block):
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder with everything that the pages name; hpseg's own random weights in the place of downloads."""
    import timm

    create = timm.create_model

    def untrained(name, pretrained=False, **options):
        torch.manual_seed(0)  # the same weights for a name every time
        return create(name, **options)

    monkeypatch.setattr(timm, "create_model", untrained)
    monkeypatch.setattr("hpseg.models.backbone.require_reachable", lambda name: None)
    monkeypatch.chdir(tmp_path)
    for folder, count in (("photos", 6), ("data/images", 3), ("other/images", 2)):
        Path(folder).mkdir(parents=True)
        for number in range(count):
            paint(96, 64, number).save(f"{folder}/{number}.jpg")
    for folder, count in (("data/labels", 3), ("other/labels", 2)):
        Path(folder).mkdir()
        for number in range(count):
            ids = np.zeros((64, 96), np.uint8)
            ids[:, 48:], ids[:8] = 1, 255
            Image.fromarray(ids).save(f"{folder}/{number}.png")
    Path("data/classes.json").write_text(json.dumps(["sky", "ground"]))
    for name, make in MAKERS.items():
        make(tmp_path / {"cocostuff": "COCO"}.get(name, name.upper()))
    torch.manual_seed(0)
    return tmp_path


def put_checkpoints(page):
    """Files that only some pages need, and that take a moment to make."""
    text = (ROOT / "docs" / page).read_text()
    if "--weights dino_deitsmall8_300ep_pretrain.pth" in text:
        import timm

        vit = timm.create_model("vit_small_patch8_224", num_classes=0)
        torch.save(vit.state_dict(), "dino_deitsmall8_300ep_pretrain.pth")
    if "import-hp released.pth" in text:
        from released import checkpoint

        checkpoint("released.pth")
    if "--labeled city.txt" in text:
        Path("city.txt").write_text("leftImg8bit/train/bochum/bochum_000000_000019_leftImg8bit.png\n")
    for run in set(re.findall(r"(?<=[ \"])runs/mine\b", text)):
        if "--out runs/mine " not in text:
            assert hpseg.cli.main.main(["train", "photos/", "--out", run, "--classes", "12", *QUICK.split()]) == 0


def run(words):
    if words[0] == "pip":
        return
    if words[:2] == ["hpseg", "train"] or words[0] == "torchrun":
        words = [*words, *QUICK.split()]
    if words[:2] == ["hpseg", "pretrain"]:
        words = [*words, "--steps", "2", "--batch-size", "2", "--prototypes", "16"]
    if words[:2] == ["hpseg", "distill"]:
        words = [*words, "--steps", "2", "--batch-size", "1", "--sides", "32"]
    if words[:2] == ["hpseg", "probe"]:
        words = [*words, "--steps", "5", "--batch-size", "2"]
    if words[0] == "hpseg":
        assert hpseg.cli.main.main(words[1:]) == 0, shlex.join(words)
        return
    assert words[0] == "torchrun", f"a command of a kind that this test does not know: {shlex.join(words)}"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words[1:]]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", PAGES)
def test_page(page, desk, capsys):
    put_checkpoints(page)
    for kind, block in blocks(page):
        if kind == "sh":
            for words in commands(block):
                run(words)
        elif kind == "python":
            exec(compile(block, page, "exec"), {"__name__": "__main__"})
        else:
            raise AssertionError(f"{page}: a block of a kind that this test does not know: {kind}")


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in LINK.findall((ROOT / "docs" / page).read_text()):
        assert (ROOT / "docs" / target).is_file(), target


def test_the_pages_are_all_listed():
    assert set(LINK.findall((ROOT / "docs" / "README.md").read_text())) == set(PAGES) - {"README.md"}


def test_the_complete_loop_is_short():
    (loop,) = [block for kind, block in blocks("drop-in-loss.md") if kind == "python"]
    assert len([line for line in loop.splitlines() if line.strip()]) <= 40

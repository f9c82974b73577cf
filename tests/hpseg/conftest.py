"""Fixtures: the tiny ViT in a file, a handful of painted photographs, a finished run."""

import json
import logging
import shutil

import pytest
import torch
from safetensors.torch import save_file
from tiny import ARCH, SMALL, make_vit, paint
from trees import make_blocks

from hpseg.cli.main import main


@pytest.fixture
def tally(record_property):
    """tally(what, n): n more of `what` were tried; summed over all tests and printed at the end."""
    return lambda what, n=1: record_property("tally", (what, n))


@pytest.fixture
def news(caplog):
    """news(): what hpseg's loggers said since the test began or asked last, a line each."""
    caplog.set_level(logging.INFO, "hpseg")

    def since():
        lines = [record.getMessage() for record in caplog.records if record.name.startswith("hpseg.")]
        caplog.clear()
        return lines

    return since


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def vit_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("vit") / "tiny.safetensors"
    save_file(make_vit().state_dict(), path)
    path.with_suffix(".json").write_text(json.dumps({"arch": ARCH, "mean": [0.5] * 3, "std": [0.25] * 3}))
    return path


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Five pictures of different sizes and formats, one of them in a sub-folder."""
    root = tmp_path_factory.mktemp("photos")
    (root / "more").mkdir()
    for i, name in enumerate(("a.jpg", "b.png", "c.JPG", "more/d.webp", "e.bmp")):
        paint(50 + 10 * i, 40 + 7 * i, i).save(root / name)
    return root


@pytest.fixture(scope="session")
def run(tmp_path_factory, photos, vit_file):
    """A finished run of 20 steps on the five pictures."""
    import hpseg

    out = tmp_path_factory.mktemp("runs") / "run"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    hpseg.train(photos, out, weights=vit_file, steps=20, **SMALL)
    torch.set_num_threads(threads)
    return out


@pytest.fixture
def scored_run(run, tmp_path):
    """A copy of the finished run, for tests that leave scores in its folder."""
    return shutil.copytree(run, tmp_path / "scored_run")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Twelve labelled pictures, see `make_blocks`."""
    root = tmp_path_factory.mktemp("blocks")
    make_blocks(root)
    return root


@pytest.fixture
def refused(capsys):
    """refused(message, *words): the command line is refused, with status 2 and one sentence that holds the message."""

    def check(message, *words):
        assert main([str(word) for word in words]) == 2, words
        said = capsys.readouterr().err
        error = said.splitlines()[-1]
        assert error.startswith(f"hpseg {words[0]}: error: ") and message in error and "Traceback" not in said, said

    return check

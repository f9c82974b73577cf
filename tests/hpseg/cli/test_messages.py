"""What hpseg says: through loggers from Python, on stderr from the command line, and nowhere else."""

from __future__ import annotations

import ast
import logging
import sys
from pathlib import Path

import pytest
from processes import finish, spawn
from runs import train_words
from tiny import SMALL, paint

import hpseg
from hpseg.cli.main import main

FROM_PYTHON = """
import logging, sys, hpseg
photos, out, weights = sys.argv[1:]
settings = dict(weights=weights, classes=3, steps=1, size=32, dim=8, pool_size=16, batch_size=2, workers=0)
hpseg.train(photos, out + "/a", **settings)
print("configured", file=sys.stderr)
logging.basicConfig(level=logging.INFO, format="%(name)s|%(message)s")
hpseg.train(photos, out + "/b", **settings)
"""


@pytest.fixture
def damaged(tmp_path):
    """Two photographs and what is none."""
    (tmp_path / "photos").mkdir()
    for seed in range(2):
        paint(40, 30, seed).save(tmp_path / "photos" / f"{seed}.png")
    (tmp_path / "photos" / "2.png").write_bytes(b"no picture")
    return tmp_path / "photos"


def test_the_command_line_alone_prints():
    """That, and modules run as programs, in their last lines."""
    folder = Path(hpseg.__file__).parent
    for file in folder.rglob("*.py"):
        if file.parent == folder / "cli":
            continue
        body = ast.parse(file.read_text(encoding="utf-8")).body
        library = [part for part in body if not ast.unparse(part).startswith("if __name__ == '__main__':")]
        for node in (node for part in library for node in ast.walk(part)):
            name = getattr(node, "id", getattr(node, "attr", None))
            assert name not in ("print", "stdout", "stderr"), f"{file}:{node.lineno}"


def test_lines_of_the_command_line_are_plain_and_loggers_are_left_alone(damaged, vit_file, tmp_path, capsys, caplog):
    """Nor are lines said twice where a program that calls main has handlers of its own, as pytest does here."""
    logger = logging.getLogger("hpseg")
    before = logger.level, logger.propagate, list(logger.handlers)
    assert main(train_words(damaged, tmp_path / "run", vit_file)) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "3 photographs, 3 classes, embedded on cpu, batches of 2 at 32 x 32 pixels"
    assert lines[-2:] == [
        f"1 unreadable pictures were skipped: {damaged / '2.png'}",
        f"trained; the run is in {tmp_path / 'run'}",
    ]
    assert main(["predict", str(tmp_path / "run"), str(damaged), "--out", str(tmp_path / "out")]) == 0
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith(f"skipped {damaged / '2.png'}: ") and last == "1 unreadable pictures were skipped"
    assert (logger.level, logger.propagate, logger.handlers) == before and caplog.messages == []


def test_quiet_runs_give_no_news(photos, vit_file, tmp_path, news):
    hpseg.train(photos, tmp_path / "run", weights=vit_file, steps=1, **SMALL)
    assert news() == []
    hpseg.train(photos, tmp_path / "loud", weights=vit_file, steps=1, **{**SMALL, "quiet": False})
    assert news()[-1] == f"trained; the run is in {tmp_path / 'loud'}"


def test_from_python_warnings_are_heard_and_news_when_asked_for(damaged, vit_file, tmp_path):
    status, said = finish(spawn([sys.executable, "-c", FROM_PYTHON, damaged, tmp_path, vit_file]))
    assert status == 0, said
    silent, configured = said.split("configured\n")
    assert silent.splitlines() == [f"1 unreadable pictures were skipped: {damaged / '2.png'}"]
    assert f"hpseg.training.loop|trained; the run is in {tmp_path / 'b'}" in configured.splitlines()

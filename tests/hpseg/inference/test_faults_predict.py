"""Predictions that are killed or run at once."""

from __future__ import annotations

import os
import random
import time

from processes import in_child, killed_after, needs_fork
from runs import assert_whole
from tiny import paint

from hpseg.cli.main import main
from hpseg.inference.predict_files import predict_files
from hpseg.run.files import TEMPORARY


@needs_fork
def test_prediction_killed_leaves_whole_label_maps(run, photos, tmp_path, tally):
    big = tmp_path / "big"
    big.mkdir()
    for number in range(6):
        paint(500, 400, number).save(big / f"{number}.png")

    def work():
        predict_files(run, [big], tmp_path / "out", overlay_alpha=0.5, overwrite=True)

    started = time.monotonic()
    work()
    seconds = time.monotonic() - started
    expected = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    kills, moments = 0, random.Random(1)
    for _ in range(8):
        kills += killed_after(moments.uniform(0, seconds), work)
        assert_whole(tmp_path / "out")
    work()
    found = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir() if not path.name.startswith(".")}
    assert found == expected and kills
    tally("kills of a predicting process", kills)


@needs_fork
def test_predictions_at_once_into_one_folder(run, photos, tmp_path, tally):
    def work():
        raise SystemExit(main(["predict", str(run), str(photos), "--out", str(tmp_path / "out"), "--overwrite"]))

    children = [in_child(work) for _ in range(4)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert not [path for path in (tmp_path / "out").iterdir() if TEMPORARY.fullmatch(path.name)]
    assert main(["predict", str(run), str(photos), "--out", str(tmp_path / "alone")]) == 0
    for path in (tmp_path / "alone").rglob("*.png"):
        assert (tmp_path / "out" / path.relative_to(tmp_path / "alone")).read_bytes() == path.read_bytes()
    tally("predictions at once", 4)

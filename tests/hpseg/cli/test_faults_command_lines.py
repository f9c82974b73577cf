"""Places that cannot be written to: a sentence and an exit status, never a traceback, nothing lost."""

from __future__ import annotations

import json
import os
import shutil

import pytest
from runs import train_words
from tiny import paint

import hpseg
from hpseg.cli.main import main
from hpseg.run.errors import UsageError
from hpseg.run.files import RunLock


def test_outputs_that_cannot_be(run, photos, vit_file, tmp_path, refused, tally):
    """Folders where files are written and the reverse, a place below a file, links to nothing, no name at all."""
    (tmp_path / "file").write_text("")
    (tmp_path / "nothing").symlink_to(tmp_path / "gone")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "maps" / "a.png").mkdir(parents=True)
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("")
    folders = [
        lambda out: ["predict", run, photos, "--out", out],
        lambda out: train_words(photos, out, vit_file),
        lambda out: ["demo", "--out", out, "--seeds", "1", "--steps", "1"],
    ]
    for words in folders:
        for out in ("file/run", "nothing", "loop", "loop/run"):
            refused("expected a folder", *words(tmp_path / out))
    for words in folders[:2]:
        refused("file is a file, expected a folder", *words(tmp_path / "file"))
        refused("out: expected something, got an empty text", *words(""))
    refused("a.png is a folder, expected a file for the label map", *folders[0](tmp_path / "maps"), "--overwrite")

    for words, ending in (
        (["show", run, photos], ".png"),
        (["export", run], ".pt2"),
        (["export", run, "--format", "hp"], ".pth"),
        (["pretrain", photos], ".safetensors"),
    ):
        folder = tmp_path / f"folder{ending}"
        folder.mkdir()
        refused("is a folder, expected the name of a file", *words, "--overwrite", "--out", folder)
        refused("file is a file, expected a folder", *words, "--out", tmp_path / "file" / f"a{ending}")

    refused("pass --resume to go on with a run, --overwrite", *train_words(photos, full, vit_file))
    refused("it has no config.json to go on from; pass --overwrite", *train_words(photos, full, vit_file), "--resume")
    assert [path.name for path in full.iterdir()] == ["mine.txt"]  # not even a lock
    assert not (tmp_path / "gone").exists()
    tally("outputs that cannot be", 12 + 4 + 1 + 8 + 2)


def test_import_into_a_folder_in_use(run, photos, tmp_path, refused, tally):
    assert main(["export", str(run), "--format", "hp", "--out", str(tmp_path / "a.pth")]) == 0
    held = shutil.copytree(run, tmp_path / "held")
    words = ["import-hp", tmp_path / "a.pth", "--out", held]
    refused("is not empty (it holds config.json", *words)
    with pytest.raises(UsageError, match="; pass --overwrite to replace it, or another folder$"):  # and no --resume
        hpseg.import_hp(tmp_path / "a.pth", held)
    with RunLock(held) as lock:
        lock.acquire()
        refused("another program is writing to", *words, "--overwrite")
    assert main([str(word) for word in [*words, "--overwrite"]]) == 0
    tally("second programs")


def test_names_of_all_kinds(run, vit_file, tmp_path, capsys, tally):
    """Names that begin with a dash, break the line, are no UTF-8, are as long as the system lets them be."""
    names = ["-dash", "new\nline", "tab\t", " spaces ", "quote'\"", "a" * 251, os.fsdecode(b"\xff\xfe"), "東京é"]
    folder = tmp_path / "-photos"
    folder.mkdir()
    for number, name in enumerate(names):
        paint(40, 30, number).save(folder / f"{name}.png")
    (folder / os.fsdecode(b"bad\xff\n.png")).write_bytes(b"")
    for cached in (False, True):
        out = tmp_path / f"run\n{cached}"
        words = train_words(folder, out, vit_file, steps=9, cache_features=cached, consistency_weight=0.0)
        assert main(words) == 0
        assert len(json.loads((out / "results.json").read_text())["unreadable"]) == 1
        assert main([*words, "--resume"]) == 0
    assert main(["predict", str(run), str(folder), "--out", str(tmp_path / "maps")]) == 0
    assert {path.name for path in (tmp_path / "maps").iterdir()} == {f"{name}.png" for name in names}
    assert main(["show", str(run), str(folder), "--out", str(tmp_path / os.fsdecode(b"\xff.png"))]) == 0
    assert main(train_words(folder, tmp_path / ("n" * 300), vit_file)) == 1
    assert "hpseg train: error: File name too long: " in capsys.readouterr().err
    tally("pictures of odd names", 4 * len(names))

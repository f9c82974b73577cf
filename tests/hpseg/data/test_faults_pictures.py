"""Pictures and label maps that are damaged, odd or not there, and loading processes that fail."""

from __future__ import annotations

import random
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from runs import flags, train_words
from tiny import SMALL, paint

import hpseg
from hpseg.cli.main import main
from hpseg.data.folder import _say_nothing_of_lost_connections, find_images, load_batches
from hpseg.data.transforms import load_image
from hpseg.evaluation.evaluate import evaluate
from hpseg.inference.predict_files import predict_files
from hpseg.run.errors import RunStopped, UsageError
from hpseg.runtime.distributed import ALONE, explained


def write_bomb(path):
    """A small file that says that it is 60,000 x 60,000 pixels; no memory holds them."""
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + (13).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
        + (0).to_bytes(4, "big") + b"IEND" + zlib.crc32(b"IEND").to_bytes(4, "big")
    )  # fmt: skip


def bad_pictures(folder):
    """kind -> file that cannot be decoded."""
    whole = folder / "whole.jpg"
    paint(64, 48, 9).save(whole)
    content = whole.read_bytes()
    whole.unlink()
    kinds = {
        "empty.jpg": b"",
        "text.jpg": b"not a picture",
        "truncated.jpg": content[: len(content) // 2],
        "noise.png": b"\x89PNG\r\n\x1a\n" + random.Random(0).randbytes(400),
        "header.jpg": content[:20],
    }
    for name, bytes_ in kinds.items():
        (folder / name).write_bytes(bytes_)
    write_bomb(folder / "bomb.png")
    return [*kinds, "bomb.png"]


def odd_pictures(folder):
    """kind -> picture that can."""
    exif = Image.Exif()
    exif[0x0112] = 8
    paint(40, 30, 0).save(folder / "rotated.jpg", exif=exif)
    paint(40, 30, 1).convert("CMYK").save(folder / "cmyk.jpg")
    paint(40, 30, 2).quantize(16).save(folder / "palette.png")
    Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50).save(folder / "16bit.png")
    paint(1, 1, 3).save(folder / "1x1.png")
    paint(700, 3, 4).save(folder / "long.png")
    paint(40, 30, 5).save(folder / "страница 東京 é.png")
    paint(40, 30, 6).convert("LA").save(folder / "gray-alpha.png")
    return [path.name for path in folder.iterdir()]


def test_pictures_of_all_kinds(run, vit_file, tmp_path, capsys, tally):
    """Bad ones are named, skipped and counted, by training, prediction and evaluation; odd ones are read right."""
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    (data / "labels").mkdir()
    odd = odd_pictures(data / "images")
    for path in (data / "images").iterdir():
        picture = load_image(path)
        Image.fromarray(np.full((picture.height, picture.width), 1, np.uint8)).save(
            data / "labels" / f"{path.stem}.png"
        )
    bad = bad_pictures(data / "images")
    for name in bad:
        Image.fromarray(np.zeros((48, 64), np.uint8)).save(data / "labels" / f"{Path(name).stem}.png")

    settings = {**SMALL, "weights": vit_file, "steps": 12, "batch_size": 4}
    results = hpseg.train(data / "images", tmp_path / "run", **settings)
    assert sorted(Path(name).name for name in results["unreadable"]) == sorted(bad)
    skipped = predict_files(run, [data / "images"], tmp_path / "out")
    assert sorted(Path(name).name for name in skipped) == sorted(bad)
    assert len(list((tmp_path / "out").iterdir())) == len(odd)
    for name in odd:
        picture = load_image(data / "images" / name)
        assert Image.open(tmp_path / "out" / f"{Path(name).stem}.png").size == picture.size
    scores = evaluate(tmp_path / "run", data, baselines=False)
    assert scores["images"] == len(odd) and sorted(Path(name).name for name in scores["unreadable"]) == sorted(bad)
    for work in (
        lambda: hpseg.train(data / "images", tmp_path / "strict", strict=True, **settings),
        lambda: predict_files(run, [data / "images"], tmp_path / "strict-out", strict=True),
        lambda: evaluate(tmp_path / "run", data, baselines=False, strict=True),
    ):
        with pytest.raises(UsageError, match="strict: "):
            work()
    for name in bad:
        tally(f"pictures that cannot be decoded, {Path(name).stem}", 6)
    tally("pictures of odd kinds", 3 * len(odd))


@pytest.mark.slow
def test_a_picture_of_108_million_pixels(run, tmp_path, tally):
    Image.new("RGB", (12_000, 9_000), (90, 120, 30)).save(tmp_path / "large.png", compress_level=1)
    labels = hpseg.load(run, "cpu").predict(tmp_path / "large.png")
    assert labels.shape == (9_000, 12_000)
    tally("pictures of 12,000 x 9,000 pixels")


def test_symbolic_links(tmp_path):
    folder = tmp_path / "photos"
    (folder / "below").mkdir(parents=True)
    paint(9, 9, 0).save(folder / "below" / "a.png")
    (folder / "below" / "up").symlink_to(folder, target_is_directory=True)
    (folder / "nowhere.png").symlink_to(tmp_path / "gone.png")
    (folder / "self.png").symlink_to(folder / "self.png")
    assert [path.name for path in find_images(folder)] == ["a.png"]


@pytest.mark.parametrize("kind", ["size", "ids", "colours", "text", "bomb"])
def test_label_maps_that_do_not_fit(scored_run, tmp_path, kind, tally):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    paint(40, 30, 0).save(tmp_path / "images" / "a.png")
    label = tmp_path / "labels" / "a.png"
    if kind == "size":
        Image.fromarray(np.zeros((31, 40), np.uint8)).save(label)
    elif kind == "ids":
        Image.fromarray(np.full((30, 40), 40_000, np.uint16)).save(label)
    elif kind == "colours":
        paint(40, 30, 0).save(label)
    elif kind == "bomb":
        write_bomb(label)
    else:
        label.write_text("no picture")
    with pytest.raises(UsageError, match="a.png"):
        evaluate(scored_run, tmp_path, baselines=False)
    tally("label maps that do not fit")


def test_labels_that_cannot_be(photos, vit_file, tmp_path, refused, tally):
    data, out = tmp_path / "data", tmp_path / "run"
    for i in range(4):
        for folder, picture in (("images", paint(48, 48, i)), ("labels", Image.new("L", (48, 48), i % 3))):
            (data / folder).mkdir(parents=True, exist_ok=True)
            picture.save(data / folder / f"{i}.png")
    lists = {"binary": b"\xff\xfe\x00", "blank": b"\n \n", "wrong": b"0\nnobody\n", "folder": None}
    for name, content in lists.items():
        (tmp_path / name).mkdir() if content is None else (tmp_path / name).write_bytes(content)
    dgcl = dict(method="dgcl", classes=3, batch_size=2, size=32, dim=16, bank_rows=60, weights=vit_file, steps=2)
    shares = ("", "0/4", "5/4", "1/0", "1/2/3", "half", "9" * 50 + "/1")
    for labeled in (*shares, *(tmp_path / name for name in (*lists, "missing"))):
        refused("labeled: ", "train", data, "--out", out, *flags({**dgcl, "labeled": labeled}))
        tally("options that cannot be")
    with pytest.raises(UsageError, match="labeled: "):
        hpseg.train(data, out, **dgcl, labeled="a\0b")
    refused("labeled: expected with method", *train_words(data, out, vit_file, labeled="1/2"))
    for labelled in (tmp_path / "missing", tmp_path / "binary", tmp_path / "folder", photos):
        refused("", *train_words(data, out, vit_file, select_on_labels=labelled))
        tally("options that cannot be")
    with pytest.raises(SystemExit, match="2"):
        main(train_words(photos, out, vit_file, preset="smal"))
    with pytest.raises(UsageError, match="preset: expected one of .*small.*, got 'smal'"):
        hpseg.train(photos, out, weights=vit_file, preset="smal")
    assert not out.exists()


def test_an_error_of_a_loading_process_is_a_sentence(vit_file, tmp_path, refused, tally):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / "photos" / f"{number}.png").write_bytes(b"")
    words = train_words(tmp_path / "photos", tmp_path / "run", vit_file, workers=1)
    refused("images: none of the 3 pictures can be decoded", *words)
    told = "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback\nRuntimeError: no shared memory"
    sentence = r"^workers: a data loading process failed \(RuntimeError: no shared memory\); "
    with pytest.raises(RunStopped, match=sentence), explained(ALONE, tmp_path):
        raise RuntimeError(told)
    tally("errors in a loading process", 2)


def where_the_hook_is_from(_items):
    return [sys.excepthook.__module__]


def test_a_loading_process_says_nothing_of_a_training_process_that_ended(monkeypatch):
    """A race of milliseconds, between a batch that is handed over and the death of another loading process."""
    assert next(load_batches([0], [[0]], 1, where_the_hook_is_from)) == ["hpseg.data.folder"]
    told = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: told.append(kind))
    _say_nothing_of_lost_connections(0)
    for error in (ConnectionResetError(104, "Connection reset by peer"), EOFError(), KeyError("name")):
        sys.excepthook(type(error), error, None)
    assert told == [KeyError]

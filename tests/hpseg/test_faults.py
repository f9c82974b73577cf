"""What happens to a run when processes, disks and files fail. Prints, at the end, how many faults were injected.

`pytest -m "slow or not slow" tests/hpseg/test_faults*.py` is the whole of it.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import signal
import socket
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import SMALL, in_child, paint

import hpseg
from hpseg.cli.main import main
from hpseg.data.folder import find_images
from hpseg.data.transforms import load_image
from hpseg.evaluation.evaluate import evaluate
from hpseg.features import cache as feature_cache
from hpseg.inference.predict_files import predict_files
from hpseg.run.errors import RunStopped, UsageError
from hpseg.run.files import RunLock, write_atomically
from hpseg.run.folder import load_state

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
CACHED = {**SMALL, "consistency_weight": 0.0, "cache_features": True, "preview_every": 4}


def killed_after(seconds, work):
    """Whether work(), in a process of its own, was killed before it was done; a failure of its own is one here."""
    child = in_child(work)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (status := os.waitpid(child, os.WNOHANG))[0]:
            assert status[1] == 0, "the process failed by itself"
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


def assert_whole(folder):
    """Every file under its own name can be read; those under temporary names do not count."""
    for path in folder.rglob("*"):
        if path.name.startswith(".") or path.is_dir():
            continue
        if path.suffix == ".safetensors":
            load_file(path)
        elif path.suffix == ".pt":
            load_state(path)
        elif path.suffix == ".json":
            json.loads(path.read_text())
        elif path.suffix in (".png", ".jpg"):
            load_image(path)
        elif path.suffix == ".npy":
            np.load(path)


@needs_fork
def test_killed_at_twenty_random_moments(photos, vit_file, tmp_path, monkeypatch, tally):
    """Training, its checkpoints, its feature cache and its previews: what goes on ends as what was never stopped."""
    monkeypatch.setattr(feature_cache, "SHARD_BYTES", 1)  # a shard per photograph
    settings = {**CACHED, "weights": vit_file, "steps": 30, "save_every": 2}
    started = time.monotonic()
    hpseg.train(photos, tmp_path / "whole", **settings)
    whole, seconds = load_file(tmp_path / "whole" / "model.safetensors"), time.monotonic() - started
    moments, kills, run = random.Random(0), 0, 0
    while kills < 20:
        out = tmp_path / f"run{run}"
        train = partial(hpseg.train, photos, out, resume=out.exists(), **settings)
        if killed_after(moments.uniform(0, seconds), train):
            kills += 1
            if out.exists():
                assert_whole(out)
        else:
            run += 1
    hpseg.train(photos, tmp_path / f"run{run}", resume=(tmp_path / f"run{run}").exists(), **settings)
    for number in range(run + 1):
        found = load_file(tmp_path / f"run{number}" / "model.safetensors")
        assert all(torch.equal(found[name], whole[name]) for name in whole), f"run{number} ended otherwise"
        steps = [line.split(",")[0] for line in (tmp_path / f"run{number}" / "log.csv").read_text().splitlines()[1:]]
        assert steps == [str(step) for step in range(30)]
    tally("kills of a training process", kills)


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
@pytest.mark.parametrize("limit", [200, 5_000, 20_000])
def test_a_disk_that_takes_no_more(photos, vit_file, tmp_path, limit, tally):
    """The system refuses to let a file grow past `limit` bytes: one sentence, and what is there is whole."""
    out = tmp_path / "run"

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(RunStopped, match=r"out: File too large: .*run.*, --resume goes on"):
            hpseg.train(photos, out, weights=vit_file, steps=6, save_every=2, **SMALL)

    child = in_child(work)
    assert os.waitpid(child, 0)[1] == 0
    assert_whole(out)
    assert not list(out.glob(".*.tmp"))
    hpseg.train(photos, out, resume=(out / "config.json").exists(), overwrite=not (out / "config.json").exists(),
                weights=vit_file, steps=6, save_every=2, **SMALL)  # fmt: skip
    tally("full disks")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, tally):
    (tmp_path / "a.json").write_text("old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device: .*a.json"):
        write_atomically(tmp_path / "a.json", b"new")
    assert (tmp_path / "a.json").read_text() == "old" and len(list(tmp_path.iterdir())) == 1
    tally("full disks")


def test_two_programs_and_one_run(photos, vit_file, tmp_path, tally):
    out = tmp_path / "run"
    settings = {**SMALL, "weights": vit_file, "steps": 2}
    hpseg.train(photos, out, **settings)
    before = (out / "model.safetensors").read_bytes()
    with RunLock(out) as lock:
        lock.acquire()
        for option in ({"resume": True}, {"overwrite": True}):
            with pytest.raises(UsageError, match="out: another program is writing to .*run"):
                hpseg.train(photos, out, **option, **settings)
            tally("second programs")
        hpseg.load(out, "cpu")  # reading is free
    assert (out / "model.safetensors").read_bytes() == before
    hpseg.train(photos, out, overwrite=True, **settings)


def test_a_run_of_another_version(run, tmp_path, scored_run, tally):
    config = json.loads((scored_run / "config.json").read_text())
    for number in (None, 2):
        (scored_run / "config.json").write_text(json.dumps({**config, "format": number}))
        with pytest.raises(UsageError, match=f"format {number}, this hpseg reads format 1"):
            hpseg.load(scored_run, "cpu")
        tally("runs of another format")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "state.pt", "labels.json"])
@pytest.mark.parametrize("how", ["empty", "cut", "noise"])
def test_a_damaged_run_is_named(scored_run, photos, vit_file, name, how, tally):
    path = scored_run / name
    content = path.read_bytes() if path.exists() else b'{"clusters": []}'
    noise = random.Random(0).randbytes(len(content))
    path.write_bytes({"empty": b"", "cut": content[: len(content) // 2], "noise": noise}[how])
    with pytest.raises(UsageError, match=name):
        if name == "state.pt":
            hpseg.train(photos, scored_run, resume=True, weights=vit_file, steps=20, **SMALL)
        else:
            hpseg.load(scored_run, "cpu")
    tally("damaged files of a run")


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("evil"),)


def test_nothing_is_unpickled(photos, scored_run, vit_file, tmp_path, monkeypatch, tally):
    """Where a torch file or an array is read, a pickle that would run something is refused and has not run."""
    monkeypatch.chdir(tmp_path)
    torch.save({"blocks": Evil()}, "weights.pth")
    Path("plain.pth").write_bytes(pickle.dumps(Evil()))
    np.save("objects.npy", np.array([Evil()], dtype=object), allow_pickle=True)
    torch.save({"step": Evil()}, scored_run / "state.pt")
    for name in ("weights.pth", "plain.pth"):
        with pytest.raises(UsageError, match=name):
            hpseg.train(photos, tmp_path / "run", **{**SMALL, "weights": name})
        assert main(["import-hp", name, "--out", "imported"]) == 2
        tally("malicious pickles", 2)
    with pytest.raises(UsageError, match="objects.npy"):
        predict_files(scored_run, ["objects.npy"], tmp_path / "out")
    with pytest.raises(UsageError, match="state.pt"):
        hpseg.train(photos, scored_run, resume=True, weights=vit_file, steps=20, **SMALL)
    tally("malicious pickles", 2)
    assert not Path("evil").exists()


def test_a_runs_paths_stay_in_it(scored_run, tally):
    config = json.loads((scored_run / "config.json").read_text())
    (scored_run / "link.safetensors").symlink_to("../other.safetensors")
    for setting, message in (
        ({"weights": "../other.safetensors"}, r"lie outside of it: '../other.safetensors'"),
        ({"weights": "link.safetensors"}, r"lie outside of it: 'link.safetensors'"),
        ({"backbone": "local-dir:../other", "weights": None}, "backbone: expected 'embedded' or the name of a timm"),
        ({"backbone": "hf-hub:a/b", "weights": None}, "backbone: expected 'embedded' or the name of a timm model"),
        ({"method": "../hp"}, "method: expected one of"),
    ):
        (scored_run / "config.json").write_text(json.dumps({**config, **setting}))
        with pytest.raises(UsageError, match=message):
            hpseg.load(scored_run, "cpu")
        tally("paths out of a run")


OFFLINE = """
import socket, sys

def refuse(*args, **options):
    raise SystemExit(f"network: {args[1:]}")

socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
import hpkernels, hpseg
hpseg.train(sys.argv[1], sys.argv[2], classes=3, steps=2, batch_size=2, size=64, predict_size=64, workers=0, quiet=True)
hpseg.load(sys.argv[2]).predict(sys.argv[3])
"""


def test_no_network(photos, tmp_path, tally):
    command = [sys.executable, "-c", OFFLINE, str(photos), str(tmp_path / "run"), str(photos / "a.jpg")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    tally("programs without a network")
    assert socket.getaddrinfo is not None


# Pictures ------------------------------------------------------------------------------------------------------------


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


def test_weights_of_another_model(photos, vit_file, tmp_path, tally):
    with pytest.raises(UsageError, match="weights: .*tiny.safetensors does not fit"):
        hpseg.train(photos, tmp_path / "run", **{**SMALL, "weights": vit_file, "backbone": "vit_tiny_patch16_224"})
    assert not (tmp_path / "run").exists()
    tally("weights of another model")


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

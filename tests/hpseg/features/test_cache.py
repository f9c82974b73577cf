"""Features cached on the disk: the same training, whatever is killed, changed, damaged or full."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, load_file, save_file
from tiny import ARCH, SMALL, make_vit, paint

import hpseg
from hpseg.data.folder import PhotoFolder, find_images
from hpseg.features import cache as feature_cache
from hpseg.features.tokens import Encoder
from hpseg.models.backbone import load_backbone
from hpseg.run.config import make_config
from hpseg.run.errors import UsageError
from hpseg.run.files import write_atomically

CACHED = {**SMALL, "cache_features": True, "consistency_weight": 0.0, "crop": "random", "preview_every": 0}


@pytest.fixture
def pictures(photos, tmp_path):
    return shutil.copytree(photos, tmp_path / "pictures")


@pytest.fixture
def two_a_shard(monkeypatch):
    """Five pictures make three shards."""
    monkeypatch.setattr(feature_cache, "SHARD_BYTES", 2.5 * 4 * 4 * 1.6 * (32 + 9) * 4)


def open_encoder(backbone, pictures, out, **settings):
    config = make_config(**{"classes": 3, "crop": "random", "cache_features": True, "workers": 0, **settings})
    folder = PhotoFolder(find_images(pictures), backbone.snap(32), config.crop, 0, False, resize=config.resize)
    return Encoder(backbone, folder, config, torch.device("cpu"), out)


class Counted:
    """What a fill runs the backbone on and what it says."""

    def __init__(self, backbone, news):
        self.backbone, self.news, self.images, self.lines = backbone, news, 0, []

    def filled(self, pictures, out, **settings):
        self.images = 0
        self.news()
        hook = self.backbone.register_forward_hook(lambda *_: setattr(self, "images", self.images + 1))
        encoder = open_encoder(self.backbone, pictures, out, **settings)
        encoder.fill()
        hook.remove()
        self.lines = self.news()
        return encoder


@pytest.fixture
def counted(vit_file, news):
    return Counted(load_backbone(weights=vit_file), news)


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def same_tokens(one, other):
    for a, b in zip(one, other, strict=True):
        assert a.grid == b.grid and torch.equal(a.features, b.features) and torch.equal(a.neighbors, b.neighbors)


@pytest.mark.parametrize("workers", [0, 2])
def test_holds_what_the_backbone_says_bit_for_bit(counted, pictures, tmp_path, two_a_shard, workers):
    encoder = counted.filled(pictures, tmp_path, workers=workers)
    assert counted.images == 5 and len(shards(tmp_path / "features")) == 3
    whole = encoder.dataset.whole(8)
    for index in range(5):
        expected = counted.backbone(whole[0, index][0][None], with_neighbors=True)
        same_tokens([encoder.cache[index]], [expected])
    again = counted.filled(pictures, tmp_path)
    assert counted.images == 0 and "those of all 5 photographs" in counted.lines[-1]
    keys = [[(0, 4), (1, 0)], [(2, 2)]]
    same_tokens([view for view, _ in encoder(keys)], [view for view, _ in again(keys)])


def test_half_precision_is_stored_and_nothing_else_changes(counted, pictures, tmp_path):
    full = counted.filled(pictures, tmp_path / "full")
    half = counted.filled(pictures, tmp_path / "half", cache_dtype="bf16")
    assert half.cache[0].features.dtype == torch.bfloat16
    (exact, _), (rounded, _) = next(full([[(0, 1)]])), next(half([[(0, 1)]]))
    assert rounded.features.dtype == torch.float32
    assert torch.equal(rounded.features, exact.features.bfloat16().float())
    assert torch.equal(rounded.neighbors, exact.neighbors)
    sizes = [sum(path.stat().st_size for path in shards(tmp_path / name / "features")) for name in ("full", "half")]
    assert sizes[1] < 0.7 * sizes[0]


def test_further_runs_train_the_same_head_without_the_backbone(pictures, vit_file, tmp_path, monkeypatch, news):
    settings = {**CACHED, "weights": vit_file, "steps": 4, "cache_dir": tmp_path / "shared"}
    hpseg.train(pictures, tmp_path / "own", **{**settings, "cache_dir": None})
    hpseg.train(pictures, tmp_path / "first", **settings)
    assert (tmp_path / "own" / "features").is_dir() and not (tmp_path / "first" / "features").exists()
    monkeypatch.setattr("hpseg.models.backbone.Backbone.forward", lambda *_, **__: pytest.fail("the backbone was run"))
    hpseg.train(pictures, tmp_path / "second", **{**settings, "quiet": False})
    assert f"features: those of all 5 photographs are in {tmp_path / 'shared'}" in news()
    hpseg.train(pictures, tmp_path / "own", overwrite=True, **{**settings, "cache_dir": None})
    heads = [load_file(tmp_path / name / "model.safetensors") for name in ("own", "first", "second")]
    for name, value in heads[0].items():
        assert torch.equal(value, heads[1][name]) and torch.equal(value, heads[2][name])
    assert json.loads((tmp_path / "second" / "config.json").read_text())["cache_dir"] == str(tmp_path / "shared")


def test_a_run_may_be_resumed_with_another_folder(pictures, vit_file, tmp_path):
    settings = {**CACHED, "weights": vit_file, "save_every": 2}
    hpseg.train(pictures, tmp_path / "whole", steps=4, **settings)
    shutil.copytree(tmp_path / "whole", tmp_path / "moved")
    hpseg.train(pictures, tmp_path / "moved", steps=4, resume=True, cache_dir=tmp_path / "elsewhere", **settings)
    assert len(shards(tmp_path / "elsewhere")) == len(shards(tmp_path / "moved" / "features")) == 1
    with pytest.raises(UsageError, match="cache_dtype: .* started with 'fp32', got 'bf16'"):
        hpseg.train(pictures, tmp_path / "moved", steps=4, resume=True, cache_dtype="bf16", **settings)


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "rubbish", "header"])
def test_damaged_shards_are_made_anew(counted, pictures, tmp_path, two_a_shard, damage):
    before = counted.filled(pictures, tmp_path)
    expected = [before.cache[i].features.clone() for i in range(5)]
    path = shards(tmp_path / "features")[1]
    content, stored = path.read_bytes(), load(path.read_bytes())
    middle = len(content) // 2
    damaged = {
        "cut": content[:middle],
        "empty": b"",
        "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "rubbish": b"rubbish" * 99,
        "header": content.replace(b'\\"patch\\": 8', b'\\"patch\\": 9'),
    }[damage]
    assert damaged != content
    path.unlink()  # a new file: the old one is still mapped
    path.write_bytes(damaged)
    after = counted.filled(pictures, tmp_path)
    assert 1 <= counted.images <= 2 and f"{path.name} is damaged" in counted.lines[0]
    assert all(torch.equal(after.cache[i].features, expected[i]) for i in range(5))
    found = load_file(path)
    assert found.keys() == stored.keys() and all(torch.equal(found[name], stored[name]) for name in stored)


def test_only_shards_of_changed_photographs_are_made_anew(counted, pictures, tmp_path, two_a_shard):
    counted.filled(pictures, tmp_path)
    kept = set(shards(tmp_path / "features"))
    paint(90, 60, 77).save(pictures / "b.png")  # the second of five
    after = counted.filled(pictures, tmp_path)
    assert counted.images == 2 and len(kept & set(shards(tmp_path / "features"))) == 2
    assert "photographs that have been changed, moved, added or removed; removed" in counted.lines[0]
    fresh = counted.filled(pictures, tmp_path / "fresh")
    same_tokens((after.cache[i] for i in range(5)), (fresh.cache[i] for i in range(5)))
    os.utime(pictures / "a.jpg", ns=(0, 10**18))
    counted.filled(pictures, tmp_path)
    assert counted.images == 2


def test_another_backbone_or_transform_is_said_and_nothing_else_is_touched(counted, pictures, vit_file, tmp_path):
    counted.filled(pictures, tmp_path)
    old = shards(tmp_path / "features")
    for name in ("notes.txt", "model.safetensors", f"{'0' * 32}.safetensors"):  # the last has a shard's name
        save_file({"mine": torch.zeros(1)}, tmp_path / "features" / name)
    other = Counted(load_backbone(weights=vit_file, pos_embed="dino"), counted.news)
    other.filled(pictures, tmp_path)
    assert other.images == 5 and "(1) of pos_embed timm instead of dino; removed" in other.lines[0]
    assert not old[0].exists() and len(list((tmp_path / "features").iterdir())) == 1 + 3

    save_file(make_vit(seed=1).state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "w.json").write_bytes(vit_file.with_suffix(".json").read_bytes())
    weights = Counted(load_backbone(weights=tmp_path / "w.safetensors", pos_embed="dino"), counted.news)
    weights.filled(pictures, tmp_path)
    fingerprints = f"backbone {other.backbone.fingerprint} instead of {weights.backbone.fingerprint}"
    assert weights.images == 5 and fingerprints in weights.lines[0]
    weights.filled(pictures, tmp_path, resize="nearest")
    assert weights.images == 5 and "interpolation bilinear, antialiased instead of nearest" in weights.lines[0]
    facts = {"arch": {**ARCH, "num_heads": 4}, "mean": [0.5] * 3, "std": [0.2] * 3}
    (tmp_path / "w.json").write_text(json.dumps(facts))
    heads = Counted(load_backbone(weights=tmp_path / "w.safetensors", pos_embed="dino"), counted.news)
    heads.filled(pictures, tmp_path)  # the same weights, read in another way
    assert heads.images == 5 and "architecture" in heads.lines[0] and "std" in heads.lines[0]


def test_runs_share_a_folder_and_leave_each_other_alone(counted, pictures, vit_file, tmp_path):
    shared = str(tmp_path / "shared")
    counted.filled(pictures, tmp_path / "a", cache_dir=shared)
    other = Counted(load_backbone(weights=vit_file, dtype="bf16"), counted.news)
    other.filled(pictures, tmp_path / "b", cache_dir=shared)
    assert "computed in fp32 instead of bf16; left as they are" in other.lines[0]
    counted.filled(pictures, tmp_path / "c", cache_dir=shared)
    assert counted.images == 0 and len(counted.lines) == 1 and len(shards(tmp_path / "shared")) == 2
    link = tmp_path / "d" / "features"  # a run's own folder that is a link to the shared one is no run's own
    link.parent.mkdir()
    link.symlink_to(shared)
    counted.filled(pictures, tmp_path / "d")
    assert counted.images == 0 and len(shards(tmp_path / "shared")) == 2


def test_two_writers_of_a_shared_folder_do_not_harm_each_other(pictures, vit_file, tmp_path, two_a_shard):
    (tmp_path / "shared").mkdir()
    abandoned, live = (tmp_path / "shared" / f".hpseg-{i * 16}.tmp" for i in "ab")
    for path in (abandoned, live):
        path.write_bytes(b"half")
    os.utime(abandoned, (0, 0))
    backbones = [load_backbone(weights=vit_file) for _ in range(4)]

    def fill(backbone):
        encoder = open_encoder(backbone, pictures, tmp_path, cache_dir=str(tmp_path / "shared"))
        encoder.fill()
        return encoder

    with ThreadPoolExecutor(4) as pool:
        encoders = list(pool.map(fill, backbones))
    for encoder in encoders[1:]:
        same_tokens(*((e.cache[i] for i in range(5)) for e in (encoders[0], encoder)))
    assert set((tmp_path / "shared").iterdir()) == {*encoders[0].cache.paths, live}


def test_what_another_process_has_made_since_is_found(vit_file, pictures, tmp_path):
    backbone = load_backbone(weights=vit_file)
    first, second = (open_encoder(backbone, pictures, tmp_path) for _ in range(2))
    first.fill()
    second.cache.problems.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbone, "forward", lambda *_, **__: pytest.fail("the backbone was run"))
        second.fill()
    same_tokens((first.cache[i] for i in range(5)), (second.cache[i] for i in range(5)))


def test_unreadable_pictures_are_known_and_their_stand_ins_watched(counted, pictures, tmp_path, two_a_shard):
    (pictures / "b.png").write_bytes(b"not a picture")  # the last of its shard: c.JPG, in the next one, stands in
    counted.filled(pictures, tmp_path)
    again = counted.filled(pictures, tmp_path)
    assert counted.images == 0 and again.unreadable == {str(pictures / "b.png")}
    paint(70, 60, 5).save(pictures / "c.JPG")
    after = counted.filled(pictures, tmp_path)
    assert counted.images == 4 and any("c.JPG has changed" in line for line in counted.lines)
    assert torch.equal(after.cache[1].features, after.cache[2].features)


def test_a_killed_fill_goes_on(pictures, vit_file, tmp_path, monkeypatch, news):
    photograph = 4 * 4 * 1.6 * 41 * 4  # bytes: one a shard
    for number in range(60):
        paint(40, 40, number).save(pictures / f"x{number:02}.png")
    settings = {**CACHED, "weights": str(vit_file), "steps": 3, "workers": 1, "quiet": False}
    command = (
        f"import hpseg.features.cache, torch; hpseg.features.cache.SHARD_BYTES = {photograph}\n"
        f"torch.set_num_threads(1); hpseg.train({str(pictures)!r}, {str(tmp_path / 'run')!r}, **{settings!r})"
    )
    process = subprocess.Popen([sys.executable, "-c", command], start_new_session=True)
    folder = tmp_path / "run" / "features"
    while len(shards(folder)) < 3:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    made = {path: path.stat().st_mtime_ns for path in shards(folder)}
    assert 3 <= len(made) < 65
    (folder / ".hpseg-0123456789abcdef.tmp").write_bytes(b"half")
    monkeypatch.setattr(feature_cache, "SHARD_BYTES", photograph)
    hpseg.train(pictures, tmp_path / "run", resume=True, **settings)
    assert any(line.startswith(f"features: {len(made)} of 65 photographs are in") for line in news())
    assert len(list(folder.iterdir())) == 65 and all(path.stat().st_mtime_ns == at for path, at in made.items())


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(pictures, vit_file, tmp_path, monkeypatch):
    settings = {**CACHED, "weights": vit_file, "steps": 2}
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(feature_cache.shutil, "disk_usage", lambda _: usage._replace(free=9_000))
    with pytest.raises(UsageError, match="GiB are needed in .*features.*--cache-dir.*--cache-dtype bf16.*--no-cache"):
        hpseg.train(pictures, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_a_write_that_fails_is_said(pictures, vit_file, tmp_path, monkeypatch):
    def no_space(_):
        raise OSError(28, "No space left on device")

    def full(path, content):
        with monkeypatch.context() as disk:
            disk.setattr(os, "fsync", no_space)
            write_atomically(path, content)

    monkeypatch.setattr(feature_cache, "write_atomically", full)
    with pytest.raises(UsageError, match="cannot write to .*features .*No space left on device.*--cache-dir"):
        hpseg.train(pictures, tmp_path / "run", weights=vit_file, steps=2, **CACHED)
    assert not list((tmp_path / "run" / "features").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cache_dir: .* is a file, expected a folder"):
        hpseg.train(pictures, tmp_path / "b", weights=vit_file, steps=2, cache_dir=tmp_path / "file", **CACHED)
    assert not (tmp_path / "b").exists()
    with pytest.raises(UsageError, match="cache_dir: expected --cache-features with it"):
        make_config(cache_features=False, cache_dir="x")
    with pytest.raises(UsageError, match="crop 'five' enlarges half-size crops"):
        make_config(cache_features=True, crop="five")


def test_shards_are_mapped_and_not_read(counted, pictures, tmp_path):
    """What a shard says of itself is open to any reader, and its tensors lie in the file's pages."""
    encoder = counted.filled(pictures, tmp_path)
    (path,) = shards(tmp_path / "features")
    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["description"])
    assert description["recipe"]["backbone"] == counted.backbone.fingerprint and len(description["files"]) == 5
    if sys.platform == "linux":
        address = encoder.cache[0].features.data_ptr()
        maps = Path("/proc/self/maps").read_text().splitlines()
        spans = (line.split() for line in maps if line.rstrip().endswith(path.name))
        bounds = [[int(end, 16) for end in span[0].split("-")] for span in spans]
        assert any(low <= address < high for low, high in bounds)

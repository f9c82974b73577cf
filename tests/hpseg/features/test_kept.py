"""Tokens of whole pictures for scoring: bit for bit the backbone's, wherever they come from."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny import SMALL, paint

import hpseg
from hpseg.data.folder import find_images
from hpseg.data.transforms import load_image
from hpseg.evaluation.evaluate import evaluate
from hpseg.evaluation.probes import probe
from hpseg.features import kept as kept_tokens
from hpseg.features.kept import KeptTokens

CACHED = {**SMALL, "cache_features": True, "consistency_weight": 0.0, "preview_every": 0, "size": 48}


@pytest.fixture(scope="module")
def cached_run(tmp_path_factory, photos, vit_file):
    """A run whose training features are those that prediction sees: 48 pixels either way."""
    root = tmp_path_factory.mktemp("cached")
    shutil.copytree(photos, root / "photos")
    hpseg.train(root / "photos", root / "run", weights=vit_file, steps=2, **CACHED)
    return root


@pytest.fixture
def cached(cached_run, tmp_path):
    """A copy of that run, its segmenter, and what the backbone was shown."""
    run = shutil.copytree(cached_run / "run", tmp_path / "run")
    segmenter, shown = hpseg.load(run, device="cpu"), []
    segmenter.backbone.register_forward_hook(lambda _, inputs, __: shown.append(inputs[0]))
    return run, segmenter, shown


def open_kept(run, segmenter):
    return KeptTokens(segmenter.backbone, segmenter.config, run)


def same(tokens, expected):
    assert tokens.grid == expected.grid and tokens.neighbors is None
    assert torch.equal(tokens.features, expected.features) and torch.equal(tokens.colours, expected.colours)


def files_in(run):
    return sorted((run / "features" / "pictures").glob("*"))


def test_photographs_of_the_run_are_not_shown_to_the_backbone(cached, cached_run):
    run, segmenter, shown = cached
    files, kept = find_images(cached_run / "photos"), open_kept(run, segmenter)
    for path in files:
        pixels = segmenter.prepare(load_image(path))[0]
        same(kept(pixels, path), segmenter.backbone(pixels))
    assert len(shown) == len(files) == 5 and not files_in(run)  # those for comparison alone


def test_another_picture_is_kept_under_its_pixels(cached, cached_run):
    run, segmenter, shown = cached
    pixels = segmenter.prepare(paint(64, 48, 77))[0]
    expected = segmenter.backbone(pixels)
    of_the_run = find_images(cached_run / "photos")[0]
    for _ in range(2):  # its name is that of a photograph which the run saw: the pixels decide
        same(open_kept(run, segmenter)(pixels, of_the_run), expected)
    assert len(shown) == 2 and len(files_in(run)) == 1
    other = pixels.clone()
    other[0, 0, 0, 0] ^= 1
    same(open_kept(run, segmenter)(other), segmenter.backbone(other))
    assert len(files_in(run)) == 2
    open_kept(run, segmenter)(pixels.flip(3), keep=False)
    assert len(files_in(run)) == 2


@pytest.mark.parametrize("damage", ["cut", "number"])
def test_what_is_damaged_is_computed_again(cached, damage):
    run, segmenter, shown = cached
    pixels = segmenter.prepare(paint(64, 48, 77))[0]
    expected = open_kept(run, segmenter)(pixels)
    [path] = files_in(run)
    content = path.read_bytes()
    path.write_bytes(content[:-100] if damage == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    same(open_kept(run, segmenter)(pixels), expected)
    assert len(shown) == 2 and path.read_bytes() == content


def test_a_folder_takes_so_much_and_no_more(cached, monkeypatch, news):
    run, segmenter, _ = cached
    pictures = [segmenter.prepare(paint(48, 48, seed))[0] for seed in range(3)]
    open_kept(run, segmenter)(pictures[0])
    size = files_in(run)[0].stat().st_size
    monkeypatch.setattr(kept_tokens, "KEPT_BYTES", 2 * size)
    news()
    kept = open_kept(run, segmenter)
    for pixels in (*pictures, *pictures):
        same(kept(pixels), segmenter.backbone(pixels))
    assert len(files_in(run)) == 2
    [line] = news()
    assert line.startswith(f"features: no more pictures are kept in {run / 'features' / 'pictures'} (")


def test_files_of_another_backbone_are_removed_from_a_runs_own_folder(cached):
    run, segmenter, _ = cached
    pixels = segmenter.prepare(paint(64, 48, 77))[0]
    open_kept(run, segmenter)(pixels)
    [path] = files_in(run)
    path.rename(path.with_name(f"{'0' * 16}-{'1' * 32}.safetensors"))
    path.with_name("notes.txt").write_text("mine")
    open_kept(run, segmenter)(pixels)
    assert [one.name for one in files_in(run)] == sorted([path.name, "notes.txt"])


def test_a_shared_folder_that_is_gone_is_not_made_again(cached_run, vit_file, tmp_path):
    settings = {**CACHED, "cache_dir": tmp_path / "shared"}
    hpseg.train(cached_run / "photos", tmp_path / "run", weights=vit_file, steps=1, **settings)
    segmenter = hpseg.load(tmp_path / "run", device="cpu")
    pixels = segmenter.prepare(paint(64, 48, 77))[0]
    open_kept(tmp_path / "run", segmenter)(pixels)
    assert len(list((tmp_path / "shared" / "pictures").iterdir())) == 1
    shutil.rmtree(tmp_path / "shared")
    same(open_kept(tmp_path / "run", segmenter)(pixels), segmenter.backbone(pixels))
    assert not (tmp_path / "shared").exists()


def test_a_run_without_a_cache_writes_none(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run")
    segmenter = hpseg.load(copy, device="cpu")
    pixels = segmenter.prepare(paint(64, 48, 77))[0]
    same(open_kept(copy, segmenter)(pixels), segmenter.backbone(pixels))
    assert not (copy / "features").exists()


def test_scores_and_probes_are_those_without_a_cache(cached, cached_run, data, monkeypatch):
    """The first time and the next: scores and weights are bit for bit those of a backbone that is always asked."""
    run, _, _ = cached
    shutil.copytree(data, run.parent / "data")

    def scores():
        found = [evaluate(run, run.parent / "data", rgb=True, device="cpu")]
        found.append(probe(run, run.parent / "data", score_on=run.parent / "data", steps=3, batch_size=3, device="cpu"))
        for one in found:
            del one["seconds"], one["phases"]
        return found, load_file(run / "probe.safetensors")

    def plain(self, pixels, photograph=None, keep=True):
        return self.backbone(pixels)

    first, again = scores(), scores()
    assert files_in(run) and (run / "baselines.safetensors").is_file()
    (run / "baselines.safetensors").unlink()
    monkeypatch.setattr(KeptTokens, "__call__", plain)
    expected = scores()
    for found, tensors in (first, again):
        assert found == expected[0]
        assert all(torch.equal(tensors[name], expected[1][name]) for name in tensors)

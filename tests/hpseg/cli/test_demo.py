"""The demo end to end with tiny settings, and the pictures it draws."""

import csv
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from hpseg import demo
from hpseg.assets import PHOTOS
from hpseg.cli.main import main
from hpseg.data import procedural


def run(*argv):
    return main(["demo", *(str(argument) for argument in argv)])


def test_demo_shows_photographs_first_and_measures_mosaics(tmp_path, monkeypatch, capsys, vit_file):
    few_photographs = tmp_path / "some"
    few_photographs.mkdir()
    for stem in demo.SHOWN:
        shutil.copy(PHOTOS / f"{stem}.jpg", few_photographs)
    monkeypatch.setattr(demo, "PHOTOS", few_photographs)
    monkeypatch.setattr("hpseg.reporting.report.write_report", lambda run, *, out, **options: out.write_text(run.name))
    small = dict(size=32, predict_size=32, batch_size=2, dim=16, pool_size=16, workers=0, consistency_weight=0.0)
    monkeypatch.setattr(demo, "MOSAIC_SETTINGS", {**demo.MOSAIC_SETTINGS, **small})
    monkeypatch.setattr(demo, "PHOTO_SETTINGS", {**demo.PHOTO_SETTINGS, **small})
    out = tmp_path / "out"
    few = ("--seeds", 2, "--steps", 2, "--train-images", 4, "--test-images", 4)
    assert run("--out", out, *few, "--device", "cpu", "--weights", vit_file) == 0

    results = json.loads((out / "results.json").read_text())
    assert set(results["miou"]) == set(demo.METHODS) and all(len(v) == 2 for v in results["miou"].values())
    assert all(0 <= v <= 100 for values in results["miou"].values() for v in values)
    assert results["miou_mean"]["trained"] == pytest.approx(np.mean(results["miou"]["trained"]))
    for name, views in (("photographs.jpg", 4), ("mosaics.png", 4)):
        with Image.open(out / name) as sheet:
            assert sheet.width > 500 and sheet.height > views * demo.HEIGHT
    assert {path.stem for path in (out / "overlays").iterdir()} == set(demo.SHOWN)
    assert (out / "photographs" / "model.safetensors").is_file()
    printed = capsys.readouterr().out.splitlines()
    seen = ", ".join(str(out / name) for name in ("report.html", "photographs.jpg", "overlays"))
    assert printed[0] == f"photographs: look at {seen}" and (out / "report.html").read_text() == "photographs"
    assert printed[1].startswith("mosaics, seed 0: mIoU ") and "trained head" in printed[-2] and "mean" in printed[-5]
    assert run("--out", out) == 2 and "hpseg demo: error: --out: " in capsys.readouterr().err


def test_every_photograph_has_an_author_a_licence_and_a_source():
    with open(PHOTOS / "ATTRIBUTION.tsv", encoding="utf-8", newline="") as file:
        listed = list(csv.DictReader(file, delimiter="\t"))
    files = sorted(path.name for path in PHOTOS.iterdir() if path.suffix != ".tsv")
    assert [entry["file"] for entry in listed] == files and len(files) > 50
    for entry in listed:
        assert all(entry.values()) and len(entry) == 5
        assert entry["licence"].startswith(("public domain", "CC0 1.0", "CC BY 2.0", "CC BY 4.0"))
        with Image.open(PHOTOS / entry["file"]) as picture:
            assert 256 <= min(picture.size) <= 384 and not picture.getexif()
    assert sum((PHOTOS / file).stat().st_size for file in files) < 2_300_000
    assert {f"{stem}.jpg" for stem in demo.SHOWN} <= set(files)


def test_default_folder_finds_a_free_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert demo.output_folder(None, False).name == "demo"
    (tmp_path / "demo").mkdir()
    assert demo.output_folder(None, False).name == "demo"  # empty: not in use
    (tmp_path / "demo" / "kept").touch()
    assert demo.output_folder(None, False).name == "demo-2"
    assert demo.output_folder(None, True).name == "demo"
    assert demo.output_folder(tmp_path / "elsewhere", False) == tmp_path / "elsewhere"


def test_bad_numbers_are_named(tmp_path, capsys):
    assert run("--out", tmp_path / "out", "--seeds", 0) == 2
    assert "hpseg demo: error: --seeds: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", procedural.TEXTURES)
def test_textures_are_fields_and_follow_the_seed(name):
    y, x = np.meshgrid(np.arange(48, dtype=np.float32), np.arange(64, dtype=np.float32), indexing="ij")
    one, same, other = (procedural.TEXTURES[name](np.random.default_rng(seed), y, x) for seed in (3, 3, 4))
    assert one.shape == (48, 64) and one.dtype == np.float32 and one.min() >= 0 and one.max() <= 1
    assert one.std() > 0.05 and np.array_equal(one, same) and not np.array_equal(one, other)


def test_mosaics_follow_the_seed_and_use_every_region():
    one, same, other = (procedural.mosaic(np.random.default_rng(seed), 96, demo.TEXTURES, 4) for seed in (0, 0, 1))
    assert one[0].shape == (96, 96, 3) and one[0].dtype == np.uint8 and one[1].dtype == np.int64
    assert np.array_equal(one[0], same[0]) and np.array_equal(one[1], same[1]) and not np.array_equal(one[0], other[0])
    assert len(np.unique(one[1])) == 4 and set(np.unique(one[1])) <= set(range(len(demo.TEXTURES)))


def test_colour_says_little_about_the_class():
    """Mean colours of a class over many mosaics lie closer together than its regions' colours are spread."""
    colours = {c: [] for c in range(len(demo.TEXTURES))}
    for seed in range(40):
        image, mask = procedural.mosaic(np.random.default_rng(seed), 48, demo.TEXTURES, 4)
        for c in np.unique(mask):
            colours[c].append(image[mask == c].mean(0))
    means = np.stack([np.mean(v, 0) for v in colours.values()])
    spread = np.mean([np.std(v, 0) for v in colours.values()])
    assert means.std(0).mean() < 0.6 * spread


def test_random_images_follow_the_seed():
    one, same = (procedural.random_image(np.random.default_rng(9), 64) for _ in range(2))
    assert one.shape == (64, 64, 3) and one.dtype == np.uint8 and np.array_equal(one, same)

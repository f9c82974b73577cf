"""The quality benchmark on a tiny tree: every method trained, scored and in the table."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SMALL, paint

import hpseg
from benchmarks.quality import coco27, few_labels, fs4, msrc, page
from hpseg.data.datasets import open_folder
from hpseg.methods.hp import lambda_at
from hpseg.run.config import make_config


@pytest.fixture
def tree(tmp_path):
    for part in ("images", "labels"):
        (tmp_path / "data" / part).mkdir(parents=True)
    (tmp_path / "data" / "classes.json").write_text('{"classes": ["left", "right", "none"]}')
    for number in range(8):
        paint(48, 40, number).save(tmp_path / "data" / "images" / f"{number}.png")
        ids = np.zeros((40, 48), np.uint8)
        ids[:, 24:] = 1
        Image.fromarray(ids).save(tmp_path / "data" / "labels" / f"{number}.png")
    return tmp_path / "data"


def test_every_fourth_image_is_held_out(tree, tmp_path):
    msrc.make_split(tree, tmp_path / "split")
    msrc.make_split(tree, tmp_path / "dev", dev=True)

    def names(split, part):
        return sorted(path.stem for path in (tmp_path / split / part / "images").iterdir())

    assert names("split", "test") == ["3", "7"] and names("split", "train") == ["0", "1", "2", "4", "5", "6"]
    assert not {"3", "7"} & {*names("dev", "train"), *names("dev", "test")} and names("dev", "test") == ["4"]


def test_all_methods_are_measured_with_equal_steps(tree, tmp_path, vit_file, monkeypatch):
    monkeypatch.setattr(msrc, "PROBE_STEPS", 2)
    msrc.make_split(tree, tmp_path / "split")
    settings = {name: value for name, value in SMALL.items() if name not in ("lambda_warmup", "quiet")}
    settings |= {"steps": 3, "cache_features": True, "consistency_weight": 0.0}
    chosen = msrc.methods(3)
    result = msrc.measure(tmp_path / "split", str(vit_file), 2, chosen, settings)
    assert set(result["summary"]) == set(msrc.ROWS) and result["images"] == 2
    assert {used["steps"] for used in result["settings"].values()} == {3}
    assert [used["method"] for used in result["settings"].values()].count("stego") == 1
    for scores in result["summary"].values():
        assert len(scores["miou"]["values"]) == 2 and 0 <= scores["miou"]["mean"] <= 100
    lines = msrc.table([result]).splitlines()
    assert len(lines) == 2 + len(msrc.ROWS) and all(line.count("|") == 4 for line in lines)


def test_a_copy_has_the_frozen_features_as_its_codes(run, tmp_path):
    copy, segmenter = (hpseg.load(one, device="cpu") for one in (msrc.frozen(run, tmp_path), run))
    images = torch.rand(1, 3, 32, 48)
    features = segmenter.backbone(images).features
    torch.testing.assert_close(copy.head.codes_of(copy.backbone(images)), features)


def test_coarse_classes_of_coco(tmp_path):
    source = tmp_path / "source"
    for part, name in (("images", "a/000000000001.jpg"), ("images", "b/000000000002.jpg"), ("images", "c/3.jpg")):
        (source / part / name).parent.mkdir(parents=True)
        paint(32, 24, 0).save(source / part / name)
    for name, ids in (("a/000000000001.png", [[0, 1], [7, 200]]), ("b/000000000002.png", [[1, 1], [1, 1]])):
        (source / "labels" / name).parent.mkdir(parents=True)
        Image.fromarray(np.array(ids, np.uint8)).save(source / "labels" / name)
    facts = {"coarse27_names": ["x", "y"], "category_to_coarse27": {"1": 1, "7": 0}}
    (source / "classes.json").write_text(json.dumps(facts))
    assert coco27.prepare(source, tmp_path / "out") == 2
    assert np.asarray(Image.open(tmp_path / "out/labels/000000000001.png")).tolist() == [[255, 1], [0, 255]]
    assert len(open_folder(tmp_path / "out").pairs) == 2 and open_folder(tmp_path / "out").classes == ["x", "y"]
    assert {"000000000030", "000000234748"} <= coco27.trained_on()


def test_switches_leave_parts_out():
    chosen = {name: own for name, own in msrc.methods(60).items() if name != "stego"}
    variants = {name: make_config(steps=60, **own) for name, own in chosen.items()}
    assert {name: (config.local, lambda_at(59, config) > 0) for name, config in variants.items()} == {
        "agnostic": (False, False),
        "specific": (False, True),
        "local": (True, False),
        "hp": (True, True),
    }


def test_methods_stand_beside_the_labels_alone(tree, tmp_path, vit_file):
    msrc.make_split(tree, tmp_path / "split")
    names = ("size", "predict_size", "dim", "workers", "device", "classes", "batch_size")
    settings = {name: SMALL[name] for name in names}
    settings |= {"labeled": "1/3", "steps": 4, "auxiliary_clusters": 5, "bank_rows": 5}
    methods, rows = list(few_labels.METHODS), list(few_labels.ROWS)
    result = few_labels.measure(tmp_path / "split", str(vit_file), 1, methods, rows, settings)
    assert set(result["summary"]) == set(few_labels.ROWS) and result["images"] == 2
    assert {name for name, quality in result["label_quality"].items() if quality} == {"lookbeyond", "across", "supcon"}
    steps = {name: used["steps"] for name, used in result["settings"].items()}
    assert steps.pop("labels_short") == 2 and set(steps.values()) == {4}
    lines = msrc.table([result], few_labels.ROWS).splitlines()
    assert len(lines) == 2 + len(few_labels.ROWS) and all(line.count("|") == 4 for line in lines)


def test_fs4_and_its_parts(tree, tmp_path, vit_file, monkeypatch, capsys):
    """Every part off in turn, from the command line, with the baselines in the same table."""
    options = dict(
        steps=2, batch_size=2, size=32, predict_size=48, dim=8, workers=0, device="cpu", seeds=2, weights=vit_file
    )
    words = [str(word) for name, value in options.items() for word in (f"--{name.replace('_', '-')}", value)]
    monkeypatch.setattr("sys.argv", ["fs4", str(tree), "--out", str(tmp_path / "out"), *words])
    fs4.main()
    result = json.loads((tmp_path / "out" / "quality_fs4.json").read_text())["results"][0]
    assert set(result["summary"]) == set(fs4.ROWS)
    used = result["settings"]
    assert [used[name]["context_attention"] for name in fs4.PARTS] == [True, False, True, True]
    assert [used[name]["pyramid_weight"] for name in fs4.PARTS] == [1, 1, 0, 1]
    assert [used[name]["pixel_weight"] for name in fs4.PARTS] == [1, 1, 1, 0]
    assert "without context" in capsys.readouterr().out
    assert "without context" in (tmp_path / "out/quality_fs4.md").read_text()


def test_the_page_of_results_is_made_of_the_committed_ones():
    assert page.PAGE.read_text() == page.page()
    one, other = {"mean": 20.0, "sd": 1.0}, {"mean": 17.0, "sd": 1.0}
    assert page.difference(one, other) == "+3.0" and page.difference(other, {"mean": 18, "sd": 1}).startswith("-1.0 (")
    one, other = {"mean": 20.0, "sd": 7, "values": [15, 25]}, {"mean": 17.0, "sd": 7, "values": [12, 22]}
    assert page.difference(one, other, paired=True) == "+3.0" and "within" in page.difference(one, other)

"""One class, one colour: in label maps, overlays, sheets, previews, exported programs and the truth."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

import hpseg
from hpseg.cli.main import main
from hpseg.data.datasets import open_data
from hpseg.inference.label_map import NO_CLASS, Key, Matching
from hpseg.inference.palette import palette
from hpseg.inference.pictures import GAP, label_image, overlay
from hpseg.inference.predict_files import predict_files
from hpseg.inference.sheet import show
from hpseg.run.errors import UsageError

CLASSES = ["sky", "grass", "cow"]
OWN = [[70, 130, 180], [20, 200, 20], [150, 20, 150]]


def colours_in(picture):
    return {tuple(colour.tolist()) for colour in np.unique(np.array(picture.convert("RGB")).reshape(-1, 3), axis=0)}


@pytest.fixture(params=["palette", "own"])
def scored(request, run, data, tmp_path):
    """A scored run, its data, and the colour that each class should have in every picture."""
    blocks = shutil.copytree(data, tmp_path / "blocks")
    own = {"palette": OWN} if request.param == "own" else {}
    (blocks / "classes.json").write_text(json.dumps({"classes": CLASSES, **own}))
    run = shutil.copytree(run, tmp_path / "run")
    hpseg.evaluate(run, blocks, device="cpu", baselines=False)
    given = OWN if own else np.array(palette()[:9]).reshape(3, 3).tolist()
    return run, blocks, dict(zip(CLASSES, map(tuple, given), strict=True))


def test_a_class_has_one_colour_in_every_picture(scored, tmp_path, monkeypatch):
    run, blocks, expected = scored
    segmenter, picture = hpseg.load(run, device="cpu"), sorted((blocks / "images").iterdir())[0]
    clusters, classes = segmenter.predict(picture), segmenter.predict(picture, as_classes=True)
    present = {expected[CLASSES[number]] for number in np.unique(classes)}
    for number, (as_classes, labels) in enumerate(((False, clusters), (True, classes))):
        key = segmenter.key(as_classes)
        assert {key.colour(value) for value in np.unique(labels).tolist()} == present
        assert {expected[key.names[value]] for value in np.unique(labels).tolist()} == present
        out = tmp_path / f"labels{number}"
        predict_files(run, [picture], out, as_classes=as_classes, overlay_alpha=1, legend=False, device="cpu")
        assert colours_in(Image.open(out / f"{picture.stem}.png")) == present
        assert (
            np.array(overlay(picture, labels, 1, key.colours)).tolist()
            == np.array(label_image(labels, key.colours).convert("RGB")).tolist()
        )
        sheet = show(run, [picture], tmp_path / f"{number}.png", height=48, as_classes=as_classes, device="cpu")
        line = sheet.crop((sheet.width - 48 - GAP, 2 * GAP + 48, sheet.width - GAP, 2 * GAP + 96))
        assert colours_in(line) == present
    facts = hpseg.export(run, tmp_path / "model.pt2", size=(48, 48))
    assert facts["palette"] == segmenter.key().colours
    truth = show(run, [blocks], tmp_path / "truth.png", n=1, height=48, device="cpu")
    line = truth.crop((truth.width - 48 - GAP, 2 * GAP + 48, truth.width - GAP, 2 * GAP + 96))
    assert colours_in(line) == set(expected.values())


def test_previews_have_the_colours_of_the_run(run):
    sheet = Image.open(sorted((run / "preview").iterdir())[-1])
    line = sheet.crop((sheet.width - GAP - 150, 2 * GAP + 160, sheet.width - GAP, 2 * GAP + 320))
    own = {tuple(palette()[3 * cluster : 3 * cluster + 3]) for cluster in range(3)}
    assert colours_in(line) <= own


def test_clusters_without_a_class_or_with_a_shared_one_have_colours_of_their_own():
    names, grass = {0: "sky", 1: "grass", 2: "cow"}, (20, 200, 20)
    key = Key.make(6, Matching("x", {1: 0, 3: 1, 4: 1}, names, {1: grass}))
    assert key.names == {0: "cluster 0", 1: "sky", 2: "cluster 2", 3: "grass", 4: "grass", 5: "cluster 5"}
    assert key.colour(1) == tuple(palette()[:3]) and key.colour(3) == grass
    others = [key.colour(cluster) for cluster in (0, 2, 4, 5)]
    assert len({*others, grass, tuple(palette()[:3]), tuple(palette()[6:9])}) == 7  # also not that of a class not found
    of_classes = Key.make(6, Matching("x", {1: 0, 3: 1, 4: 1}, names, {1: grass}), as_classes=True)
    assert [of_classes.colour(number) for number in (0, 1)] == [key.colour(1), key.colour(3)]
    assert of_classes.colour(NO_CLASS) == (255, 255, 255)
    assert Key.make(256, None).colours == palette() and len(Key.make(255, Matching("x", {}, names)).colours) == 768


def test_a_legend_names_what_covers_a_hundredth_the_largest_first():
    labels = np.zeros((100, 100), np.uint8)
    labels[:60], labels[99, :50], labels[98] = 2, 1, 4
    key = Key({0: "sky", 1: "speck", 2: "grass", 4: "line"}, palette())
    covering = Key.covering((key, [labels]))
    assert list(covering.names.values()) == ["grass", "sky", "line"]
    assert [covering.colour(number) for number in covering.names] == [key.colour(value) for value in (2, 0, 4)]
    truth = (Key({7: "grass", 8: "cow"}, [*palette()[:21], *key.colour(2), *palette()[24:]]), [labels[:9] + 5])
    assert list(Key.covering((key, [labels]), truth).names.values()) == ["grass", "sky", "line"]
    many = np.arange(200, dtype=np.uint8).repeat(2).reshape(20, 20)
    many[0, :3] = 5
    assert list(Key.covering((Key({5: "five"}, palette()), [many])).names.values()) == ["five"]  # never empty


def test_a_match_on_pictures_leaves_void_and_what_never_meets_alone(data):
    maps, truths = [np.array([[3, 3, 1]], np.uint8)], [np.array([[1, NO_CLASS, NO_CLASS]], np.uint8)]
    found = Matching.fit(open_data(data), maps, truths)
    assert found.class_of == {3: 1} and found.names == {1: "1"} and found.colours == {}


def test_colours_of_classes_json_are_read_and_mistakes_named(data, tmp_path, capsys):
    blocks = shutil.copytree(data, tmp_path / "blocks")
    write = (blocks / "classes.json").write_text
    write(json.dumps({"classes": CLASSES, "palette": OWN}))
    assert open_data(blocks).colours == [tuple(colour) for colour in OWN]
    for bad, message in (
        (OWN[:2], "palette: expected 3 colours, one for each class, got 2 of them"),
        ("red", "palette: expected 3 colours, one for each class, got 'red'"),
        ([[0, 0, 256], *OWN[1:]], r"palette: expected \[red, green, blue\] in 0 to 255 for 'sky', got \[0, 0, 256\]"),
        ([[0, 0], *OWN[1:]], r"for 'sky', got \[0, 0\]"),
        ([*OWN[:2], [0.5, 0, True]], r"for 'cow', got \[0.5, 0, True\]"),
    ):
        write(json.dumps({"classes": CLASSES, "palette": bad}))
        with pytest.raises(UsageError, match=message):
            open_data(blocks)
    write(json.dumps(CLASSES))
    assert open_data(blocks).colours == [] and main(["show", "none", str(blocks), "--split", "x"]) == 2


def test_an_older_file_of_matches_is_read(run, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    clusters = [{"cluster": 0, "id": 2, "class": "cow", "iou": 1.0}, {"cluster": 1, "id": None, "class": None}]
    (run / "labels.json").write_text(json.dumps({"data": "x", "clusters": clusters}))
    key = hpseg.load(run, device="cpu").key()
    assert key.names == {0: "cow", 1: "cluster 1", 2: "cluster 2"} and key.colour(0) == tuple(palette()[6:9])

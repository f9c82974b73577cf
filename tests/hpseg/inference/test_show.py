"""Contact sheets: pictures side by side, their views below, truth where there is one, a legend; PCA as colours."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import paint

import hpseg
from hpseg.cli.main import main
from hpseg.inference.palette import palette
from hpseg.inference.pictures import GAP, contact_sheet, letters
from hpseg.inference.sheet import principal_colours, show
from hpseg.run.errors import UsageError


def test_a_sheet_of_some_of_the_pictures(run, photos, tmp_path):
    out = tmp_path / "deep" / "sheet.png"
    assert main(["show", str(run), str(photos), "--n", "3", "--out", str(out), "--device", "cpu"]) == 0
    sheet = np.array(Image.open(out))
    below = GAP + 4 * (160 + GAP)  # photograph, clusters, overlay, features: three pictures fit side by side
    assert below < sheet.shape[0] < below + 160 and sheet.shape[1] > 3 * 160
    colours = {tuple(colour) for colour in sheet[below:].reshape(-1, 3)}
    assert tuple(palette()[:3]) in colours or tuple(palette()[3:6]) in colours  # the legend names a cluster
    first = np.array(Image.open(photos / "a.jpg").resize((200, 160), Image.Resampling.LANCZOS), float)  # of 50 x 40
    left = sheet.shape[1] - sum(round(160 * w / h) + GAP for w, h in ((50, 40), (70, 54), (80, 61)))
    assert np.abs(sheet[GAP : GAP + 160, left : left + 200] - first).mean() < 1
    assert np.array_equal(sheet, np.array(show(run, [photos], tmp_path / "again.png", n=3, device="cpu")))


def test_nothing_is_replaced_and_mistakes_are_named(run, photos, tmp_path):
    mine = tmp_path / "a.png"
    paint(30, 20, 0).save(mine)
    before = mine.read_bytes()
    for options, text in (
        ({"out": mine}, "a.png is already there; pass --overwrite"),
        ({"out": mine, "overwrite": True}, "a.png is one of the pictures to show"),
        ({"out": tmp_path / "sheet.txt"}, "out: expected a name that ends in .png"),
        ({"out": tmp_path / "s.png", "n": 0}, "n: expected at least 1, got 0"),
        ({"out": tmp_path / "s.png", "height": 10**6}, "height: expected 1 to 2000, got 1000000"),
        ({"out": tmp_path / "s.png", "as_classes": True}, "as_classes: the clusters have no classes yet"),
        ({"out": tmp_path / "s.png", "root": tmp_path}, "root: goes with a data set's name"),
    ):
        with pytest.raises(UsageError, match=text):
            show(run, [mine], **options)
    assert mine.read_bytes() == before
    (tmp_path / "broken.png").write_bytes(b"no")
    with pytest.raises(UsageError, match="none of the 1 pictures chosen can be decoded"):
        show(run, [tmp_path / "broken.png"], tmp_path / "s.png")
    show(run, [tmp_path / "broken.png", mine], tmp_path / "s.png", device="cpu")


def test_a_long_picture_does_not_blow_up_the_sheet(run, tmp_path):
    paint(48 * 30, 48, 0).save(tmp_path / "long.png")
    paint(48, 48 * 30, 0).save(tmp_path / "tall.png")
    sheet = show(run, [tmp_path / "long.png", tmp_path / "tall.png"], tmp_path / "s.png", height=50, device="cpu")
    assert sheet.width < 150 + 2 * (50 + 2 * GAP) + 100 and sheet.height < 4 * (50 + GAP) + 100


def test_as_many_pictures_stand_side_by_side_as_fit():
    def views(*sizes):
        return [[Image.new("RGB", size, "red")] * 2 for size in sizes]

    one, two = (contact_sheet(views(*[(40, 40)] * n), ["a", "b"], 40, width=130) for n in (2, 3))
    assert one.width == two.width <= 130 and one.height == 2 * (40 + GAP) + GAP and two.height > 2 * one.height - GAP
    assert contact_sheet(views((120, 40)), ["a", "b"], 40, width=60).width > 120  # a picture alone is not cut
    large = contact_sheet(views((40, 40)), ["a", "b"], 400).crop((0, 0, 60, 806))
    assert letters(400) > 2 * letters(160) and np.array(large).min() < 50  # titles grow with the pictures


def sheet_of(run, given, tmp_path, **options):
    """The sheet, and its colours in one view of every picture, from the top: photograph, truth, clusters, ..."""
    sheet = np.array(show(run, given, tmp_path / "s.png", height=48, overwrite=True, device="cpu", **options))

    def colours(view):
        lines = sheet[GAP + view * (48 + GAP) :][:48, -(48 + GAP) :]
        return {tuple(colour.tolist()) for colour in np.unique(lines[:, :48].reshape(-1, 3), axis=0)}

    return sheet, colours


def test_truth_stands_beside_prediction_in_the_same_colours(run, data, tmp_path):
    blocks = shutil.copytree(data, tmp_path / "blocks")
    red, green, blue = palette()[:3], palette()[3:6], palette()[6:9]
    sheet, colours = sheet_of(run, [blocks], tmp_path, n=4)
    assert len(sheet) > GAP + 5 * (48 + GAP)
    assert colours(1) == {tuple(red), tuple(green), tuple(blue)}  # the palette's, in the order of class ids
    assert colours(2) & colours(1)  # clusters are matched to classes of the pictures shown
    own = [[250, 10, 10], [10, 250, 10], [10, 10, 250]]
    (blocks / "classes.json").write_text(json.dumps({"classes": ["one", "two", "three"], "palette": own}))
    _, colours = sheet_of(run, [blocks], tmp_path, n=4)
    assert colours(1) == set(map(tuple, own)) and colours(2) & colours(1)
    sheet, _ = sheet_of(run, [blocks], tmp_path, n=4, truth=False)
    without, _ = sheet_of(run, [blocks / "images"], tmp_path, n=4)
    assert np.array_equal(sheet, without)


def test_a_run_scored_elsewhere_has_no_classes_of_this_data(scored_run, data, tmp_path):
    hpseg.evaluate(scored_run, data, device="cpu", baselines=False)
    other = shutil.copytree(data, tmp_path / "other")
    sheet_of(scored_run, [data], tmp_path, n=1, as_classes=True)
    sheet_of(scored_run, [other], tmp_path, n=1)  # matched anew, on the picture
    with pytest.raises(UsageError, match=r"as_classes: the clusters have no classes of .*other; run `hpseg eval RUN"):
        sheet_of(scored_run, [other], tmp_path, n=1, as_classes=True)


def test_principal_colours_follow_the_components():
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(16, 3, generator=generator)).Q
    weights = torch.rand(3, 200, generator=generator) * torch.tensor([[9.0], [3.0], [1.0]])
    features = [(directions @ part).reshape(16, 10, 10) + 5 for part in weights.split(100, 1)]
    found = np.concatenate([colours.reshape(-1, 3) for colours in principal_colours(features)])
    assert [colours.shape for colours in principal_colours(features)] == [(10, 10, 3)] * 2
    for channel in range(3):
        correlation = np.corrcoef(found[:, channel], weights[channel].numpy())[0, 1]
        assert abs(correlation) > 0.95
        assert found[:, channel].min() == 0 and found[:, channel].max() == 255
    assert np.array_equal(found, np.concatenate([c.reshape(-1, 3) for c in principal_colours(features)]))
    assert all((colours == 0).all() for colours in principal_colours([torch.ones(8, 3, 3)]))  # nothing varies


def test_bands_are_about_as_long_as_each_other():
    pictures = [[Image.new("RGB", (40, 40), "red")] for _ in range(7)]
    left = contact_sheet(pictures[:1], ["a"], 40).width - 40 - GAP
    sheet = np.array(contact_sheet(pictures, ["a"], 40, width=left + 6 * (40 + GAP)))
    assert sheet.shape[1] == left + 4 * (40 + GAP)  # four and three, not six and one
    assert len(sheet) == GAP + 2 * (40 + GAP) + 2 * GAP

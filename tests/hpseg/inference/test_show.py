"""Contact sheets: a row per picture, four columns, a legend; principal components as colours."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import paint

from hpseg.cli.main import main
from hpseg.inference.pictures import palette
from hpseg.inference.sheet import principal_colours, show
from hpseg.run.errors import UsageError


def test_a_sheet_of_some_of_the_pictures(run, photos, tmp_path):
    out = tmp_path / "deep" / "sheet.png"
    assert main(["show", str(run), str(photos), "--n", "3", "--out", str(out), "--device", "cpu"]) == 0
    sheet = np.array(Image.open(out))
    assert sheet.shape[0] > 20 + 3 * 164 and sheet.shape[1] > 4 * 160
    colours = {tuple(colour) for colour in sheet[20 + 3 * 164 :].reshape(-1, 3)}
    assert tuple(palette()[:3]) in colours or tuple(palette()[3:6]) in colours  # the legend names a cluster
    first = np.array(Image.open(photos / "a.jpg").resize((200, 160)), float)  # of 50 x 40 pixels
    column = (sheet.shape[1] - 4) // 4
    left = 4 + (column - 4 - 200) // 2
    assert np.abs(sheet[20:180, left : left + 200] - first).mean() < 3
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
    assert sheet.width == 4 * (150 + 4) + 4


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

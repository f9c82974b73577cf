"""Label maps: the image's own size, with a palette, the same from every kind of input."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import paint
from torch.nn import functional as F

import hpseg
from hpseg.config import UsageError
from hpseg.predict import label_map, palette, predict_files


@pytest.mark.parametrize("width, height", [(50, 40), (33, 200), (301, 17), (8, 8)])
def test_labels_have_the_images_size(run, tmp_path, width, height):
    paint(width, height, 1).save(tmp_path / "a.png")
    assert predict_files(run, [tmp_path / "a.png"], tmp_path / "out", device="cpu") == []
    with Image.open(tmp_path / "out" / "a.png") as picture:
        assert picture.mode == "P" and picture.size == (width, height)
        assert np.asarray(picture).max() < 3
        assert picture.getpalette()[:9] == palette()[:9]


def test_folders_overlays_and_unreadable_files(run, photos, tmp_path, capsys):
    source = tmp_path / "in"
    (source / "deep").mkdir(parents=True)
    paint(40, 30, 0).save(source / "x.jpg")
    paint(40, 30, 0).save(source / "x.png")
    paint(40, 30, 0).save(source / "deep" / "x.jpg")
    (source / "broken.png").write_bytes(b"no")
    unreadable = predict_files(run, [source, photos / "a.jpg"], tmp_path / "out", overlay_alpha=0.5, device="cpu")
    assert unreadable == [str(source / "broken.png")] and "broken.png" in capsys.readouterr().err
    written = sorted(
        str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*") if path.is_file()
    )
    assert written == [
        "a.png",
        "a_overlay.jpg",
        "deep/x.png",
        "deep/x_overlay.jpg",
        "x.png",
        "x.png.png",
        "x.png_overlay.jpg",
        "x_overlay.jpg",
    ]
    with pytest.raises(UsageError, match="would both be written"):
        predict_files(run, [source / "x.jpg", source / "deep" / "x.jpg", source / "x.jpg"], tmp_path / "out")
    with pytest.raises(UsageError, match=r"overlay: expected an opacity in \[0, 1\], got 2"):
        predict_files(run, [source], tmp_path / "out", overlay_alpha=2)


def test_every_kind_of_input(run, photos):
    segmenter = hpseg.load(run, device="cpu")
    labels = segmenter.predict(photos / "b.png")
    picture = Image.open(photos / "b.png")
    array = np.array(picture)
    assert labels.dtype == np.uint8 and labels.shape == (picture.height, picture.width)
    for same in (
        str(photos / "b.png"),
        picture,
        array,
        torch.from_numpy(array).permute(2, 0, 1),
        torch.from_numpy(array).permute(2, 0, 1) / 255,
    ):
        assert np.array_equal(segmenter.predict(same), labels)
    for bad in (array.astype(np.float32), torch.zeros(5, 5), np.zeros((2, 2, 2), np.uint8)):
        with pytest.raises(ValueError, match="image: expected"):
            segmenter.predict(bad)
    assert segmenter(torch.rand(2, 3, 16, 24)).shape == (2, 16, 2, 3)


def test_label_map_is_the_argmax_of_bilinear_maps():
    similarity = torch.randn(1, 5, 7, 9, generator=torch.Generator().manual_seed(0))
    for size in ((300, 41), (5, 4), (7, 9), (513, 20)):
        expected = F.interpolate(similarity, size, mode="bilinear", align_corners=False)[0].argmax(0)
        assert (label_map(similarity, size) != expected.numpy()).mean() < 1e-3


def test_overlay_and_palette(photos):
    labels = np.zeros((40, 50), np.uint8)
    assert np.array_equal(
        np.array(hpseg.overlay(photos / "a.jpg", labels, 0.0)), np.array(Image.open(photos / "a.jpg"))
    )
    assert np.array(hpseg.overlay(photos / "a.jpg", labels, 1.0))[0, 0].tolist() == palette()[:3]
    colours = np.array(palette()).reshape(256, 3)
    assert len(np.unique(colours, axis=0)) == 256


def test_load_says_what_is_missing(tmp_path):
    with pytest.raises(UsageError, match="holds no model.safetensors"):
        hpseg.load(tmp_path)

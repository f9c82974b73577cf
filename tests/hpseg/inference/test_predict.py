"""Label maps: the image's own size, with a palette, the same from every kind of input, in memory that is bounded."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import paint
from torch.nn import functional as F

import hpseg
from hpseg.cli.main import main
from hpseg.data.sets import cityscapes
from hpseg.inference.label_map import NO_CLASS, LabelMap, Matching, first_of_largest, label_map
from hpseg.inference.palette import palette
from hpseg.inference.pictures import legend, with_legend
from hpseg.inference.predict_files import predict_files
from hpseg.inference.windows import MAX_TOKENS, Windows
from hpseg.run.errors import UsageError
from hpseg.run.files import RunLock
from hpseg.run.folder import begin_run


@pytest.mark.parametrize("width, height", [(50, 40), (33, 200), (301, 17), (8, 8)])
def test_labels_have_the_images_size(run, tmp_path, width, height):
    paint(width, height, 1).save(tmp_path / "a.png")
    assert predict_files(run, [tmp_path / "a.png"], tmp_path / "out", device="cpu") == []
    with Image.open(tmp_path / "out" / "a.png") as picture:
        assert picture.mode == "P" and picture.size == (width, height)
        assert np.asarray(picture).max() < 3
        assert picture.getpalette()[:9] == palette()[:9]


def test_folders_overlays_and_unreadable_files(run, photos, tmp_path, news):
    source = tmp_path / "in"
    (source / "deep").mkdir(parents=True)
    paint(40, 30, 0).save(source / "x.jpg")
    paint(40, 30, 0).save(source / "x.png")
    paint(40, 30, 0).save(source / "deep" / "x.jpg")
    (source / "broken.png").write_bytes(b"no")
    unreadable = predict_files(run, [source, photos / "a.jpg"], tmp_path / "out", overlay_alpha=0.5, device="cpu")
    assert unreadable == [str(source / "broken.png")]
    assert [line.split(":")[0] for line in news()] == [f"skipped {source / 'broken.png'}"]
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


@pytest.mark.parametrize("clusters", [1, 3, 256])
def test_the_first_of_equal_maps_is_taken(clusters):
    maps = torch.randint(0, 3, (clusters, 40, 30)).float()
    found = first_of_largest(maps)
    assert found.dtype == torch.uint8 and np.array_equal(found.numpy(), np.argmax(maps.numpy(), 0))
    maps[:, 5, 5] = torch.nan
    assert int(first_of_largest(maps)[5, 5]) < clusters  # still a number of a cluster


def test_overlay_and_palette(photos):
    labels = np.zeros((40, 50), np.uint8)
    assert np.array_equal(
        np.array(hpseg.overlay(photos / "a.jpg", labels, 0.0)), np.array(Image.open(photos / "a.jpg"))
    )
    assert np.array(hpseg.overlay(photos / "a.jpg", labels, 1.0))[0, 0].tolist() == palette()[:3]


def test_the_tint_of_an_overlay_is_light_and_its_borders_thin(photos):
    photograph = np.array(Image.open(photos / "a.jpg"), float)
    labels = np.zeros((40, 50), np.uint8)
    labels[:, 20:] = 1
    flat = np.array(palette(), float)[: 2 * 3].reshape(2, 3)[labels]
    shown = {border: np.array(hpseg.overlay(photos / "a.jpg", labels, 0.4, border=border)) for border in (0, None, 3)}
    tinted = 0.6 * photograph + 0.4 * flat
    for border, width in ((0, 0), (None, 1), (3, 3)):
        inside = np.ones(50, bool)
        inside[20 - width : 20 + width] = False
        assert np.abs(shown[border] - tinted)[:, inside].max() <= 1
        assert (np.abs(shown[border] - flat) <= np.abs(tinted - flat) / 2 + 1)[:, ~inside].all()  # by its own colour
    for alpha, same in ((0.0, photograph), (1.0, flat)):
        assert np.array_equal(np.array(hpseg.overlay(photos / "a.jpg", labels, alpha)), same)
    with pytest.raises(UsageError, match="border: expected at least 0 pixels, got -1"):
        hpseg.overlay(photos / "a.jpg", labels, border=-1)


def test_load_says_what_is_missing(tmp_path):
    with pytest.raises(UsageError, match="holds no model.safetensors"):
        hpseg.load(tmp_path)


def test_load_says_what_is_damaged(run, tmp_path):
    whole = (run / "model.safetensors").read_bytes()
    for number, content in enumerate((b"", b"nonsense" * 9, whole[:-9])):
        damaged = shutil.copytree(run, tmp_path / str(number))
        (damaged / "model.safetensors").write_bytes(content)
        with pytest.raises(UsageError, match="run: .*model.safetensors is damaged"):
            hpseg.load(damaged)
        (damaged / "probe.safetensors").write_bytes(content)
        (damaged / "model.safetensors").write_bytes(whole)
        with pytest.raises(UsageError, match="run: .*probe.safetensors is damaged"):
            hpseg.export_hp(damaged, tmp_path / "x.pth")


def test_predict_says_what_cannot_be(run, photos, tmp_path):
    (tmp_path / "a.mat").write_bytes(b"no picture")
    for given, options, message in (
        (photos, {"as_classes": True}, "as_classes: the clusters have no classes yet"),
        (tmp_path / "none.jpg", {}, "images: no file or folder '.*none.jpg'"),
        (tmp_path / "a.mat", {}, "images: none of the 1 pictures can be decoded, e.g. .*a.mat"),
    ):
        with pytest.raises(UsageError, match=message):
            predict_files(run, [given], tmp_path / "out", device="cpu", **options)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("rows, height", [(9, 200), (40, 23), (7, 7), (12, 5), (3, 1000)])
def test_bands_make_the_labels_of_the_whole(rows, height):
    maps = torch.randn(1, 4, rows, 6, generator=torch.Generator().manual_seed(rows))
    labels = LabelMap(rows, (height, 31))
    cuts = [0, 1, 2, *range(5, rows, 3), rows]
    for start, end in itertools.pairwise(sorted(set(cuts))):
        labels.add(maps[:, :, start:end])
    assert np.array_equal(labels.labels, label_map(maps, (height, 31)))


def test_a_window_that_covers_the_picture_changes_nothing(run):
    segmenter, picture = hpseg.load(run, device="cpu"), paint(90, 60, 3)
    whole = segmenter.predict(picture)
    assert np.array_equal(segmenter.predict(picture, window=1000), whole)
    assert np.array_equal(segmenter.predict(picture, window=1000, crf=True), segmenter.predict(picture, crf=True))


def test_windows_average_the_codes_where_they_overlap(run):
    segmenter, pixels = hpseg.load(run, device="cpu"), torch.randint(0, 256, (1, 3, 32, 40), dtype=torch.uint8)
    bands = list(segmenter.bands(pixels, lambda part: {"codes": segmenter(part)}, window=24, stride=16))
    sums, times = torch.zeros(1, 16, 4, 5), torch.zeros(4, 5)
    for top in (0, 1):  # a window of 3 patches every 2, the last one at the picture's end
        for left in (0, 2):
            part = pixels[:, :, 8 * top : 8 * top + 24, 8 * left : 8 * left + 24]
            sums[..., top : top + 3, left : left + 3] += segmenter(part)
            times[top : top + 3, left : left + 3] += 1
    assert [band["codes"].shape[2] for band in bands] == [1, 3]
    torch.testing.assert_close(torch.cat([band["codes"] for band in bands], 2), sums / times)


def test_a_long_picture_is_shown_in_windows_and_kept_in_bands(run, monkeypatch):
    segmenter, shown, held = hpseg.load(run, device="cpu"), [], []
    backbone, add = segmenter.backbone.forward, LabelMap.add
    monkeypatch.setattr(segmenter.backbone, "forward", lambda x: shown.append(x.shape[2] * x.shape[3]) or backbone(x))
    monkeypatch.setattr(LabelMap, "add", lambda self, band: held.append(band.numel()) or add(self, band))
    labels = segmenter.predict(paint(48, 48 * 120, 0))  # 6 x 720 patches
    assert labels.shape == (48 * 120, 48) and 6 * 720 > MAX_TOKENS
    assert max(shown) == 48 * 48 and len(shown) > 200  # squares of the short side
    assert max(held) == 3 * 6 * 6 and sum(held) == 3 * 6 * 720
    assert len(np.unique(labels)) > 1


def test_windows_say_what_is_wrong(run):
    segmenter, picture = hpseg.load(run, device="cpu"), paint(40, 40, 0)
    for options, text in (
        ({"window": 8}, "window: expected at least 16 pixels, got 8"),
        ({"stride": 0}, "stride: expected at least 1 pixels, got 0"),
        ({"window": 16, "stride": 24}, "stride: expected at most the window of 16 pixels, got 24"),
        ({"size": 3}, "size: expected at least 16 pixels, got 3"),
        ({"as_classes": True}, "as_classes: the clusters have no classes yet"),
    ):
        with pytest.raises(UsageError, match=text):
            segmenter.predict(picture, **options)
    assert Windows.plan((40, 71), 8) == Windows((40, 71), 35)  # of usual shape: one window
    assert Windows.plan((40, 200), 8) == Windows((40, 40), 20)
    assert Windows.plan((100, 100), 8) == Windows((64, 64), 32)


def test_arrays_in_and_out(run, tmp_path):
    stack = np.stack([np.array(paint(40, 30, seed)) for seed in range(3)])
    np.save(tmp_path / "one.npy", stack[0])
    np.save(tmp_path / "stack.npy", stack)
    given = [tmp_path / "one.npy", tmp_path / "stack.npy"]
    assert predict_files(run, given, tmp_path / "out", format="npy", device="cpu") == []
    names = ["one.npy", "stack_0.npy", "stack_1.npy", "stack_2.npy"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == names
    segmenter = hpseg.load(run, device="cpu")
    for number, picture in enumerate(stack):
        labels = np.load(tmp_path / "out" / f"stack_{number}.npy")
        assert labels.dtype == np.uint8 and np.array_equal(labels, segmenter.predict(picture))
    for bad in (stack[0].astype(np.float32), stack[..., :2], np.zeros((0, 4, 4, 3), np.uint8)):
        np.save(tmp_path / "bad.npy", bad)
        with pytest.raises(UsageError, match=r"bad.npy: expected uint8 \(H, W, 3\) or \(N, H, W, 3\), got"):
            predict_files(run, [tmp_path / "bad.npy"], tmp_path / "bad")
    (tmp_path / "bad.npy").write_bytes(b"no array")
    with pytest.raises(UsageError, match="not a readable .npy array"):
        predict_files(run, [tmp_path / "bad.npy"], tmp_path / "bad")


def test_nothing_is_replaced_unasked(run, tmp_path):
    source, out = tmp_path / "a.png", tmp_path / "out"
    paint(40, 30, 0).save(source)
    before = source.read_bytes()
    with pytest.raises(UsageError, match="would replace a picture"):
        predict_files(run, [source], tmp_path, overwrite=True)
    assert source.read_bytes() == before
    out.mkdir()
    (out / "a_overlay.jpg").write_bytes(b"mine")
    with pytest.raises(UsageError, match=r"a_overlay.jpg is already there \(1 of 2 files are\); pass --overwrite"):
        predict_files(run, [source], out, overlay_alpha=0.5)
    assert [path.name for path in out.iterdir()] == ["a_overlay.jpg"]  # nothing was begun
    predict_files(run, [source], out, overlay_alpha=0.5, overwrite=True, device="cpu")
    assert Image.open(out / "a_overlay.jpg").height > 30  # with a legend
    with pytest.raises(UsageError, match="is a file, expected a folder"):
        predict_files(run, [source], source)


def test_clusters_get_the_names_and_colours_of_their_classes(run, tmp_path):
    run = shutil.copytree(run, tmp_path / "run")
    results = {"data": "cityscapes", "protocol": "default", "images": 1, "clusters": 3}
    results |= {"classes": ["road", "sky", "car"], "class_ids": [0, 16, 19]}
    results["colours"] = [cityscapes.COLOURS[number] for number in results["class_ids"]]
    results["trained"] = {"cluster_of": [2, 0, -1], "iou": [50.0, float("nan"), 0.0]}
    Matching.save(run, results)
    entries = json.loads((run / "labels.json").read_text())["clusters"]
    assert entries[0] == {"cluster": 0, "id": 16, "class": "sky", "iou": None}
    assert entries[1] == {"cluster": 1, "id": None, "class": None, "iou": None}
    segmenter, picture = hpseg.load(run, device="cpu"), paint(60, 50, 2)
    clusters, classes = segmenter.predict(picture), segmenter.predict(picture, as_classes=True)
    assert np.array_equal(classes, np.array([16, NO_CLASS, 0], np.uint8)[clusters])
    key = segmenter.key()
    assert key.names == {0: "sky", 1: "cluster 1", 2: "road"}
    assert key.colours[:9] == [70, 130, 180, *key.colour(1), 128, 64, 128]  # Cityscapes' own, where it has one
    of_classes = segmenter.key(as_classes=True)
    assert of_classes.colours[48:51] == [70, 130, 180] and of_classes.names[16] == "sky"
    picture.save(tmp_path / "a.png")
    predict_files(run, [tmp_path / "a.png"], tmp_path / "out", as_classes=True, overlay_alpha=0.5, device="cpu")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out" / "a.png")), classes)
    assert main(["predict", str(run), str(tmp_path / "a.png"), "--out", str(tmp_path / "b"), "--overlay", "1"]) == 0
    own = {tuple(segmenter.key().colours[3 * cluster : 3 * cluster + 3]) for cluster in np.unique(clusters)}
    shown = np.array(Image.open(tmp_path / "b" / "a.png").convert("RGB")).reshape(-1, 3)
    assert {tuple(colour.tolist()) for colour in np.unique(shown, axis=0)} == own
    again = shutil.copytree(run, tmp_path / "again")
    with RunLock(again) as lock:
        begin_run(again, segmenter.config, overwrite=True, lock=lock)
    assert not (tmp_path / "again" / "labels.json").exists()  # a new model has other clusters
    (run / "labels.json").write_text('{"clusters": [{"id": 1}]}')
    with pytest.raises(UsageError, match="labels.json is not what `hpseg eval` writes"):
        hpseg.load(run, device="cpu")


def test_a_legend_shows_every_name_and_colour():
    names = {value: f"a class called {value}" for value in range(12)}
    strip = legend(names, 300, 16)
    colours = {colour for _, colour in strip.getcolors(1 << 20)}
    assert {tuple(palette()[3 * value : 3 * value + 3]) for value in names} <= colours
    assert strip.width == 300 and strip.height > 5 * 16  # several lines
    assert legend({0: "x" * 80}, 40, 16).width > 40 * 10  # wider than asked for, not cut
    picture = with_legend(Image.new("RGB", (30, 20), "red"), names)
    assert picture.height > 20 and picture.getpixel((29, 19)) == (255, 0, 0)

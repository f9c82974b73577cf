"""Decoding and views."""

import signal

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import paint

from hpseg.data.folder import PhotoFolder, epoch_batches, find_images, load_batches
from hpseg.data.transforms import UnreadableImage, five_crop, jitter, load_image, square, to_tensor
from hpseg.run.errors import UsageError


def test_exif_rotation_is_honoured(tmp_path):
    picture = Image.new("RGB", (30, 20), "white")
    picture.paste("red", (0, 0, 10, 20))
    exif = picture.getexif()
    exif[0x0112] = 6  # turn right to view
    picture.save(tmp_path / "a.png", exif=exif)
    upright = load_image(tmp_path / "a.png")
    assert upright.size == (20, 30)
    assert upright.getpixel((10, 2)) == (255, 0, 0) and upright.getpixel((10, 25)) == (255, 255, 255)


@pytest.mark.parametrize("ending", ["png", "tiff"])
def test_16_bit_gray_is_scaled_not_clipped(tmp_path, ending):
    values = np.array([[0, 257 * 64], [257 * 128, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{ending}")
    assert np.array(load_image(tmp_path / f"a.{ending}"))[..., 0].tolist() == [[0, 64], [128, 255]]


def test_other_modes_become_rgb(tmp_path):
    Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32)).save(tmp_path / "float.tiff")
    assert np.array(load_image(tmp_path / "float.tiff"))[0, :, 1].tolist() == [0, 128, 255]
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    red = np.array(load_image(tmp_path / "cmyk.jpg"))[0, 0]
    assert red[0] > 200 and red[1] < 60 and red[2] < 60
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([9, 9, 9, 10, 200, 30])
    palette.save(tmp_path / "palette.png")
    assert load_image(tmp_path / "palette.png").getpixel((0, 0)) == (10, 200, 30)
    Image.new("L", (4, 4), 77).save(tmp_path / "gray.png")
    assert load_image(tmp_path / "gray.png").getpixel((0, 0)) == (77, 77, 77)
    Image.new("1", (4, 4), 1).save(tmp_path / "bits.png")
    assert load_image(tmp_path / "bits.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_unreadable_pictures_are_named(tmp_path):
    paint(200, 100, 0).save(tmp_path / "a.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2]):
        (tmp_path / "b.jpg").write_bytes(content)
        with pytest.raises(UnreadableImage, match="b.jpg"):
            load_image(tmp_path / "b.jpg")


def test_find_images(photos, tmp_path):
    assert [path.name for path in find_images(photos)] == ["a.jpg", "b.png", "c.JPG", "e.bmp", "d.webp"]
    with pytest.raises(UsageError, match="no folder"):
        find_images(tmp_path / "none")
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / ".hidden").mkdir()
    paint(9, 9, 0).save(tmp_path / ".hidden" / "a.png")
    with pytest.raises(UsageError, match="no pictures in .*notes.txt"):
        find_images(tmp_path)


def test_batches_cover_each_epoch_once_and_start_anywhere():
    batches = list(epoch_batches(10, 3, 0, 0, 9))
    for epoch in range(3):
        keys = [key for batch in batches[3 * epoch : 3 * epoch + 3] for key in batch]
        assert {e for e, _ in keys} == {epoch} and len({i for _, i in keys}) == 9
    assert batches[:3] != [[(0, i) for _, i in batch] for batch in batches[3:6]]
    assert list(epoch_batches(10, 3, 0, 5, 9)) == batches[5:]


def test_views_depend_on_their_key_only(photos):
    dataset = PhotoFolder(find_images(photos), 32, "random", 3, True)
    one, two = dataset[4, 1], PhotoFolder(find_images(photos), 32, "random", 3, True)[4, 1]
    assert torch.equal(one[0], two[0]) and torch.equal(one[1], two[1])
    assert one[0].shape == (3, 32, 32) and one[0].dtype == torch.uint8
    assert not torch.equal(one[0], one[1])
    assert any(not torch.equal(dataset[epoch, 1][0], one[0]) for epoch in range(4))
    inline, workers = (list(load_batches(dataset, [[(0, 0), (0, 3)], [(1, 2), (1, 4)]], n)) for n in (0, 2))
    for a, b in zip(inline, workers, strict=True):
        assert torch.equal(a.images, b.images) and torch.equal(a.jittered, b.jittered)


def test_five_crops():
    picture = paint(60, 41, 0)
    crops = [five_crop(picture, which) for which in range(5)]
    assert {crop.size for crop in crops} == {(30, 20)}
    assert crops[3].getpixel((29, 19)) == picture.getpixel((59, 40)) and crops[4].getpixel((0, 0)) == picture.getpixel(
        (15, 10)
    )


@pytest.mark.parametrize("width, height", [(300, 20), (20, 300), (7, 7), (1, 50)])
def test_square_of_any_shape(width, height):
    assert square(paint(width, height, 0), 32).size == (32, 32)
    assert square(paint(width, height, 0), 32, torch.Generator().manual_seed(0)).size == (32, 32)


def test_jitter_keeps_geometry_and_the_callers_random_state():
    image = to_tensor(paint(40, 40, 1))
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    views = [jitter(image, seed) for seed in range(6)]
    assert torch.equal(torch.rand(1), expected)
    assert all(view.shape == image.shape and view.dtype == torch.uint8 for view in views)
    assert torch.equal(views[2], jitter(image, 2))


def test_a_loader_process_that_dies_while_it_sends_is_told_by_its_signal(monkeypatch):
    """The broken connection is seen before the signal of the death: what the signal's handler raises must come out
    here, as later it would come out of any line of the program."""

    class Broken:
        def __init__(self, *args, **options): ...

        def __iter__(self):
            return self

        def __next__(self):
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            raise ConnectionResetError

    def handler(number, frame):
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Killed.")

    monkeypatch.setattr("hpseg.data.folder.DataLoader", Broken)
    before = signal.signal(signal.SIGALRM, handler)
    try:
        with pytest.raises(RuntimeError, match=r"DataLoader worker \(pid 1\) is killed"):
            next(load_batches(None, [], 0))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("width, height", [(60, 40), (40, 61), (101, 33), (33, 47), (20, 20), (640, 427)])
def test_nearest_is_the_published_resize_and_crop(width, height):
    from torchvision.transforms import v2

    published = v2.Compose([v2.Resize(32, v2.InterpolationMode.NEAREST), v2.CenterCrop(32)])
    image = paint(width, height, 0)
    assert np.array_equal(square(image, 32, resize="nearest"), published(image))
    assert not np.array_equal(square(image, 32), published(image))


def test_jitter_of_the_normalised_picture_clamps_it_as_published():
    image = to_tensor(paint(24, 24, 0))
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    dark = []
    for seed in range(4):
        twin = (jitter(image, seed, (mean, std)) - mean) / std
        assert twin.dtype == torch.float32 and twin.min() >= -1e-5 and twin.max() <= 1 + 1e-5
        dark.append((twin.abs() < 1e-6).float().mean().item())
    assert max(dark) > 0.1  # what was darker than the mean, unless blurred or grey
    plain = (jitter(image, 0).float() / 255 - mean) / std
    assert plain.min() < -0.5


def test_published_transforms_reach_training(photos, vit_file, tmp_path):
    from hpseg.features.tokens import Encoder
    from hpseg.methods.base import Method
    from hpseg.models.backbone import load_backbone
    from hpseg.run.config import make_config

    backbone = load_backbone(weights=vit_file)

    def first(**settings):
        common = dict(classes=3, images=str(photos), workers=0, cache_features=False, crop="center", size=32)
        config = make_config(**common, **settings)
        dataset = Method.open_photographs(config, backbone)
        Encoder(backbone, dataset, config, torch.device("cpu"), tmp_path)
        return dataset[0, 0][:2]

    view, twin = first(consistency_weight=0.1)
    nearest, _ = first(consistency_weight=0.1, resize="nearest")
    same, clamped = first(consistency_weight=0.1, jitter="normalized")
    assert not torch.equal(view, nearest) and torch.equal(view, same)
    assert twin.dtype == torch.uint8 and clamped.min() >= 0.5 - 1e-5 and clamped.max() <= 0.75 + 1e-5  # plus std
    assert {make_config(name).resize for name in ("cocostuff", "cityscapes", "potsdam", "stego-potsdam")} == {"nearest"}
    assert {make_config(name).resize for name in ("small", "stego-small")} == {"bilinear"}

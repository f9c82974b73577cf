"""Tiny trees in the published on-disk formats: what is found, what labels mean, what a wrong root says."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.io import savemat
from tiny import SMALL
from trees import HEIGHT, MAKERS, WIDTH, make_potsdam

import hpseg
from hpseg.data.datasets import NAMES, open_data, open_named
from hpseg.data.sets import cocostuff
from hpseg.run.errors import UsageError

# Of the first validation picture: the classes of its left and right half.
HALVES = {"cocostuff": (9, 24), "cityscapes": (0, -1), "cityscapes19": (0, -1), "potsdam": (0, -1), "voc": (1, -1)}


@pytest.fixture(params=sorted(MAKERS))
def tree(request, tmp_path):
    MAKERS[request.param](tmp_path / "data")
    return request.param, tmp_path / "data"


def test_every_name_is_tested():
    assert set(MAKERS) == set(NAMES)


def test_splits_and_classes(tree):
    name, root = tree
    train, val = (open_data(name, root, split) for split in ("train", "val"))
    assert len(train.pairs) == 2 and len(val.pairs) == 1 and not set(train.images) & set(val.images)
    picture = val.load_image(val.pairs[0][0])
    truth = val.labels(val.pairs[0][1], picture.size)
    assert picture.mode == "RGB" and picture.size == (WIDTH, HEIGHT) and truth.dtype == np.int64
    assert (truth[:, 0] == HALVES[name][0]).all() and (truth[:, -1] == HALVES[name][1]).all()
    assert truth.max() < len(val.classes)


def test_training_never_looks_for_labels(tree, vit_file, tmp_path):
    name, root = tree
    for path in root.rglob("*"):
        of_labels = path.parent.name in ("gt", "SegmentationClass") or {"annotations", "gtFine"} & {*path.parts}
        if of_labels and path.is_file():
            path.unlink()
    results = hpseg.train(name, tmp_path / "run", root=root, weights=vit_file, steps=2, **SMALL)
    assert results["photographs"] == 2
    with pytest.raises(UsageError, match="which does not exist"):
        open_data(name, root, "val")


def test_a_run_is_scored_on_the_data_set(tree, vit_file, tmp_path):
    name, root = tree
    hpseg.train(name, tmp_path / "run", root=root, weights=vit_file, steps=2, **SMALL)
    results = hpseg.evaluate(tmp_path / "run", name, root=root, device="cpu")
    assert results["images"] == 1 and 0 <= results["trained"]["miou"] <= 100


def test_a_wrong_root_says_what_was_looked_for_and_what_was_found(tree, tmp_path):
    name, _ = tree
    (tmp_path / "wrong" / "pictures").mkdir(parents=True)
    with pytest.raises(UsageError, match=rf"{name} expects .*does not exist; .*wrong holds: pictures"):
        open_named(name, tmp_path / "wrong", "train")
    with pytest.raises(UsageError, match="root: expected the folder"):
        open_named(name, None, "train")
    with pytest.raises(UsageError, match="split: expected one of train, val"):
        open_named(name, tmp_path, "test")


def test_damaged_tiles_of_potsdam_are_named(vit_file, tmp_path):
    make_potsdam(tmp_path / "data")
    tile = tmp_path / "data" / "imgs" / "2_10_0_0.mat"
    whole = tile.read_bytes()
    others = ({"img": np.zeros((4, 5, 4))}, {"img": np.zeros((4, 5, 2), np.uint8)}, {"img": np.zeros((4, 5), np.uint8)})
    for number, bad in enumerate((b"", b"x" * 300, whole[:150], whole[:128] + b"\xff" * 99, *others, {"other": 1})):
        savemat(tile, bad) if isinstance(bad, dict) else tile.write_bytes(bad)
        run = tmp_path / str(number)
        results = hpseg.train("potsdam", run, root=tmp_path / "data", weights=vit_file, steps=1, **SMALL)
        assert results["unreadable"] == [str(tile)]
    (tmp_path / "data" / "gt" / "7_9_3_3.mat").write_bytes(whole[:150])
    with pytest.raises(UsageError, match="labels: expected a label map, cannot read .*7_9_3_3.mat: not a MATLAB"):
        hpseg.evaluate(run, "potsdam", root=tmp_path / "data", device="cpu")


def test_a_list_that_is_no_text(tmp_path):
    lists = {"cocostuff": "curated/train2017/Coco164kFull_Stuff_Coarse.txt", "potsdam": "labelled_train.txt"}
    for name, path in lists.items():
        MAKERS[name](tmp_path / name)
        (tmp_path / name / path).write_bytes(b"\xff\xfe\x00")
        with pytest.raises(UsageError, match=f"root: .*{path} is not a text file of names"):
            open_named(name, tmp_path / name, "train")


def test_root_goes_with_a_name(tmp_path):
    with pytest.raises(UsageError, match="root: goes with a data set's name"):
        open_data(tmp_path, tmp_path)


def test_coarse_classes_of_cocostuff():
    """Groups of fine ids, by hand: 11 super-categories of things in COCO's order of ids, then stuff."""
    table = cocostuff.FINE_TO_COARSE
    assert len(table) == 182 and set(table) == set(range(27)) and len(cocostuff.CLASSES) == 27
    things = {0: 9, 1: 11, 14: 8, 16: 7, 22: 7, 32: 6, 42: 10, 43: 5, 51: 2, 66: 3, 71: 0, 77: 1, 83: 4}
    # person, bicycle, bench, cat, bear, suitcase, tennis racket, bottle, banana, dining table, tv, microwave, book
    assert {fine: table[fine] for fine in things} == things
    assert all(table[fine] >= cocostuff.FIRST_STUFF for fine in range(91, 182))
    assert all(table[fine] < cocostuff.FIRST_STUFF for fine in range(91))

"""Many ranks do what one does, and know of one another's errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from processes import DRIVER, TORCHRUN, finish, needs_gloo, spawn
from runs import TOLERANCE, assert_runs_agree
from tiny import SMALL, paint

import hpseg
from hpseg.run.errors import UsageError
from hpseg.runtime.distributed import ALONE, Ranks, Share

CASES = {
    "hp": dict(batch=4, accumulate=2),
    "two_losses": dict(batch=4, weighting="separate", consistency_weight=0.0, crop="five", pool_images=5),
    "uneven": dict(batch=5, clusters="kmeans"),
    "cached": dict(batch=4, cache_features=True, consistency_weight=0.0, local_scale=14.0),
    "stego": dict(batch=4, preset="stego-small", consistency_weight=0.0, neighbors=3),
    "fs4": dict(batch=4, preset="fs4-small", cache_features=False, consistency_weight=1.0, dropout=0.1, pixel_epochs=2),
    "fs4_uneven": dict(batch=5, preset="fs4-small", cache_features=False, pixel_update="running", clusters="probe"),
    "stego_uneven": dict(batch=5, preset="stego-small", consistency_weight=0.0, neighbors=3),
}


# Two ranks that wait for one another no longer than five seconds fill a cache, one photograph a shard, then fail at it.
FILL = """
import datetime, logging, sys, time, torch
import torch.distributed as dist
from pathlib import Path
from hpseg.features import cache as feature_cache
from hpseg.models.backbone import load_backbone
from hpseg.run.config import make_config
from hpseg.data.folder import PhotoFolder, find_images
from hpseg.runtime.distributed import Ranks
from hpseg.features.tokens import Encoder

photos, weights, folder = sys.argv[1:]
torch.set_num_threads(1)
feature_cache.SHARD_BYTES = 1
dist.init_process_group("gloo")
backbone, made = load_backbone(weights=weights), 0
config = make_config(classes=3, crop="random", cache_features=True, workers=0)
dataset, folder, device = PhotoFolder(find_images(photos), 32, "random", 0, False), Path(folder), torch.device("cpu")
encoder = Encoder(backbone, dataset, config, device, folder)
def slow(*args, forward=backbone.forward, **options):
    global made
    made += 1
    time.sleep(1.7)
    return forward(*args, **options)
backbone.forward = slow
dist.barrier()
ranks = Ranks(dist.new_group(timeout=datetime.timedelta(seconds=5)))
lines = []
class Kept(logging.Handler):
    emit = lines.append
logging.getLogger("hpseg").addHandler(Kept())
logging.getLogger("hpseg").setLevel(logging.INFO)
encoder.fill(ranks)
found = [line for line in lines if line.name == "hpseg.features.cache"]  # the others tell how far it is
assert encoder.cache.missing() == [] and len(found) == (1 if ranks.writes else 0), lines
assert ranks.writes or not lines, lines
counts = ranks.collect(made)
assert counts == [3, 2], counts
if ranks.rank == 1:
    feature_cache.write_atomically = lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device"))
encoder = Encoder(backbone, dataset, config, device, folder / "again")
try:
    encoder.fill(ranks)
except Exception as error:
    (folder / f"error{ranks.rank}").write_text(f"{type(error).__name__} {error}")
dist.barrier()
ranks.group = encoder = None  # a group that outlives its destruction may abort the process at its end
dist.destroy_process_group()
"""


@needs_gloo
def test_two_ranks_equal_one_process_with_twice_the_batch(photos, vit_file, tmp_path):
    more = shutil.copytree(photos, tmp_path / "photos")
    for i in range(4):
        paint(64, 48, 10 + i).save(more / f"{i}.png")
    cases, common = {}, {**SMALL, "weights": str(vit_file), "steps": 8, "crop": "random", "renew_interval": 3}
    for name, case in CASES.items():
        settings = {**common, **case}
        batch = settings.pop("batch")
        # Batches of five pictures come from a folder that holds no more: rank 0 gets two of them, rank 1 three.
        folder = photos if batch % 2 else more
        hpseg.train(folder, tmp_path / "one" / name, **{**settings, "batch_size": batch})
        cases[name] = (str(folder), {**settings, "batch_size": (batch + 1) // 2})
    (tmp_path / "driver.py").write_text(DRIVER)
    (tmp_path / "cases.json").write_text(json.dumps(cases))
    status, said = finish(spawn([*TORCHRUN, tmp_path / "driver.py", tmp_path / "cases.json", tmp_path / "two"]))
    assert status == 0, said
    for name, case in CASES.items():
        kmeans = case.get("clusters") == "kmeans"
        assert_runs_agree(tmp_path / "one" / name, tmp_path / "two" / name, TOLERANCE, kmeans)
        assert json.loads((tmp_path / "two" / name / "results.json").read_text())["ranks"] == 2


@needs_gloo
def test_ranks_fill_a_cache_together_and_hear_of_each_other_after_every_shard(photos, vit_file, tmp_path):
    """Longer in all than a rank waits for another; and where it fails on one, the others know why."""
    (tmp_path / "fill.py").write_text(FILL)
    status, said = finish(spawn([*TORCHRUN, tmp_path / "fill.py", photos, vit_file, tmp_path]))
    assert status == 0, said
    told = "rank 1: cache_dir: cannot write to"
    assert (tmp_path / "error0").read_text().startswith(f"ReportedElsewhere {told}")
    assert (tmp_path / "error1").read_text().startswith(f"UsageError {told}")


@needs_gloo
def test_an_error_on_one_rank_ends_all_with_its_message(photos, vit_file, tmp_path):
    (tmp_path / "driver.py").write_text(
        "import os, sys\n"
        "if os.environ['RANK'] == '1':\n"
        "    sys.argv[2] = 'nowhere'\n"
        "from hpseg.cli.main import main\n"
        "raise SystemExit(main(sys.argv[1:]))\n"
    )
    command = [*TORCHRUN, tmp_path / "driver.py", "train", photos, "--out", tmp_path / "run", "--classes", "3"]
    status, said = finish(spawn([*command, "--weights", vit_file, "--device", "cpu"]))
    assert status != 0 and not (tmp_path / "run").exists()
    (line,) = (line for line in said.splitlines() if line.startswith("hpseg train: error:"))
    assert line.startswith(f"hpseg train: error: rank 1: images: no folder {str(Path.cwd() / 'nowhere')!r}; expected")


def test_ranks_must_hold_the_same_pictures_and_weights(photos, vit_file, tmp_path, monkeypatch):
    monkeypatch.setattr(Ranks, "collect", lambda ranks, value: [value, (4, "abc") if type(value) is tuple else value])
    with pytest.raises(UsageError, match=r"expected the same on every rank, got .* \[\(5, '.*'\), \(4, 'abc'\)\]"):
        hpseg.train(photos, tmp_path / "run", weights=vit_file, steps=2, **SMALL)
    assert not (tmp_path / "run").exists()


def test_shares_are_slices_of_what_one_process_draws():
    class Rank(type(ALONE)):
        def __init__(self, rank, size):
            self.group, self.rank, self.size = None, rank, size

    whole = Share(ALONE, 5, torch.Generator().manual_seed(3)).rand(1, 4)
    parts = [Share(Rank(rank, 3), 5, torch.Generator().manual_seed(3)).rand(1, 4) for rank in range(3)]
    assert torch.equal(torch.cat(parts), whole) and sorted(len(part) for part in parts) == [1, 2, 2]
    assert [len(range(2)[Rank(rank, 3).rows(2)]) for rank in range(3)] == [0, 1, 1]

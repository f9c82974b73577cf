"""DGCL on two ranks: what equals one process, what is each rank's own, and that bank and teacher never part."""

from __future__ import annotations

import csv
import json

import pytest
import torch
from processes import TORCHRUN, finish, needs_gloo, spawn
from runs import TOLERANCE, state_of
from tiny import DGCL

import hpseg
from hpseg.run.errors import UsageError
from hpseg.runtime.distributed import Ranks

# On each rank within a process group of its own: argv holds a file of cases and the folder of the runs, which gets what
# each rank found. In the last step the gradients of the two terms that are a mean over ranks are compared with those of
# each rank on its own.
DRIVER = """
import dataclasses, hashlib, json, sys, torch, hpseg
from hpseg.runtime.distributed import ALONE, Ranks, Share
from hpseg.methods.dgcl.method import Dgcl

torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
losses, found = Dgcl.losses, {}

def mean_over_ranks(x):
    torch.distributed.all_reduce(x)
    return x / 2

def compared(self, batch, jittered, step, seed, share):
    terms = losses(self, batch, jittered, step, seed, share)
    found["method"] = self
    if step == self.config.steps - 1 and self.config.supervised_share < 1:
        held, self.config = len(self.pending), dataclasses.replace(self.config, contrast_grad_scale=1.0)
        alone = losses(self, batch, jittered, step, seed, Share(ALONE, share.total // 2, share.generator))
        del self.pending[held:]
        parameters = [*self.student.parameters(), *self.projection.parameters()]
        for name in ("unsupervised", "contrast"):
            gradients = [
                torch.autograd.grad(x[name], parameters, retain_graph=True, materialize_grads=True, allow_unused=True)
                for x in (terms, alone)
            ]
            ours, theirs = (mean_over_ranks(torch.cat([g.flatten() for g in gradient])) for gradient in gradients)
            found[name] = {
                "gradient": float((2 * ours).norm()),
                "ratio": float((2 * ours) @ theirs / (theirs @ theirs)),
                "apart": float((2 * ours - theirs * ((2 * ours) @ theirs / (theirs @ theirs))).norm()),
                "value": float(terms[name]),
                "mean": float(mean_over_ranks(alone[name].detach().clone())),
            }
    return terms

ranks = Ranks(torch.distributed.group.WORLD)
for counts in ((2, 5), (0, 3), (0, 0)):  # however many rows each has, also none
    rows = ranks.concat(torch.full((counts[ranks.rank], 4), float(ranks.rank)))
    assert rows.shape == (sum(counts), 4) and rows[:, 0].tolist() == [0.0] * counts[0] + [1.0] * counts[1], rows

Dgcl.losses = compared
for name, (photos, settings) in json.load(open(sys.argv[1])).items():
    found.clear()
    hpseg.train(photos, f"{sys.argv[2]}/{name}", **settings)
    method = found.pop("method")
    tensors = {**method.state_dict(), **method.bank.state()}
    found["hash"] = hashlib.sha256(b"".join(x.numpy().tobytes() for x in tensors.values())).hexdigest()
    found["inserted"] = method.bank.inserted.tolist()
    json.dump(found, open(f"{sys.argv[2]}/{name}/rank{ranks.rank}.json", "w"))
torch.distributed.barrier()
ranks.group = method = found = None  # a group that outlives its destruction may abort the process at its end
torch.distributed.destroy_process_group()
"""


@needs_gloo
def test_two_ranks(data, vit_file, tmp_path):
    common = {**DGCL, "weights": str(vit_file), "save_every": 8}
    supervised = {**common, "steps": 8, "supervised_share": 1.0, "ohem_pixels": 1, "ohem_probability": 1.0}
    contrast = {"steps": 12, "dropout": 0.0, "contrast_grad_scale": 0.5, "bank_rows": 30, "bank_inserts": 15}
    cases = {
        "labels": supervised,
        "labels_finetune": {**supervised, "finetune": True, "backbone_lr": 0.05},
        "all": {**common, **contrast},
        "all_finetune": {**common, **contrast, "finetune": True, "backbone_lr": 0.02, "contrast_grad_scale": 1.0},
    }
    (tmp_path / "driver.py").write_text(DRIVER)
    halves = {name: (str(data), {**settings, "batch_size": 2}) for name, settings in cases.items()}
    (tmp_path / "cases.json").write_text(json.dumps(halves))
    process = spawn([*TORCHRUN, tmp_path / "driver.py", tmp_path / "cases.json", tmp_path / "two"])
    for name in ("labels", "labels_finetune"):
        hpseg.train(data, tmp_path / "one" / name, **{**cases[name], "batch_size": 4})
    status, said = finish(process)
    assert status == 0, said

    for name in cases:
        first, second = (json.loads((tmp_path / "two" / name / f"rank{rank}.json").read_text()) for rank in range(2))
        assert first["hash"] == second["hash"], name  # teacher, student and bank, bit for bit
        if name.startswith("all"):
            assert min(first["inserted"]) >= 30 and max(first["inserted"]) <= 15 * 11
            for term, scale in (("unsupervised", 1.0), ("contrast", cases[name]["contrast_grad_scale"])):
                for of_rank in (first[term], second[term]):
                    assert of_rank["value"] == pytest.approx(of_rank["mean"], rel=1e-5) and of_rank["value"] > 0
                    assert of_rank["ratio"] == pytest.approx(scale, rel=1e-5)
                    assert 0 <= of_rank["apart"] <= 1e-5 * of_rank["gradient"]
    for name in ("labels", "labels_finetune"):
        one, two = (state_of(tmp_path / folder / name)["method"] for folder in ("one", "two"))
        for key in one:
            assert (one[key] - two[key]).abs().max() <= TOLERANCE * one[key].abs().max(), (name, key)
        rows, others = (
            list(csv.DictReader((tmp_path / folder / name / "log.csv").read_text().splitlines()))
            for folder in ("one", "two")
        )
        for row, other in zip(rows, others, strict=True):
            assert float(row["supervised"]) == pytest.approx(float(other["supervised"]), rel=2e-5) != 0


def test_uneven_batches_are_an_error(data, vit_file, tmp_path, monkeypatch):
    class Three(Ranks):
        def __init__(self):
            super().__init__()
            self.size = 3

    monkeypatch.setattr("hpseg.runtime.distributed.ALONE", Three())
    monkeypatch.setattr(Ranks, "collect", lambda ranks, value: [value])
    with pytest.raises(UsageError, match="batch_size: method dgcl expects as many pictures on every rank, got 8 for 3"):
        hpseg.train(data, tmp_path / "run", weights=vit_file, steps=2, **{**DGCL, "labeled": "1/3"})


def test_rows_of_one_process_are_its_own():
    x = torch.ones(3, 2, requires_grad=True)
    assert torch.equal(Ranks().concat(x), x) and not Ranks().concat(x).requires_grad

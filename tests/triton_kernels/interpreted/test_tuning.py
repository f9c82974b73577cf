"""The tuning tables' lookup, and the tuner with a clock of the test's."""

from __future__ import annotations

import datetime
import json

import pytest
import torch

from hpkernels import dispatch, tune, tuning

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _fresh_tables():
    tuning.forget()
    yield
    tuning.forget()


def _entry(d, log2_n, mark):
    return dict(op="contrastive_stats", dtype="half", d=d, log2_n=log2_n, measured=True, config={"mark": mark})


def _marks(file, monkeypatch, *keys):
    monkeypatch.setenv("HPKERNELS_TUNING", str(file))
    return [tuning.lookup("contrastive_stats", torch.bfloat16, d, n, CPU).get("mark") for d, n in keys]


def test_nearest_key(tmp_path, monkeypatch):
    file = tmp_path / "table.json"
    tune.write(file, [_entry(64, 10, "a"), _entry(64, 15, "b"), _entry(512, None, "c")], "test")
    keys = (64, 1024), (48, 1), (64, 1 << 13), (16, 50176), (65, 1024), (512, 1 << 20), (513, 1024)
    assert _marks(file, monkeypatch, *keys) == ["a", "a", "b", "b", "c", "c", None]  # the last from the shipped table


def test_a_result_is_the_callers_own():
    tuning.lookup("contrastive_stats", torch.float32, 64, 64, CPU)["BLOCK_M"] = 1
    assert tuning.lookup("contrastive_stats", torch.float32, 64, 64, CPU)["BLOCK_M"] != 1


def test_every_op_is_served_for_every_gpu(monkeypatch):
    for family in ("default", tuning.AMD_FAMILY, *tuning.FAMILIES.values()):
        monkeypatch.setattr(tuning, "family", lambda device, family=family: family)
        for op in (*tune.OPS, "topk_similarity"):
            for dtype in (torch.float16, torch.float32):
                for d in (1, 64, 100, 512, 4096):
                    assert tuning.lookup(op, dtype, d, 1000, CPU)


def test_shipped_tables_claim_no_measurement():
    for file in tuning.FOLDER.glob("*.json"):
        assert not any(entry["measured"] for entry in tuning.entries(file))


@pytest.mark.parametrize("text", ["", "[]", '{"rows": 1}'])
def test_a_file_that_is_no_table_is_named(text, tmp_path, monkeypatch):
    file = tmp_path / "table.json"
    file.write_text(text)
    with pytest.raises(ValueError, match="HPKERNELS_TUNING: .*table.json"):
        _marks(file, monkeypatch, (64, 64))


def test_the_fastest_that_is_right_wins(units):
    """Faster ones that spill, fail, are wrong or do not repeat are passed over."""
    clock = {"spills": 1, "fails": 2, "wrong": 3, "changes": 4, "good": 5, "slow": 6}
    now = {}

    def call():
        now["name"] = tuning.lookup("contrastive_stats", torch.bfloat16, 64, 64, CPU)["name"]
        if now["name"] == "fails":
            raise RuntimeError("out of resources")
        return (torch.rand(2) if now["name"] == "changes" else torch.ones(2),)

    config, milliseconds = tune.best(
        [{"name": name} for name in clock], "contrastive_stats", call, lambda call: clock[now["name"]],
        lambda: tuning.lookup("contrastive_stats", torch.bfloat16, 64, 64, CPU)["name"] != "wrong",
        lambda: 8 if now.get("name") == "spills" else 0,
    )  # fmt: skip
    assert (config, milliseconds) == ({"name": "good"}, 5)


def test_the_table_that_tuning_writes_is_used(tmp_path, monkeypatch):
    file = tmp_path / "mine.json"
    monkeypatch.setenv("HPKERNELS_TUNING", "")  # put back after the test
    monkeypatch.setattr(tune, "CHECK_ROWS", 40)
    monkeypatch.setattr(tune, "REPEATS", 2)
    small = [dict(BLOCK_M=m, BLOCK_N=32, BLOCK_K=16, num_warps=4, num_stages=1) for m in (32, 64)]
    monkeypatch.setattr(tune, "candidates", lambda op, kind, d: small)
    times = iter([2.0, 1.0])
    found = tune.tune(["contrastive_stats"], ["single"], [32], [64], CPU, lambda call: next(times), lambda: 0, file)
    assert [entry["config"] for entry in found] == [small[1]]
    assert tuning.lookup("contrastive_stats", torch.float32, 32, 64, CPU) == small[1]
    assert json.loads(file.read_text())["entries"] == found


def test_the_faster_backend_is_written(tmp_path, monkeypatch):
    """Here of two that can run on a CPU."""
    file = tmp_path / "mine.json"
    monkeypatch.setenv("HPKERNELS_TUNING", "")
    monkeypatch.setattr(tune, "CHECK_ROWS", 40)
    monkeypatch.setattr(tune, "REPEATS", 2)
    monkeypatch.setattr(tune, "candidates", lambda op, kind, d: [{"backend": "reference"}, {"backend": "triton"}])
    times = iter([1.0, 2.0])
    op = "backend/contrastive_stats/sparse"
    (found,) = tune.tune([op], ["single"], [32], [64], CPU, lambda call: next(times) + 0 * len(call()), lambda: 9, file)
    assert found["config"] == {"backend": "reference"} and found["measured"] == datetime.date.today().isoformat()
    assert tuning.find(op, torch.float32, 32, 64, CPU) == found


def test_backends_that_are_not_built_are_no_candidates(monkeypatch):
    monkeypatch.setitem(dispatch.MISSING, "cuda", "it was not built")
    assert tune.candidates("backend/contrastive_grad/dense", "half", 512) == [{"backend": "triton"}]


@pytest.mark.parametrize("op", tune.OPS)
def test_candidates_serve_the_width(op):
    for kind in tune.DTYPES:
        for d in (64, 384, 768):
            for config in tune.candidates(op, kind, d):
                assert not config.get("RESIDENT") or config["BLOCK_D"] >= d


def test_without_a_gpu_nothing_is_tuned(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--out", str(tmp_path / "table.json")]) == 1
    assert "no CUDA device" in capsys.readouterr().err and not list(tmp_path.iterdir())

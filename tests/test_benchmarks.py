"""The benchmarks measure what they say: the published twin is right, the inputs are as dense as stated, the tables hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # benchmarks/ is not installed

from benchmarks import checks, published, report, runner
from benchmarks.__main__ import main
from benchmarks.cases import CASES, search_flop
from benchmarks.features import density, make_batch
from benchmarks.plan import PART_CASES, Shape, build_plan

GOLDEN = Path(__file__).parent / "golden"


def _golden(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        meta = json.loads(str(file["meta"]))
        return {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}, meta


@pytest.mark.parametrize("name", ["reweight", "plain", "lambda0", "dropped", "dropped_plain"])
def test_twin_equals_golden(name: str) -> None:
    arrays, meta = _golden(f"hp_loss_v1_{name}")
    double = {key: x.double() if x.dtype == torch.float32 else x for key, x in arrays.items()}
    z, z_local = (double[key].requires_grad_() for key in ("z", "z_local"))
    loss = published.hidden_positive_loss(
        z,
        double["backbone_features"],
        double["backbone_pool"],
        z_local=z_local,
        head_features=double["head_features"],
        head_pool=double["head_pool"],
        head_weight=meta["head_weight"],
        tokens_per_image=meta["group_size"],
        temperature=meta["temperature"],
        base_temperature=meta["base_temperature"],
        negative_mask=double["negative_mask"],
        reweight=meta["reweight"],
    )
    loss.backward()
    assert float(loss.detach()) == pytest.approx(float(double["loss"]), rel=1e-6)
    for x, key in ((z, "grad_z"), (z_local, "grad_z_local")):
        unit = x.detach()
        expected = double[key] - (double[key] * unit).sum(1, keepdim=True) * unit
        assert float((x.grad - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("name", ["local_mix_a", "local_mix_b"])
def test_local_mix_twin_equals_golden(name: str) -> None:
    arrays, meta = _golden(name)
    grid = tuple(meta["grid"])
    prefix = meta["prefix_tokens"]
    code = arrays["code"].flatten(2).transpose(1, 2).clone().requires_grad_()
    mixed = published.local_mix(
        code,
        arrays["attention"][:, :, prefix:, prefix:],
        grid,
        sigma=meta["sigma"],
        low_quantile=meta["low_quantile"],
        high_quantile=meta["high_quantile"],
    )
    mixed.backward(arrays["grad_out"].flatten(2).transpose(1, 2))
    for ours, key in ((mixed.detach(), "local_code"), (code.grad, "grad_code")):
        torch.testing.assert_close(ours.transpose(1, 2).reshape(arrays[key].shape), arrays[key], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", checks.GATES)
def test_gate(case: str) -> None:
    checks.GATES[case]("cpu")


def test_gate_is_red_on_a_wrong_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    right = published.local_mix
    monkeypatch.setattr(published, "local_mix", lambda *arguments: 1.001 * right(*arguments))
    with pytest.raises(checks.GateFailed, match="mixed code: relative difference"):
        checks.check_local_mix("cpu")


def test_positives_are_as_dense_as_real_ones() -> None:
    found = density(make_batch(8))
    assert 0.002 <= found["P"] <= 0.01
    assert 0.002 <= found["Q"] <= 0.01


def test_inputs_repeat_and_are_unit_rows() -> None:
    first, second = (make_batch(2, (5, 6), channels=24, code=16, pool=40) for _ in range(2))
    for name in ("features", "pool", "head_features", "head_pool", "z", "z_local"):
        rows = getattr(first, name)
        assert torch.equal(rows, getattr(second, name))
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(rows.shape[0]))


def test_search_flop_is_triangles_and_pools() -> None:
    assert search_flop(Shape(images=8)) == pytest.approx(58e9, rel=0.01)


def test_plan_names_registered_contenders() -> None:
    for race in build_plan(images=8, quick=False, cases=None):
        assert set(race.contenders) <= set(CASES[race.case].contenders)
        assert race.case in PART_CASES


def test_percentiles() -> None:
    assert runner.percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert runner.percentile([0.0, 10.0], 20) == pytest.approx(2.0)


def test_a_dead_contender_is_a_record_not_a_crash() -> None:
    setting = runner.Setting("cpu", "no_such_dtype", 1, 60.0)
    race = build_plan(images=1, quick=True, cases=["topk"])[0]
    records = runner.run_race(race, setting, lambda line: None)
    assert all("no_such_dtype" in record["error"] for record in records)


def test_command_writes_results_and_tables(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--quick", "--images", "1", "--case", "topk", "--case", "product", "--threads", "1", "--out", str(tmp_path)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "cpu.json").read_text())
    assert {record["contender"] for record in results["records"]} == {"hpkernels", "torch.topk", "torch.mm"}
    assert all(record["p20"] <= record["p50"] <= record["p80"] for record in results["records"])
    assert results["versions"]["torch"] == torch.__version__
    assert report.render(results) in printed

    readme = tmp_path / "README.md"
    readme.write_text(f"head\n{report.BEGIN}\nold\n{report.END}\ntail\n")
    report.rewrite_readme(readme, tmp_path)
    text = readme.read_text()
    assert text.startswith("head\n") and text.endswith("\ntail\n") and "old" not in text
    assert "topk_similarity" in text


def test_list(capsys: pytest.CaptureFixture) -> None:
    assert main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(case in printed for case in [*PART_CASES, "scaling", "stages"])

"""The benchmarks measure what they say: twins and peers are right, inputs as dense as stated, tables and marks hold."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # benchmarks/ is not installed

from benchmarks import checks, marks, peers, plain, plan, plots, published, report, results, runner, stages
from benchmarks.__main__ import RESULTS, main
from benchmarks.cases import KINDS, search_flop, step_flop
from benchmarks.features import density, make_batch, make_labels, one_positive_pool
from benchmarks.plan import BACKENDS, CASES, PEERS, STAGES, Race, Shape, build_plan, ceilings, names

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


# ------------------------------------------------------------------ gates and peers

PLAIN = [(kind, peer) for kind in checks.GATES for peer in KINDS[kind].contenders if not peer.endswith("-compiled")]


@pytest.mark.parametrize("rate", [0.02, 1.0])
def test_gate_of_a_step_at_both_rates(rate: float) -> None:
    for peer in ("hpkernels", "published", "chunked"):
        assert checks.gate("step", peer, "cpu", torch.float32, rate) == {"state": "ok"}


@pytest.mark.parametrize(("kind", "peer"), PLAIN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_gate(kind: str, peer: str, dtype: torch.dtype) -> None:
    """Green, or skipped for a reason that holds here."""
    if peer == "keops":
        pytest.skip("KeOps compiles for minutes; python -m benchmarks runs its gate")
    verdict = checks.gate(kind, peer, "cpu", dtype)
    if verdict["state"] == "skipped":
        assert peer in BACKENDS or peer in peers.PACKAGES or peer == "torch-linear-cross-entropy"
        assert len(verdict["reason"]) > 10
    else:
        assert verdict == {"state": "ok"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "peer"), [(k, p) for k in checks.GATES for p in KINDS[k].contenders if p.endswith("-compiled")]
)
def test_gate_of_what_torch_compiles(kind: str, peer: str) -> None:
    assert checks.gate(kind, peer, "cpu", torch.float32) == {"state": "ok"}


WRONG = {
    "step": lambda inputs: 1.001 * KINDS["step"].contenders["published"](inputs),
    "search": lambda inputs: [~mask for mask in KINDS["search"].contenders["chunked"](inputs)],
    "topk": lambda qk: (torch.topk(qk[0] @ qk[1].T, 16).values, torch.zeros(len(qk[0]), 16, dtype=torch.int64)),
    "local_mix": lambda inputs: 1.001 * KINDS["local_mix"].contenders["torch"](inputs),
    "supcon": lambda inputs: 1.001 * KINDS["supcon"].contenders["chunked"](inputs),
    "infonce": lambda inputs: 1.001 * KINDS["infonce"].contenders["torch"](inputs),
    "density": lambda inputs: 1.001 * KINDS["density"].contenders["chunked"](inputs),
    "kmeans": lambda inputs: plain.kmeans(inputs.x, inputs.start, 1),
}


@pytest.mark.parametrize("kind", WRONG)
def test_gate_is_red_on_a_wrong_answer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = KINDS[kind].contenders | {"hpkernels": WRONG[kind]}
    monkeypatch.setitem(KINDS, kind, replace(KINDS[kind], contenders=wrong))
    verdict = checks.gate(kind, "hpkernels", "cpu", torch.float32)
    assert verdict["state"] == "red" and (
        "relative difference" in verdict["reason"] or "decisions differ" in verdict["reason"]
    )


def test_a_missing_peer_is_skipped_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    reason = peers.why_not("pytorch-metric-learning", "cpu", torch.float32)
    assert "pytorch-metric-learning is not installed" in reason
    assert "GPU" in peers.why_not("cut-cross-entropy", "cpu", torch.bfloat16)
    assert "GPU" in peers.why_not("hpkernels-triton", "cpu", torch.float32)
    assert peers.why_not("chunked", "cpu", torch.float32) is None


# ------------------------------------------------------------------ inputs


@pytest.mark.parametrize("wanted", [0.001, 0.003, 0.01])
def test_positives_are_as_dense_as_asked_and_coherent(wanted: float) -> None:
    found = density(make_batch(8, density=wanted), panels=24)
    assert wanted / 1.25 <= found["P"] <= wanted * 1.25
    assert wanted / 1.25 <= found["Q"] <= wanted * 1.25
    strewn = 1 - (1 - found["P"]) ** 256  # share of 16 x 16 tiles that as many pairs at random would touch
    assert found["P_tiles_16"] < 0.4 * strewn


def test_sampled_density_is_that_of_all_rows() -> None:
    batch = make_batch(8, (16, 16), channels=64, code=32, pool=200, density=0.01)
    assert density(batch, panels=8)["P"] == pytest.approx(density(batch)["P"], rel=0.3)


def test_one_positive_pool_leaves_a_patch_its_nearest() -> None:
    batch = make_batch(3, (8, 8), channels=64, code=16, pool=100, density=0.02)
    batch.pool = one_positive_pool(batch.features)
    pairs = density(batch)["P"] * 192
    assert 0.9 <= pairs <= 2.5


def test_labels_are_shared_between_images() -> None:
    labels = make_labels(16, (8, 8)).reshape(16, 64)
    assert set(labels[0].tolist()) & set(labels[1:].flatten().tolist())
    assert all(len(set(image.tolist())) <= 6 for image in labels)


def test_inputs_repeat_and_are_unit_rows() -> None:
    first, second = (make_batch(2, (5, 6), channels=24, code=16, pool=40) for _ in range(2))
    for name in ("features", "pool", "head_features", "head_pool", "z", "z_local"):
        rows = getattr(first, name)
        assert torch.equal(rows, getattr(second, name))
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(rows.shape[0]))


# ------------------------------------------------------------------ registry and plan


def test_registry_is_consistent() -> None:
    for name, case in CASES.items():
        assert set(case.peers) <= set(KINDS[case.kind].contenders), name
        assert set(case.peers) <= set(PEERS) and case.kind in checks.GATES
        assert case.peers[0] == "hpkernels" and case.cuda and case.quick
    assert {peer for kind in KINDS.values() for peer in kind.contenders} <= set(PEERS)
    assert set(STAGES.values()) <= set(CASES)


def test_paper_size_on_a_gpu() -> None:
    shape = CASES["step_rho_0.02"].cuda[0]
    assert (shape.images, shape.tokens, shape.channels, shape.code, shape.pool, shape.density) == (
        64,
        784,
        384,
        512,
        2048,
        0.002,
    )
    assert max(s.rows for s in CASES["scaling_n"].cuda) > 200_000


def test_plan_has_a_ceiling_for_every_inner_dimension() -> None:
    for device in ("cpu", "cuda"):
        races = build_plan(device=device)
        widths = {race.shape.channels for race in ceilings(races, quick=False) if race.case == "product"}
        for race in races:
            flop = KINDS[race.kind].flop if race.kind in KINDS else KINDS["step"].flop
            assert set(flop(race.shape) if flop else ()) <= widths
        assert [race.case for race in races][:2] == ["step_rho_0.02", "stages_rho_0.02"]  # the marks come first


def test_a_cpu_plan_has_no_gpu_backends_and_keeps_to_its_sizes() -> None:
    races = build_plan(device="cpu")
    assert not any(peer in BACKENDS for race in races for peer in race.peers)
    assert max(race.shape.rows for race in races if "published" in race.peers) <= 12544
    assert any("published" in race.left_out for race in races) and not any(
        set(race.peers) & set(race.left_out) for race in races
    )
    asked = build_plan(device="cpu", cases=["scaling_n"], peers=["published"])
    assert max(race.shape.rows for race in asked if "published" in race.peers) > 12544
    asked = build_plan(device="cpu", cases=["topk"], peers=["hpkernels-cuda", "faiss"])
    assert [race.peers for race in asked] == [("hpkernels-cuda", "faiss")]


def test_flop() -> None:
    assert sum(search_flop(Shape(images=8)).values()) == pytest.approx(58e9, rel=0.01)
    dense = replace(Shape(images=64), rate=1.0)
    assert step_flop(dense)[512] == pytest.approx(10.3e12 + 1.4e12, rel=0.02)
    flop, _ = stages.work("gradient", dense, 0.0, 0.0, 2)
    assert flop == {512: pytest.approx(10.3e12, rel=0.01)}  # logits again and one product, both streams


def test_percentiles() -> None:
    assert runner.percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert runner.percentile([0.0, 10.0], 20) == pytest.approx(2.0)


# ------------------------------------------------------------------ runs and results


class _Verdicts:
    """Gates that say what a test wants."""

    def __init__(self, **states: dict) -> None:
        self.states = states

    def verdict(self, race: Race, peer: str) -> dict:
        return self.states.get(peer.replace(".", "_"), {"state": "ok"})

    def density(self, shape: Shape) -> dict:
        return {}


SETTING = runner.Setting("cpu", "float32", 1, 60.0)
TINY = Race("topk", "topk", ("hpkernels", "torch.topk"), Shape(1, (6, 6), channels=16), 2, memory=False)


def test_no_figures_where_our_gate_is_red() -> None:
    verdicts = _Verdicts(hpkernels={"state": "red", "reason": "values: off"})
    rows = runner.run(TINY, SETTING, verdicts, results.Ceilings(), lambda line: None)
    assert [row["status"] for row in rows] == [results.RED, results.RED]
    assert not any("p50_ms" in row for row in rows) and "values: off" in rows[1]["reason"]


def test_what_is_left_out_is_said() -> None:
    race = replace(TINY, peers=("hpkernels",), left_out=("keops",))
    rows = runner.run(race, SETTING, _Verdicts(), results.Ceilings(), lambda line: None)
    assert [(row["peer"], row["status"]) for row in rows] == [("hpkernels", "ok"), ("keops", "skipped")]
    assert "left out" in rows[1]["reason"]


def test_no_figures_for_a_peer_whose_gate_is_red() -> None:
    verdicts = _Verdicts(torch_topk={"state": "red", "reason": "values: off"})
    rows = runner.run(TINY, SETTING, verdicts, results.Ceilings(), lambda line: None)
    assert [row["status"] for row in rows] == [results.OK, results.RED]
    assert "p50_ms" in rows[0] and "p50_ms" not in rows[1]


def test_a_dead_contender_is_a_row_not_a_crash() -> None:
    rows = runner.run(TINY, replace(SETTING, dtype="no_such_dtype"), _Verdicts(), results.Ceilings(), lambda line: None)
    assert all(row["status"] == results.FAILED and "no_such_dtype" in row["reason"] for row in rows)


def test_a_gate_that_dies_is_no_green_gate() -> None:
    gates = runner.Gates(replace(SETTING, dtype="no_such_dtype"))
    try:
        verdict = gates.verdict(TINY, "hpkernels")
    finally:
        gates.close()
    assert verdict["state"] == "failed" and "no_such_dtype" in verdict["reason"]


def test_share_of_the_ceiling() -> None:
    found = results.Ceilings()
    found.note({"case": "product", "status": "ok", "C": 64, "tflops": 2.0})
    found.note({"case": "copy", "status": "ok", "gbs": 100.0})
    row = {"case": "search", "p50_ms": 2.0}
    results.add_rates(row, {"64": 2e9}, None, found)
    assert (row["ceiling"], row["percent_of_ceiling"]) == ("product", pytest.approx(50))
    assert row["tflops"] == pytest.approx(1.0)
    moved = {"case": "local_mix", "p50_ms": 2.0}
    results.add_rates(moved, None, 1e8, found)
    assert (moved["ceiling"], moved["percent_of_ceiling"]) == ("copy", pytest.approx(50))
    unknown = {"case": "search", "p50_ms": 2.0}
    results.add_rates(unknown, {"128": 2e9}, None, found)
    assert "percent_of_ceiling" not in unknown


def test_command_writes_tidy_results_tables_and_readme(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    arguments = ["--quick", "--images", "1", "--case", "topk", "--peers", "hpkernels,torch.topk,hpkernels-cuda,inf-cl"]
    assert main([*arguments, "--threads", "1", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    run = results.load(tmp_path / "cpu.json")
    by_peer = {row["peer"]: row for row in run["rows"] if row["case"] == "topk"}
    assert set(by_peer) == {"hpkernels", "torch.topk", "hpkernels-cuda"}
    assert by_peer["hpkernels-cuda"]["status"] == "skipped" and by_peer["hpkernels-cuda"]["reason"]
    assert {row["case"] for row in run["rows"]} == {"topk", "product", "copy"}
    for row in run["rows"]:
        if row["status"] == "ok":
            assert 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] and row["repetitions"] == 2
            assert row["torch"] == torch.__version__ and row["commit"] and row["date"]
    assert by_peer["hpkernels"]["percent_of_ceiling"] > 0
    with (tmp_path / "cpu.csv").open() as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == results.COLUMNS and len(table) == len(run["rows"])
    assert [row["peer"] for row in table] == [row["peer"] for row in run["rows"]]
    assert report.render(run) in printed

    readme = tmp_path / "README.md"
    readme.write_text(f"head\n{report.BEGIN}\nold\n{report.END}\ntail\n")
    report.rewrite_readme(readme, tmp_path)
    text = readme.read_text()
    assert text.startswith("head\n") and text.endswith("\ntail\n") and "old" not in text
    assert "topk_similarity" in text and "torch.topk" in text
    assert "skipped" in (tmp_path / "cpu.md").read_text()


def test_a_run_of_some_cases_takes_the_place_of_theirs(tmp_path: Path) -> None:
    """Rows keep their own commit and date, and the tables say whose is whose; nothing to merge into is said."""

    def row(case: str, p50: float, commit: str, **fields) -> dict:
        kind = CASES[case].kind if case in CASES else case
        row = {"case": case, "kind": kind, "peer": "hpkernels", "status": "ok", "p50_ms": p50, "commit": commit}
        return row | {"p20_ms": p50, "p80_ms": p50, "date": "2026-01-02" if commit == "new" else "2026-01-01"} | fields

    def run(commit: str, *rows: dict) -> dict:
        setting = {"device": "cpu", "dtype": "float32", "threads": 1, "quick": False}
        versions = {"cpu": "a CPU", "torch": "2"}
        return {"date": rows[0]["date"], "commit": commit, "command": "x", "setting": setting, "versions": versions} | {
            "rows": list(rows)
        }

    old = run("old", row("product", 5.0, "old", N=9, C=4), row("topk", 2.0, "old"), row("kmeans", 3.0, "old"))
    new = run(
        "new", row("product", 6.0, "new", N=9, C=4), row("product", 7.0, "new", N=9, C=8), row("kmeans", 1.0, "new")
    )
    both = results.merge(old, new)
    assert [(r["case"], r["p50_ms"], r["commit"]) for r in both["rows"]] == [
        ("product", 5.0, "old"), ("topk", 2.0, "old"), ("product", 7.0, "new"), ("kmeans", 1.0, "new"),
    ]  # fmt: skip
    assert both["commit"] == "old" and results.merge(both, new) == both
    text = report.render(both)
    assert "Of commit new, 2026-01-02, are: k-means" in text and "commit old, 2026-01-01" in text
    with pytest.raises(SystemExit, match="found none"):
        main(["--case", "kmeans", "--merge", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        main(["--case", "kmeans", "--merge", "--quick"])


def test_results_of_an_older_format_leave_the_readme_alone(tmp_path: Path) -> None:
    (tmp_path / "cpu.json").write_text(json.dumps({"records": []}))
    readme = tmp_path / "README.md"
    readme.write_text(f"{report.BEGIN}\nold\n{report.END}\n")
    report.rewrite_readme(readme, tmp_path)
    assert "old" in readme.read_text()


def test_no_time_left_is_said(tmp_path: Path) -> None:
    main(["--quick", "--case", "search", "--budget", "1e-9", "--threads", "1", "--out", str(tmp_path)])
    rows = results.load(tmp_path / "cpu.json")["rows"]
    assert rows and all(row["status"] == "skipped" and "no time left" in row["reason"] for row in rows)


def test_list(capsys: pytest.CaptureFixture) -> None:
    assert main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in [*names(), *PEERS])


def test_unknown_peer_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        main(["--peers", "nobody"])
    assert "expected some of hpkernels" in capsys.readouterr().err


# ------------------------------------------------------------------ stages, marks, plots


def test_stages_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    few = {"contrastive_stats": 2.0, "contrastive_grad": 3.0, "pairs_above": 1.0, stages.WHOLE: 7.0}
    real = {
        "contrastive_stats": 2.5,
        "contrastive_grad": 5.0,
        "pairs_above": 1.0,
        "count_bits": 0.5,
        stages.WHOLE: 10.0,
    }
    answers = iter((few, real))
    monkeypatch.setattr(stages, "_by_op", lambda run, device, repetitions: next(answers))
    asked = []
    found = stages.measure(lambda: 0.0, "cpu", asked.append, 1)
    assert asked == [True, False]
    assert (found["statistics"], found["gradient"], found["positives"]) == (2.0, 3.0, 3.0)
    assert found[stages.REST] == pytest.approx(1.0) and found[stages.WHOLE] == 10.0


def test_stages_of_a_real_step() -> None:
    race = Race("stages_rho_0.02", "stages", ("hpkernels",), Shape(2, (8, 8), channels=32, code=32, pool=64), 1)
    rows = runner.run(race, SETTING, _Verdicts(), results.Ceilings(), lambda line: None)
    by_stage = {row["stage"]: row["p50_ms"] for row in rows}
    assert set(stages.STAGES) <= set(by_stage) and all(
        by_stage[stage] > 0 for stage in ("pools", "search", "statistics", "gradient")
    )
    parts = sum(value for stage, value in by_stage.items() if stage != stages.WHOLE)
    assert parts == pytest.approx(by_stage[stages.WHOLE], rel=0.02)


def _gpu_run() -> dict:
    """Made-up figures in the form of a run on a GPU, some met, some not, one missing."""
    common = {"status": "ok", "N": 50176, "T": 784, "C": 384, "D": 512, "pool": 2048, "density": 0.002}

    def row(case: str, peer: str, p50: float, **more) -> dict:
        kind = CASES[case].kind if case in CASES else "stages"
        figures = {"p20_ms": p50, "p50_ms": p50, "p80_ms": p50}
        return (
            common
            | {"case": case, "kind": kind, "peer": peer, "rho": 1.0 if case.endswith("_1") else 0.02}
            | figures
            | more
        )

    rows = [
        row("step_rho_0.02", "hpkernels", 16.0, peak_bytes=2**30 + 1), row("step_rho_0.02", "published", 320.0),
        row("step_rho_0.02", "hpkernels-cuda", 19.0, peak_bytes=2**29),
        row("stages_rho_1", "hpkernels", 5.0, stage="statistics", percent_of_ceiling=56.0),
        row("topk", "hpkernels", 10.0), row("topk", "torch.mm", 6.0), row("topk", "torch.topk", 39.0),
        row("scaling_n", "hpkernels", 64.0, N=100352), row("step_rho_1", "hpkernels", 40.0, N=25088),
    ]  # fmt: skip
    versions = {"gpu": "a GPU", "cpu": "a CPU", "torch": "2", "cuda": "13", "triton": "3"}
    head = {"date": "d", "commit": "c", "command": "x", "versions": versions}
    return head | {"setting": {"device": "cuda", "dtype": "bfloat16", "quick": False, "threads": 1}, "rows": rows}


def test_marks() -> None:
    found = {(row[0], row[2]): row[3:] for row in marks.table(_gpu_run())}
    assert found["step, rho 0.02", "hpkernels"] == ["16.0 ms", "yes"]
    assert found["step, rho 0.02", "hpkernels-cuda"] == ["19.0 ms", "no"]
    assert found["the same against published", "hpkernels"] == ["20.0x", "yes"]
    assert found["peak extra memory, rho 0.02", "hpkernels"] == ["1.00 GiB", "no"]
    assert found["dense statistics", "hpkernels"] == ["56 %", "yes"]
    assert found["top-16 against q @ k.T alone", "hpkernels"] == ["1.67x", "yes"]
    assert found["top-16 against torch.topk", "hpkernels"] == ["3.9x", "no"]
    assert found["step, rho 1", "hpkernels"] == ["not measured yet", ""]  # measured at another N
    assert found["local_mix", "hpkernels"] == ["not measured yet", ""]
    assert not any(peer == "hpkernels-triton" for _, peer in found)
    assert "| dense gradient | 50 % or more of torch.mm's rate | hpkernels | not measured yet |  |" in marks.render(
        _gpu_run()
    )


def test_a_run_of_the_marks_has_what_they_need_and_no_more() -> None:
    contest = marks.contest()
    assert next(iter(contest)) == "step_rho_0.02" and set(contest) == {mark.case for mark in marks.MARKS}
    races = [race for case, peers in contest.items() for race in build_plan(device="cuda", cases=[case], peers=peers)]
    assert {race.shape.rows for race in races} == {marks.ROWS}
    assert [race.case for race in races if "published" in race.peers] == ["step_rho_0.02"]
    assert all(set(BACKENDS) <= set(race.peers) for race in races)
    widths = {race.shape.channels for race in ceilings(races, quick=False) if race.case == "product"}
    assert widths == {384, 512}  # each ceiling costs time


def test_plots_take_only_what_differs_in_n(tmp_path: Path) -> None:
    run = _gpu_run()
    assert plots.series(run, "p50_ms") == {"hpkernels": [(50176, 16.0), (100352, 64.0)]}
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (extra bench)")
    (tmp_path / "cuda.json").write_text(json.dumps(run | {"format": results.FORMAT}))
    (file,) = plots.draw(tmp_path)
    assert file.name == "cuda_time.svg" and "hpkernels" in file.read_text()
    assert plots.draw(tmp_path) and "cuda, time" in report.summary(run, tmp_path, tmp_path / "README.md")


@pytest.mark.parametrize("device", report.DEVICES)
def test_plots_and_tables_of_committed_results(device: str, tmp_path: Path) -> None:
    """They can be made again from what is committed; nothing is committed that is not a full run's."""
    run = results.load(RESULTS / f"{device}.json")
    if run is None:
        pytest.skip(f"no {device} results of the present format are committed")
    assert plots.series(run, "p50_ms").keys() >= {"hpkernels", "published", "chunked"}
    assert not run["setting"]["quick"] and {row["case"] for row in run["rows"]} >= {
        name for name, case in CASES.items() if case.shapes(device, quick=False)
    }
    assert (RESULTS / f"{device}.md").read_text() == report.render(run) + "\n"


def test_nothing_but_the_plots_imports_matplotlib() -> None:
    folder = Path(plan.__file__).parent
    users = {
        file.name for file in folder.rglob("*.py") if "matplotlib" in file.read_text().replace("matplotlib is not", "")
    }
    assert users <= {"plots.py"}

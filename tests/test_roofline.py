"""The cost model of the GPU kernels reads machine code as it is, and its predictions do not grow unnoticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parent.parent))  # benchmarks/ is not installed

from benchmarks import dry
from benchmarks.roofline import issue, notes, predict, sass, table
from benchmarks.roofline.assumptions import GPUS
from benchmarks.roofline.jobs import JOBS
from benchmarks.roofline.notes import Note, Problem

ROOT = Path(__file__).resolve().parent.parent
H200 = GPUS["h200"]


def _code(*lines: str) -> str:
    """As nvdisasm prints it; lines that end in a colon are labels."""
    return "\n".join(line if line.endswith(":") else f"        /*{n:04x}*/    {line} ;" for n, line in enumerate(lines))


# A loop of two instructions within a loop, an `if` that is skipped at times, a cold end that jumps back.
NEST = _code(
    "S2R R0, SR_CTAID.X", "@P0 EXIT",
    ".L_x_1:", "LDG.E.128 R4, desc[UR4][R2.64]",
    ".L_x_2:", "FADD R8, R8, R4", "ISETP.GE.AND P1, PT, R9, R10, PT", "@!P1 BRA `(.L_x_2)",
    "@P2 BRA `(.L_x_3)", "FMUL R8, R8, R8",
    ".L_x_3:", "@!P3 BRA `(.L_x_1)", "@P4 BRA `(.L_x_4)",
    ".L_x_5:", "STG.E desc[UR4][R2.64], R8", "EXIT",
    ".L_x_4:", "MUFU.EX2 R8, R8", "BRA `(.L_x_5)",
)  # fmt: skip


def test_loops_are_read_as_they_nest():
    kernel = sass.loops(NEST)
    names = [i.name for i in kernel.body]
    assert names == ["S2R", "EXIT", "BRA", "MUFU", "BRA", "STG", "EXIT"]  # the longer way, through the cold end
    (outer,) = kernel.inner
    assert [i.name for i in outer.body] == ["LDG", "BRA", "FMUL", "BRA"]  # the `if` is entered
    (inner,) = outer.inner
    assert [i.name for i in inner.body] == ["FADD", "ISETP", "BRA"]
    assert kernel.shown() == "7(4(3))"


def test_what_a_loop_does_now_and_then_has_turns_of_its_own():
    long = ["FADD R8, R8, R4"] * sass.LONG
    skipped = [".L_x_1:", "FMUL R1, R1, R1", "@P0 BRA `(.L_x_2)", *long, ".L_x_2:", "@P1 BRA `(.L_x_1)", "EXIT"]
    assert sass.loops(_code("S2R R0, SR_TID.X", *skipped)).shown() == f"2(3(?{sass.LONG}))"
    behind = [".L_x_1:", "FMUL R1, R1, R1", "@P0 BRA `(.L_x_1)", *long, "@P1 BRA `(.L_x_1)", "EXIT"]
    assert sass.loops(_code("S2R R0, SR_TID.X", *behind)).shown() == f"2(2(?{sass.LONG + 1}))"
    short = [line for n, line in enumerate(skipped) if n % 2 or n < 3 or "FADD" not in line]
    assert sass.loops(_code("S2R R0, SR_TID.X", *short)).shown() == f"2({3 + sass.LONG // 2})"


def test_waiting_for_a_barrier_is_no_loop():
    kernel = sass.loops(_code("S2R R0, SR_TID.X", ".L_x_0:", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2",
                              "@!P0 BRA `(.L_x_0)", "FADD R1, R1, R1", "EXIT"))  # fmt: skip
    assert kernel.inner == [] and [i.name for i in kernel.body] == ["S2R", "SYNCS", "FADD", "EXIT"]


@pytest.mark.parametrize(
    ("line", "results", "sources"),
    [
        ("LDG.E.128 R4, desc[UR4][R2.64]", ("R4", "R5", "R6", "R7"), {"UR4", "R2", "R3"}),
        ("ISETP.GE.AND P1, PT, R9, R10, PT", ("P1",), {"R9", "R10"}),
        ("@!P2 IMAD.WIDE R4, R13, 0x2, R124", ("R4", "R5"), {"P2", "R13", "R124"}),
        ("STS.128 [R118+UR8], R12", (), {"R118", "UR8", "R12"}),
        ("SHFL.BFLY PT, R4, R31, 0x10, 0x1f", ("R4",), {"R31"}),
        ("HGMMA.64x8x16.F32.BF16 R24, gdesc[UR8], R24", ("R24", "R25", "R26", "R27"), {"UR8", "R24"}),
        ("LDSM.16.M88.4 R8, [R3]", ("R8", "R9", "R10", "R11"), {"R3"}),
    ],
)
def test_operands(line: str, results: tuple[str, ...], sources: set[str]):
    instruction, _ = sass.parse(_code(line))
    assert instruction.results == results and set(instruction.sources) == sources


def _cost(*lines: str, warps: int = 4, latency: float = 280.0, **changed) -> issue.Cost:
    body = [sass.parse(_code(line))[0] for line in lines]
    return issue.cost(body, H200, issue.Setting(warps, latency, **changed))


def test_a_chain_takes_its_latencies_and_free_code_its_pipe():
    turn = H200.latencies["branch"]
    chain = _cost(*["FADD R1, R1, R2"] * 50)
    assert chain.time == pytest.approx(50 * H200.latencies["fma"], rel=0.1)
    free = _cost(*[f"LOP3.LUT R{n}, R100, R101, RZ, 0x30, !PT" for n in range(50)])
    assert free.time == pytest.approx(50 * 2 + turn, rel=0.1) and free.busy["alu"] == 100
    assert _cost(*["FADD R1, R1, R2"] * 50, warps=32).time >= 50 * 8  # eight warps a scheduler hide the latency
    one = _cost(*["LOP3.LUT R1, R100, R101, RZ, 0x30, !PT"] * 50, warps=1)
    assert one.time == free.time and one.busy["alu"] == free.busy["alu"] / 4  # three schedulers are left for others


def test_a_load_is_waited_for_where_it_is_used():
    late = ["LDG.E R4, desc[UR4][R2.64]", *["FADD R1, R1, R1"] * 100]
    assert _cost(*late, repeats=False).time < _cost(*late, "FADD R5, R4, R4", latency=5000.0, repeats=False).time - 4000
    assert _cost(*late, latency=5000.0).time < 1000  # nobody waits
    plain, merged = _cost(*late), _cost(*late, reuse=8.0)
    assert plain.busy["l2"] == 8 * merged.busy["l2"] == 4 * 32 * 4 / H200.l2_clock


def test_copies_run_ahead_as_far_as_the_code_lets_them():
    def turn(ahead: int) -> float:
        copy = ["LDGSTS.E.BYPASS.128 [R41], desc[UR16][R6.64]", "LDGDEPBAR"]
        return _cost(f"DEPBAR.LE SB0, 0x{ahead}", *copy, *["FADD R1, R1, R1"] * 20).time

    assert turn(0) > H200.latencies["l2"] > 1.5 * turn(2)


def test_bulk_copies_are_waited_for_by_turns():
    turn = ["SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR29], R9", "UTMALDG.2D [UR28], [UR38]", *["FADD R1, R1, R1"] * 40]
    next_turn, later = (_cost(*turn, ahead=ahead, copy_bytes=6400.0) for ahead in (1, 4))
    assert next_turn.time > 280 > later.time > 160
    assert later.busy["l2"] == 100


def test_products_take_the_longer_of_matrix_pipe_and_shared_memory():
    product = ["HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"]
    both = _cost(*product * 4, warps=8)
    assert both.busy["matrix"] == pytest.approx(4 * 2 * 64 / H200.matrix_share)
    assert both.busy["shared"] == 4 * 2 * (2048 + 4096) / 128  # both operands from shared memory
    from_registers = _cost(product[0].replace("gdesc", "R4, gdesc"), warps=8)
    assert from_registers.busy["shared"] == 2 * 4096 / 128


TREE = [100.0, [10.0] * len(issue.PIPES), [[50.0, [5.0] * len(issue.PIPES), [[7.0, [1.0] * len(issue.PIPES), []]]]]]


def test_turns_multiply_through_the_nest():
    assert predict.program(TREE, ((3, 4),)).time == 100 + 3 * (50 + 4 * 7)
    assert predict.program(TREE, (0,)).time == 100
    with pytest.raises(ValueError, match="1 loops, but the note has turns of 2"):
        predict.program(TREE, (1, 1))


def test_blocks_a_processor_holds():
    figures = {"registers": 128, "shared": 1000, "warps": 4}
    assert predict.resident(figures, H200) == 4
    assert predict.resident(figures | {"shared": 100_000}, H200) == 2
    assert predict.resident(figures | {"registers": 16}, H200) == 16  # threads
    assert predict.resident(figures | {"registers": 255, "warps": 8}, H200) == 1


def test_what_binds():
    figures = {"registers": 32, "shared": 0, "warps": 4}
    block = predict.program(TREE, ((3, 4),))
    block.busy["l2"] = 0.0
    note = Note(programs=132 * 160)
    alone, bound = predict.launch_time(figures, block, note, H200)
    assert bound == "latency, 16 blocks a processor" and alone == 10 * (334 + H200.block_start) / H200.clock
    assert predict.launch_time(figures, block, replace(note, hbm=1e9), H200) == (1e9 / H200.hbm, "HBM")
    fuller = replace(block, busy=block.busy | {"alu": 300.0})
    assert predict.launch_time(figures, fuller, note, H200) == (160 * 300 / H200.clock, "alu pipe")


def _launch(name: str = "_normalize_rows_kernel") -> dry.Launch:
    function = SimpleNamespace(arg_names=["x_ptr", "out_ptr"])
    x = dry.Operand((64, 8), (8, 1), torch.bfloat16, 0)
    return dry.Launch(name, function, (4,), (x, x), {}, "normalize_rows")


def test_a_kernel_without_a_note_is_named():
    assert notes.note(_launch(), Problem()).hbm == 2 * 64 * 8 * 2
    with pytest.raises(notes.Unfit, match="_new_kernel: no note says how often its loops run"):
        notes.note(_launch("_new_kernel"), Problem())
    with pytest.raises(notes.Unfit, match="_count_bits_kernel: its note is of another kernel .*'W'"):
        notes.note(_launch("_count_bits_kernel"), Problem())


def test_a_note_that_does_not_fit_the_machine_code_is_named():
    figures = {"cost": TREE}
    with pytest.raises(notes.Unfit, match="_normalize_rows_kernel: 1 loops, but the note has turns of 0"):
        predict.block_cost(figures, _launch(), Note(), H200)
    with pytest.raises(notes.Unfit, match="_normalize_rows_kernel: a block makes .* operations by its turns, 1e"):
        predict.block_cost(figures, _launch(), Note(turns=((1, 1),), products=1e9), H200)


def test_unions_between_those_counted():
    problem = Problem(0.02, {16: 1000.0, 64: 4000.0})
    assert [round(problem.union(rows)) for rows in (16, 32, 64)] == [1000, 2000, 4000]


def test_every_stage_is_for_some_op_once():
    for job in JOBS:
        ops = [op for stage in job.stages for op in stage.ops]
        assert len(ops) == len(set(ops)) and len({stage.title for stage in job.stages}) == len(job.stages)


# ------------------------------------------------------------------ the results file


def test_growth_is_noticed_and_taken_only_when_accepted():
    held = {"case": {"stage": 1.0, "gone": 2.0}}
    assert table.grown({"case": {"stage": 1.09, "new": 5.0}}, held) == []
    assert table.grown({"case": {"stage": 1.11}}, held) == ["case, stage: predicted 1.110 ms, 1.000 before"]

    made = SimpleNamespace(gpu="h200", figures={}, milliseconds=lambda: {"case": {"stage": 1.05}})
    before = {"h200": {"bounds_ms": held}}
    assert json.loads(table.as_json(made, before, False))["h200"]["bounds_ms"] == {"case": {"stage": 1.0}}
    assert json.loads(table.as_json(made, before, True))["h200"]["bounds_ms"] == {"case": {"stage": 1.05}}


def test_the_file_says_that_it_was_predicted():
    file = json.loads(table.RESULTS.read_text())
    assert file["note"] == "predicted from machine code; nothing here was measured"
    assert {"command", "date", "triton", "torch"} <= set(file)


def test_predictions_are_of_these_kernels_and_have_not_grown():
    """Without the interpreter: sources of all kernels, and two of them compiled."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.roofline", "--check"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]

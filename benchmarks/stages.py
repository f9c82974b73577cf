"""Where a loss step of ours spends its time, and what each stage has to do. Imports torch only to measure.

Times are those of the library's ops in torch's profiler. One op call handles denominator and positives, so these are
told apart by inputs: the same step is run with a pool that leaves a patch about one positive, and what statistics and
gradient take less then is the stage "positives". Arithmetic counts logits twice where they are (statistics and
gradient): storing them would take N^2 numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from statistics import median

from benchmarks.plan import STREAMS, Shape

STAGE_OF_OP = {
    "check_finite": "normalise",
    "normalize_rows": "normalise",
    "normalize_rows_grad": "normalise",
    "max_similarity": "pools",
    "pairs_above": "search",
    "random_bits": "random columns",
    "count_bits": "positives",
    "contrastive_stats": "statistics",
    "contrastive_grad": "gradient",
}
STAGES = ("normalise", "pools", "search", "random columns", "statistics", "positives", "gradient")
WHOLE, REST = "whole step", "everything else"
OVER_POSITIVES = ("statistics", "gradient")


def work(stage: str, shape: Shape, density_p: float, density_q: float, size: int) -> tuple[dict[int, float], float]:
    """Arithmetic by inner dimension, and the fewest bytes moved, `size` to a number."""
    n, c, d, rate = shape.rows, shape.channels, shape.code, shape.rate
    bits = n * n / 8
    streams = STREAMS * n * d * size
    sets = (n + shape.pool) * (c + d) * size
    random = 0.0 if rate == 1 else shape.tokens * n / 8
    pairs = 2.0 * STREAMS * n * n * d  # one product over all pairs, both streams
    if stage == "normalise":  # read and written; the streams' gradients too
        return {}, 2.0 * sets + 5.0 * streams
    if stage == "pools":
        return {c: 2.0 * n * shape.pool * c, d: 2.0 * n * shape.pool * d}, sets + 8.0 * n
    if stage == "search":  # upper triangles
        return _sum({c: float(n * n * c)}, {d: float(n * n * d)}), n * (c + d) * size + 2 * bits
    if stage == "random columns":
        return {}, random
    if stage == "statistics":
        return {d: rate * pairs}, streams + random + STREAMS * 4.0 * n
    if stage == "gradient":  # logits again; (G + G^T) x is one product if G's columns are known as its rows are
        return {d: (2 if rate == 1 else 3) * rate * pairs}, 2.0 * streams + random
    if stage == "positives":  # a logit each of P and Q forward; P again backward, and both into the gradient
        return {d: pairs * (3 * density_p + 2 * density_q)}, 4 * bits
    return {}, 0.0


def _sum(*parts: dict[int, float]) -> dict[int, float]:
    return {k: sum(part.get(k, 0.0) for part in parts) for part in parts for k in part}


def measure(
    run: Callable[[], float], device: str, prepare: Callable[[bool], None], repetitions: int
) -> dict[str, float]:
    """Seconds by stage and of the whole step (medians). `prepare(few)` sets the inputs; few: one positive a row."""
    prepare(True)
    few = _by_op(run, device, repetitions)
    prepare(False)
    real = _by_op(run, device, repetitions)
    seconds = dict.fromkeys(STAGES, 0.0)
    for name, value in real.items():
        if name == WHOLE:
            continue
        stage = STAGE_OF_OP.get(name, name)
        if stage in OVER_POSITIVES:
            alone = min(value, few.get(name, value))
            seconds["positives"] += value - alone
            value = alone
        seconds[stage] = seconds.get(stage, 0.0) + value
    rest = max(0.0, real[WHOLE] - sum(seconds.values()))
    return seconds | {REST: rest, WHOLE: real[WHOLE]}


def _by_op(run: Callable[[], float], device: str, repetitions: int) -> dict[str, float]:
    """Seconds of each op of the library in one run, and of the run (medians)."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
    samples = defaultdict(list)
    run()
    for _ in range(repetitions):
        with profile(activities=activities) as trace:
            samples[WHOLE].append(run())
        spent = defaultdict(float)
        for event in trace.events():
            if event.name.startswith("hpkernels::") and not _inside_op(event):
                on_device = event.device_time_total if device == "cuda" else event.cpu_time_total
                spent[event.name.removeprefix("hpkernels::")] += on_device / 1e6
        for name, value in spent.items():
            samples[name].append(value)
    return {name: median(values) for name, values in samples.items()}


def _inside_op(event) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith("hpkernels::"):
            return True
        parent = parent.cpu_parent
    return False

"""Runs a plan: gates, then one process per contender, warmed, then one repetition each in turn.

Every contender lives in its own process (benchmarks/worker.py), so none inherits another's heap or warm caches. A
contender is warm when a repetition takes no more new page faults than the one before. Then all take turns, A B A B,
so that a slow minute of the machine meets every one of them. Peak memory is a separate, fresh process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from benchmarks import results as tidy
from benchmarks import stages
from benchmarks.plan import OURS, Race, Shape

ROOT = Path(__file__).resolve().parent.parent
MAX_WARM_UPS = 3
SLOW = 10.0  # seconds of a repetition: one is warm-up enough, and one is enough beyond the time of a race
MIN_REPETITIONS = 3  # of others, however long the race takes
# Memory is counted with every block over 1 MiB in pages of its own: what is live, not how the heap happens to break up.
OWN_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
FAULTS_SETTLED = 0.95  # of the repetition before: fewer new faults than that means still warming
LONGEST_REASON = 300  # characters
LEFT_OUT = "left out at this size: it would take minutes a repetition (ask for it with --peers)"
DENSITY_PANELS = 16  # of 128 rows, from which the density of a shape is found


@dataclass(frozen=True)
class Setting:
    """Where and how a run measures."""

    device: str
    dtype: str
    threads: int
    seconds_per_race: float  # repetitions end early (but not before MIN_REPETITIONS) once a race has taken this long


class ContenderFailed(RuntimeError):
    """A worker process ended before it answered."""


def command(module: str, *arguments: str) -> list[str]:
    """The command line that runs a module of the benchmarks."""
    return [sys.executable, "-m", module, *arguments]


class Contender:
    """A worker process and the requests to it."""

    def __init__(self, setting: Setting, **environment: str) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": str(setting.threads), "PYTHONUNBUFFERED": "1"} | environment
        self.setting = setting
        self.slowest = 0.0
        # A file, as an unread pipe would fill up and stop the worker.
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the worker)
        self.process = subprocess.Popen(
            command("benchmarks.worker"),
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def ask(self, do: str, **fields) -> dict:
        try:
            self.process.stdin.write(json.dumps({"do": do} | fields) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self.process.wait()
            self.errors.seek(0)
            errors = self.errors.read().strip().splitlines()
            raise ContenderFailed(errors[-1][:LONGEST_REASON] if errors else f"exit status {status}, no message")
        return json.loads(line)

    def prepare(self, race: Race, peer: str) -> dict:
        s = self.setting
        shape = asdict(race.shape)
        return self.ask(
            "prepare", kind=race.kind, peer=peer, shape=shape, device=s.device, dtype=s.dtype, threads=s.threads
        )

    def warm(self) -> None:
        faults = None
        for _ in range(MAX_WARM_UPS):
            answer = self.ask("run")
            last, faults = faults, answer["faults"]
            if answer["seconds"] > SLOW or (last is not None and faults >= FAULTS_SETTLED * last):
                return

    def time(self) -> float:
        seconds = self.ask("run")["seconds"]
        self.slowest = max(self.slowest, seconds)
        return seconds

    def close(self) -> None:
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()


@contextmanager
def contender(setting: Setting, **environment: str) -> Iterator[Contender]:
    worker = Contender(setting, **environment)
    try:
        yield worker
    finally:
        worker.close()


class Gates:
    """Verdicts of benchmarks/checks.py and densities of inputs, each found once a run, in a process of their own."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.worker: Contender | None = None
        self.verdicts: dict[tuple, dict] = {}
        self.densities: dict[Shape, dict] = {}

    def verdict(self, race: Race, peer: str) -> dict:
        """{"state": "ok" | "skipped" | "red" | "failed", "reason"} of a peer at this kind of work."""
        kind = "step" if race.kind == "stages" else race.kind
        key = kind, peer, race.shape.rate == 1
        if key not in self.verdicts:
            s = self.setting
            try:
                found = self._ask("gate", kind=kind, peer=peer, device=s.device, dtype=s.dtype, rate=race.shape.rate)
            except ContenderFailed as failure:
                found = {"state": "failed", "reason": f"in its correctness gate: {failure}"}
            self.verdicts[key] = found
        return self.verdicts[key]

    def density(self, shape: Shape, panels: int = DENSITY_PANELS) -> dict:
        """Shares of pairs, and of tiles, that are positives in inputs of a shape; {} if they cannot be made."""
        key = replace(shape, rate=0.0)
        if key not in self.densities:
            try:
                self.densities[key] = self._ask(
                    "density", shape=asdict(shape), device=self.setting.device, panels=panels
                )
            except ContenderFailed:
                self.densities[key] = {}
        return self.densities[key]

    def _ask(self, do: str, **fields) -> dict:
        self.worker = self.worker or Contender(self.setting)
        try:
            return self.worker.ask(do, **fields)
        except ContenderFailed:
            self.close()
            raise

    def close(self) -> None:
        if self.worker:
            self.worker.close()
        self.worker = None


def run(race: Race, setting: Setting, gates: Gates, ceilings: tidy.Ceilings, say: Callable[[str], None]) -> list[dict]:
    """The rows of a race. No row has figures whose peer's gate is not green, and none of a case where ours is not."""
    rows = {peer: _row(race, peer, setting, gates.verdict(race, peer)) for peer in race.peers}
    wrong = next(
        (rows[peer] for peer in OURS if peer in rows and rows[peer]["status"] in (tidy.RED, tidy.FAILED)), None
    )
    for row in rows.values():
        if wrong and row["status"] == tidy.OK:
            row |= {"status": wrong["status"], "reason": f"{wrong['peer']}: {wrong['reason']}"}
    running = [peer for peer, row in rows.items() if row["status"] == tidy.OK]
    found = list(rows.values())
    if running:
        if race.kind in ("step", "search", "stages"):
            density = gates.density(race.shape)
            for row in found:
                row |= {f"density_{name.lower()}": density.get(name) for name in "PQ"}
        if race.kind == "stages":
            found = [row for peer in race.peers for row in _stages(race, rows[peer], setting, ceilings)]
        else:
            _run_race(race, rows, running, setting, ceilings)
    found += [_row(race, peer, setting, {"state": tidy.SKIPPED, "reason": LEFT_OUT}) for peer in race.left_out]
    for row in found:
        say(line(row))
    return found


def not_run(race: Race, setting: Setting, reason: str) -> list[dict]:
    """Rows of a race there was no time for."""
    return [_row(race, peer, setting, {"state": tidy.SKIPPED, "reason": reason}) for peer in race.peers]


def _run_race(race: Race, rows: dict[str, dict], peers: list[str], setting: Setting, ceilings: tidy.Ceilings) -> None:
    """Fills the rows of the peers; one that fails (out of memory, say) keeps the figures as far as it came."""
    seconds: dict[str, list[float]] = {}
    jobs: dict[str, dict] = {}
    with ExitStack() as stack:
        running: dict[str, Contender] = {}

        def attempt(peer: str, action: Callable[[], None]) -> None:
            try:
                action()
            except ContenderFailed as failure:
                rows[peer] |= {"status": tidy.FAILED, "reason": str(failure)}
                running.pop(peer, None)

        def start(peer: str) -> None:
            jobs[peer] = running[peer].prepare(race, peer)
            running[peer].warm()
            seconds[peer] = []

        for peer in peers:  # all at once: their imports take longer than many a job
            running[peer] = stack.enter_context(contender(setting))
        for peer in peers:
            attempt(peer, partial(start, peer))
        began = time.monotonic()
        for repetition in range(race.repetitions):
            late = time.monotonic() - began > setting.seconds_per_race
            if late and (repetition >= MIN_REPETITIONS or any(w.slowest > SLOW for w in running.values())):
                break
            for peer, worker in list(running.items()):
                attempt(peer, lambda peer=peer, worker=worker: seconds[peer].append(worker.time()))
        if race.memory and setting.device == "cuda":  # counted by the allocator, so no fresh process is needed
            for peer, worker in list(running.items()):
                attempt(peer, lambda peer=peer, worker=worker: rows[peer].update(worker.ask("memory")))
    for peer, values in seconds.items():
        if values:
            rows[peer].update(summary(values))
            tidy.add_rates(rows[peer], jobs[peer]["flop"], jobs[peer]["bytes"], ceilings)
    if race.memory and setting.device == "cpu":
        for peer in seconds:
            if rows[peer]["status"] == tidy.OK:
                _measure_memory(race, peer, rows[peer], setting)


def _measure_memory(race: Race, peer: str, row: dict, setting: Setting) -> None:
    try:
        with contender(setting, **OWN_PAGES) as worker:
            worker.prepare(race, peer)
            row.update(worker.ask("memory"))
    except ContenderFailed as failure:
        row |= {"status": tidy.FAILED, "reason": f"measuring its memory: {failure}"}


def _stages(race: Race, row: dict, setting: Setting, ceilings: tidy.Ceilings) -> list[dict]:
    """A row for each stage of a step of one peer."""
    if row["status"] != tidy.OK:
        return [row]
    try:
        with contender(setting) as worker:
            worker.prepare(race, row["peer"])
            worker.warm()
            found = worker.ask("stages", repetitions=race.repetitions)
    except ContenderFailed as failure:
        return [row | {"status": tidy.FAILED, "reason": str(failure)}]
    size = 4 if setting.dtype == "float32" else 2
    rows = []
    for stage, value in found.items():
        flop, nbytes = stages.work(stage, race.shape, row.get("density_p") or 0.0, row.get("density_q") or 0.0, size)
        rows.append(row | {"stage": stage, "p50_ms": 1e3 * value, "repetitions": race.repetitions})
        tidy.add_rates(rows[-1], flop, nbytes, ceilings)
    return rows


def versions(setting: Setting) -> dict:
    with contender(setting) as worker:
        return worker.ask("versions")


def summary(seconds: list[float]) -> dict:
    """p20, p50, p80 in milliseconds and the number of repetitions."""
    return {f"p{q}_ms": 1e3 * percentile(seconds, q) for q in (20, 50, 80)} | {"repetitions": len(seconds)}


def percentile(values: list[float], q: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _row(race: Race, peer: str, setting: Setting, verdict: dict) -> dict:
    status = {"red": tidy.RED}.get(verdict["state"], verdict["state"])
    row = {"case": race.case, "kind": race.kind, "peer": peer, "status": status, "reason": verdict.get("reason")}
    return row | {"device": setting.device, "dtype": setting.dtype} | tidy.shape_fields(race)


def line(row: dict) -> str:
    """A row for the eye, while the run goes on."""
    head = f"{row['case']:16} {row['peer']:23} N {row.get('N', 0):6} {row.get('stage', '')}"
    if row["status"] != tidy.OK:
        return f"{head}  {row['status']}: {row['reason']}"
    memory = f"  peak {row['peak_bytes'] / 2**20:8.1f} MiB" if "peak_bytes" in row else ""
    spread = f"  ({row['p20_ms']:.1f} - {row['p80_ms']:.1f})" if "p20_ms" in row else ""
    share = f"  {row['percent_of_ceiling']:.0f} % of {row['ceiling']}" if "ceiling" in row else ""
    return f"{head}  {row['p50_ms']:10.1f} ms{spread}{memory}{share}"

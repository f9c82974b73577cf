"""Runs a plan: one process per contender, warmed, then one repetition each in turn.

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
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.plan import Race, Shape

ROOT = Path(__file__).resolve().parent.parent
MAX_WARM_UPS = 4
# Memory is counted with every block over 1 MiB in pages of its own: what is live, not how the heap happens to break up.
OWN_PAGES = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
FAULTS_SETTLED = 0.95  # of the repetition before: fewer new faults than that means still warming


@dataclass(frozen=True)
class Setting:
    """Where and how a run measures."""

    device: str
    dtype: str
    threads: int
    seconds_per_race: float  # repetitions end early (but not before 3) once a race has taken this long


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
        self.errors = tempfile.TemporaryFile("w+")  # a file, as an unread pipe would fill up and stop the worker
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
            raise ContenderFailed(errors[-1] if errors else f"exit status {status}, no message")
        return json.loads(line)

    def prepare(self, race: Race, name: str) -> dict:
        s = self.setting
        shape = asdict(race.shape)
        return self.ask(
            "prepare", case=race.case, contender=name, shape=shape, device=s.device, dtype=s.dtype, threads=s.threads
        )

    def warm(self) -> None:
        faults = None
        for _ in range(MAX_WARM_UPS):
            last, faults = faults, self.ask("run")["faults"]
            if last is not None and faults >= FAULTS_SETTLED * last:
                return

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


def run_race(race: Race, setting: Setting, say: Callable[[str], None]) -> list[dict]:
    """One record per contender; one that fails (out of memory, say) has an "error", and figures as far as it came."""
    records = {name: _record(race, name, setting) for name in race.contenders}
    seconds: dict[str, list[float]] = {}
    with ExitStack() as stack:
        running: dict[str, Contender] = {}

        def attempt(name: str, action: Callable[[], None]) -> None:
            try:
                action()
            except ContenderFailed as failure:
                records[name]["error"] = str(failure)
                running.pop(name, None)
                seconds.pop(name, None)

        def start(name: str) -> None:
            worker = stack.enter_context(contender(setting))
            records[name].update(worker.prepare(race, name))
            worker.warm()
            running[name], seconds[name] = worker, []

        for name in race.contenders:
            attempt(name, lambda: start(name))
        began = time.monotonic()
        for repetition in range(race.repetitions):
            if repetition >= 3 and time.monotonic() - began > setting.seconds_per_race:
                break
            for name, worker in list(running.items()):
                attempt(name, lambda: seconds[name].append(worker.ask("run")["seconds"]))
        for name, values in seconds.items():
            records[name].update(summary(values, records[name]))
        if race.memory and setting.device == "cuda":  # counted by the allocator, so no fresh process is needed
            for name, worker in list(running.items()):
                attempt(name, lambda: records[name].update(worker.ask("memory")))
    if race.memory and setting.device == "cpu":
        for name in seconds:
            with contender(setting, **OWN_PAGES) as worker:
                worker.prepare(race, name)
                records[name].update(worker.ask("memory"))
    for record in records.values():
        say(_line(record))
    return list(records.values())


def run_stages(case: str, shape: Shape, setting: Setting, repetitions: int) -> dict:
    """Where a step of ours spends its time: seconds by stage, "step" for the whole."""
    with contender(setting) as worker:
        worker.prepare(Race(case, ("hpkernels",), shape, repetitions), "hpkernels")
        worker.warm()
        stages = worker.ask("stages", repetitions=repetitions)["stages"]
    return {"case": case, "shape": shape.as_dict(), "dtype": setting.dtype, "device": setting.device, "seconds": stages}


def density(shape: Shape, setting: Setting) -> dict:
    """Fractions of pairs in P and Q, and of their non-empty tiles, in the inputs of the step."""
    with contender(setting) as worker:
        return worker.ask("density", shape=asdict(shape), device=setting.device)


def versions(setting: Setting) -> dict:
    with contender(setting) as worker:
        return worker.ask("versions")


def summary(seconds: list[float], job: dict) -> dict:
    """p20, p50, p80 in seconds, the number of repetitions, and the rate at p50."""
    p20, p50, p80 = (percentile(seconds, q) for q in (20, 50, 80))
    result = {"p20": p20, "p50": p50, "p80": p80, "repetitions": len(seconds)}
    if job.get("flop"):
        result["gflops"] = job["flop"] / p50 / 1e9
    if job.get("nbytes"):
        result["gbs"] = job["nbytes"] / p50 / 1e9
    return result


def percentile(values: list[float], q: float) -> float:
    """Linear interpolation between order statistics."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def _record(race: Race, name: str, setting: Setting) -> dict:
    return {
        "part": race.part,
        "case": race.case,
        "contender": name,
        "shape": race.shape.as_dict(),
        "dtype": setting.dtype,
        "device": setting.device,
        "threads": setting.threads,
    }


def _line(record: dict) -> str:
    head = f"{record['case']:14} {record['contender']:10} N {record['shape']['rows']:6}"
    if "error" in record:
        return f"{head}  failed: {record['error']}"
    memory = f"  peak {record['peak_bytes'] / 2**20:8.1f} MiB" if "peak_bytes" in record else ""
    return f"{head}  {record['p50'] * 1e3:10.1f} ms  ({record['p20'] * 1e3:.1f} - {record['p80'] * 1e3:.1f}){memory}"

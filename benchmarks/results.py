"""One tidy table a run, as CSV and as JSON: a row for each case, peer, shape and stage. Imports no torch."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from benchmarks.plan import CLUSTERS, GROUPS, NEIGHBOURS, SCALES, Race, Shape

FORMAT = 2
COLUMNS = (
    "case", "kind", "peer", "stage", "status", "reason", "device", "dtype",
    "N", "T", "C", "D", "pool", "heads", "k", "groups", "rho", "density", "density_p", "density_q",
    "p20_ms", "p50_ms", "p80_ms", "repetitions", "peak_bytes",
    "flop", "bytes", "tflops", "gbs", "ceiling", "percent_of_ceiling",
    "hpkernels", "torch", "triton", "peer_version", "python", "processor", "threads", "commit", "date",
)  # fmt: skip
OK, SKIPPED, FAILED, RED = "ok", "skipped", "failed", "gate red"


class Ceilings:
    """What this device gave a library product, by inner dimension, and a copy, in this run."""

    def __init__(self) -> None:
        self.product: dict[int, float] = {}  # FLOP/s
        self.copy: float | None = None  # bytes/s

    def note(self, row: dict) -> None:
        if row["status"] == OK and row["case"] == "product":
            self.product[row["C"]] = row["tflops"] * 1e12
        if row["status"] == OK and row["case"] == "copy":
            self.copy = row["gbs"] * 1e9

    def least_seconds(self, flop: dict[int, float], nbytes: float) -> tuple[str, float]:
        """Time of the arithmetic or of the bytes at the measured rates, the longer, with its name; "", 0 if unknown."""
        times = []
        if flop and all(k in self.product for k in flop):
            times.append(("product", sum(value / self.product[k] for k, value in flop.items())))
        if nbytes and self.copy:
            times.append(("copy", nbytes / self.copy))
        return max(times, key=lambda pair: pair[1], default=("", 0.0))


def shape_fields(race: Race) -> dict:
    s: Shape = race.shape
    fields = {
        "N": s.rows,
        "T": s.tokens,
        "C": s.channels,
        "D": s.code,
        "pool": s.pool,
        "rho": s.rate,
        "density": s.density,
    }
    kept = {
        "search": ("N", "T", "C", "D", "pool", "density"),
        "topk": ("N", "C"),
        "local_mix": ("N", "T", "D"),
        "local_mix_qk": ("N", "T", "D"),
        "supcon": ("N", "D"),
        "density": ("N", "C", "pool"),
        "kmeans": ("N", "C"),
        "product": ("N", "C"),
        "copy": (),
    }.get(race.kind, tuple(fields))
    extra = {
        "topk": {"k": NEIGHBOURS},
        "local_mix": {"heads": s.heads},
        "local_mix_qk": {"heads": s.heads},
        "density": {"k": max(SCALES), "groups": GROUPS},
        "kmeans": {"k": CLUSTERS},
    }
    return {name: fields[name] for name in kept} | extra.get(race.kind, {})


def add_rates(row: dict, flop: dict[int, float] | None, nbytes: float | None, ceilings: Ceilings) -> None:
    """Rates and the share of the ceiling, from the median time."""
    flop = {int(k): value for k, value in (flop or {}).items()}  # keys came through JSON
    seconds = row["p50_ms"] / 1e3
    if seconds <= 0:
        return
    if flop:
        row["flop"] = sum(flop.values())
        row["tflops"] = row["flop"] / seconds / 1e12
    if nbytes:
        row["bytes"] = nbytes
        row["gbs"] = nbytes / seconds / 1e9
    if row["case"] in ("product", "copy"):
        return
    name, least = ceilings.least_seconds(flop, nbytes or 0.0)
    if name:
        row["ceiling"], row["percent_of_ceiling"] = name, 100 * least / seconds


def write(folder: Path, results: dict) -> list[Path]:
    """`<device>.json` (the run and its rows) and `<device>.csv` (the rows) into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / results["setting"]["device"]
    rows = [{name: row[name] for name in COLUMNS if row.get(name) not in (None, "")} for row in results["rows"]]
    paths = [stem.with_suffix(".json"), stem.with_suffix(".csv")]
    lines = ",\n  ".join(json.dumps(row) for row in rows)
    head = json.dumps({"format": FORMAT} | {key: value for key, value in results.items() if key != "rows"}, indent=1)
    paths[0].write_text(f'{head[:-2]},\n "rows": [\n  {lines}\n ]\n}}\n')
    with paths[1].open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return paths


def load(path: Path) -> dict | None:
    """A run's results; None where there is no file, or one of an older format."""
    if not path.is_file():
        return None
    results = json.loads(path.read_text())
    return results if results.get("format") == FORMAT else None


def merge(earlier: dict, run: dict) -> dict:
    """The earlier results with the rows of a run of some cases in the place of its own of these cases.

    Every row says by its commit and date which run it is of; the head stays the earlier one's. Of the ceilings, those
    of sizes the earlier run did not measure are added, as its rows are shares of its own.
    """
    ceilings = ("product", "copy")
    known = {_size(row) for row in earlier["rows"] if row["case"] in ceilings}
    rerun = {row["case"] for row in run["rows"] if row["case"] not in ceilings}
    kept = [row for row in earlier["rows"] if row["case"] not in rerun]
    return earlier | {"rows": kept + [row for row in run["rows"] if row["case"] in rerun or _size(row) not in known]}


def _size(row: dict) -> tuple:
    return row["case"], row.get("N"), row.get("C")


def find(results: dict, case: str, peer: str, stage: str | None = None) -> dict | None:
    """The first measured row of a case, peer and stage."""
    for row in results["rows"]:
        if (row["case"], row["peer"], row.get("stage")) == (case, peer, stage) and row["status"] == OK:
            return row
    return None

"""Tables from a results file, and the block of README.md that holds the short ones. Nothing is measured or typed."""

from __future__ import annotations

import os
from pathlib import Path

from benchmarks import marks, plots, stages
from benchmarks import results as tidy
from benchmarks.markdown import markdown
from benchmarks.plan import CASES, CEILING_TITLES, OURS, STAGES

BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
DEVICES = ("cpu", "cuda")
SCALING, SCALING_D = "scaling_n", "scaling_d"
TITLES = {name: case.title for name, case in CASES.items()} | CEILING_TITLES


def render(run: dict) -> str:
    """All tables of one run, in Markdown: one row for each case, peer and size."""
    stage_tables = [_stage_table(run, case, peer) for case in STAGES for peer in _stage_peers(run, case)]
    parts = [
        _heading(run),
        _full_table(run),
        _scaling_table(run, SCALING),
        _scaling_table(run, SCALING_D),
        *stage_tables,
    ]
    return "\n\n".join(part for part in parts if part)


def summary(run: dict, folder: Path, readme: Path) -> str:
    """The short tables and the plots of one run, for the README."""
    device = run["setting"]["device"]
    images = [file for file in plots.files(folder, device) if file.is_file()]
    links = " ".join(
        f"![{file.stem.replace('_', ', ')} of a step against N]({_relative(file, readme)})" for file in images
    )
    stage_table = _stage_table(run, next(iter(STAGES)), OURS[0])
    full = f"Every peer and size: `{_relative(folder / device, readme)}.md`, `.csv`, `.json`."
    parts = [_heading(run), _short_table(run), links, stage_table, marks.render(run) if device == "cuda" else "", full]
    return "\n\n".join(part for part in parts if part)


def rewrite_readme(readme: Path, folder: Path) -> None:
    """Put the short tables of the folder's results between the README's markers, the long ones beside the results.

    Results of an older format are passed over; without any of this format the README stays as it is.
    """
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{readme}: expected the lines {BEGIN} and {END}")
    runs = {device: run for device in DEVICES if (run := tidy.load(folder / f"{device}.json"))}
    if not runs:
        return
    for device, run in runs.items():
        (folder / f"{device}.md").write_text(render(run) + "\n")
    head, rest = text.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    blocks = [summary(run, folder, readme) for run in runs.values()]
    readme.write_text("\n\n".join([head + BEGIN, *blocks, END]) + tail)


def _heading(run: dict) -> str:
    v, s = run["versions"], run["setting"]
    if s["device"] == "cuda":
        where = f"{v['gpu']}, {s['dtype']}, CUDA {v['cuda']}, Triton {v['triton']}"
    else:
        isa = f" (kernels: {v['cpu_isa']})" if "cpu_isa" in v else ""
        where = f"{v['cpu']}, {s['threads']} threads, {s['dtype']}{isa}"
    lines = [f"{where}; torch {v['torch']}; commit {run['commit']}, {run['date']}; `{run['command']}`."]
    step = next((row for case in CASES if (row := tidy.find(run, case, OURS[0])) and row["kind"] == "step"), None)
    if step:
        lines.append(
            f"Unless a row says otherwise {step['N'] // step['T']} images of {step['T']} patches (N = {step['N']:,}), "
            f"C {step['C']}, D {step['D']}, pools of {step['pool']:,}; a step is the search and the forward and "
            "backward pass of both streams."
        )
    lines += _later(run)
    if step and "density_p" in step:
        lines.append(f"P is {step['density_p']:.2%} and Q {step['density_q']:.2%} dense.")
    return " ".join(lines)


def _later(run: dict) -> list[str]:
    """Of which other runs some of the rows are, by their commits and dates."""
    runs: dict[tuple[str, str], list[str]] = {}
    for row in run["rows"]:
        if row["case"] in CASES and (row["commit"], row["date"]) != (run["commit"], run["date"]):
            runs.setdefault((row["commit"], row["date"]), []).append(TITLES[row["case"]])
    return [
        f"Of commit {commit}, {date}, are: {', '.join(dict.fromkeys(titles))}."
        for (commit, date), titles in runs.items()
    ]


def _rows(run: dict, case: str) -> list[dict]:
    return [row for row in run["rows"] if row["case"] == case]


def _short_table(run: dict) -> str:
    """A row a case: ours, and how many times as long and as much memory the others take."""
    table = []
    for case in CASES:
        ours = tidy.find(run, case, OURS[0])
        if case in (SCALING, SCALING_D):
            continue
        if ours is None:
            reason = next((row["reason"] for row in _rows(run, case) if row["status"] != tidy.SKIPPED), None)
            table += [[TITLES[case], f"no figures: {reason}", "", "", ""]] if reason else []
            continue
        others = [row for row in _rows(run, case) if row is not ours and row["status"] == tidy.OK]
        table.append(
            [TITLES[case], _time(ours), _memory(ours), _share(ours), "; ".join(_against(row, ours) for row in others)]
        )
    header = [
        "job",
        "hpkernels: p50 (p20 - p80)",
        "peak extra memory",
        "of the ceiling",
        "others: times its time, times its memory",
    ]
    return markdown(header, table) if table else ""


def _against(row: dict, ours: dict) -> str:
    memory = (
        f", {row['peak_bytes'] / ours['peak_bytes']:.1f}x" if row.get("peak_bytes") and ours.get("peak_bytes") else ""
    )
    return f"{row['peer']} {row['p50_ms'] / ours['p50_ms']:.1f}x{memory}"


def _full_table(run: dict) -> str:
    table = []
    for case in (*CASES, *CEILING_TITLES):
        if case in (SCALING, SCALING_D):
            continue
        for row in _rows(run, case):
            sizes = ", ".join(f"{name} {row[name]:,}" for name in ("N", "C", "D") if name in row)
            if row["status"] == tidy.OK:
                table.append([TITLES[case], sizes, row["peer"], _time(row), _memory(row), _rate(row), _share(row)])
            else:
                table.append([TITLES[case], sizes, row["peer"], f"{row['status']}: {row['reason']}", "", "", ""])
    header = ["job", "sizes", "by", "time, p50 (p20 - p80)", "peak extra memory", "rate", "of the ceiling"]
    return markdown(header, table) if table else ""


def _scaling_table(run: dict, case: str) -> str:
    """A row a size, a column a peer: time and peak extra memory."""
    if case == SCALING:
        times, sizes = plots.series(run, "p50_ms"), plots.series(run, "peak_bytes")
        title, axis = "How a step at rho 0.02 grows with N:", "N"
    else:
        rows = [row for row in _rows(run, case) if row["status"] == tidy.OK]
        times = {
            peer: [(r["D"], r["p50_ms"]) for r in rows if r["peer"] == peer]
            for peer in dict.fromkeys(r["peer"] for r in rows)
        }
        sizes = {
            peer: [(r["D"], r["peak_bytes"]) for r in rows if r["peer"] == peer and "peak_bytes" in r] for peer in times
        }
        title, axis = f"How a step at rho 1, N = {rows[0]['N']:,}, grows with D:" if rows else "", "D"
    if not times or not any(row["case"] == case for row in run["rows"]):
        return ""
    values = sorted({n for points in times.values() for n, _ in points})
    table = []
    for n in values:
        cells = [f"{n:,}"]
        for peer, points in times.items():
            time, size = dict(points).get(n), dict(sizes.get(peer, [])).get(n)
            cells.append(
                ""
                if time is None
                else f"{_milliseconds(time)} ms, {_size(size)}"
                if size
                else f"{_milliseconds(time)} ms"
            )
        table.append(cells)
    return f"{title}\n\n{markdown([axis, *times], table)}"


def _stage_peers(run: dict, case: str) -> list[str]:
    return list(dict.fromkeys(row["peer"] for row in _rows(run, case) if row["status"] == tidy.OK))


def _stage_table(run: dict, case: str, peer: str) -> str:
    found = {row["stage"]: row for row in _rows(run, case) if row["peer"] == peer and row["status"] == tidy.OK}
    if stages.WHOLE not in found:
        return ""
    whole = found[stages.WHOLE]
    table = []
    for stage, row in found.items():
        flop = f"{row['flop'] / 1e9:,.1f}" if "flop" in row else ""
        size = f"{row['bytes'] / 2**20:,.1f}" if "bytes" in row else ""
        share = f"{row['p50_ms'] / whole['p50_ms']:.0%}"
        table.append([stage, _milliseconds(row["p50_ms"]), share, flop, size, _share(row)])
    title = f"Where a step of {peer} at rho {whole['rho']:g}, N = {whole['N']:,}, spends its time:"
    return f"{title}\n\n" + markdown(["stage", "ms", "share", "GFLOP", "MiB", "of the ceiling"], table)


def _time(row: dict) -> str:
    p50, p20, p80 = (_milliseconds(row[f"p{q}_ms"]) for q in (50, 20, 80))
    return f"{p50} ms ({p20} - {p80})"


def _milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.3f}"


def _memory(row: dict) -> str:
    return _size(row.get("peak_bytes"))


def _size(size: int | None) -> str:
    if size is None:
        return ""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _rate(row: dict) -> str:
    if "tflops" in row:
        return f"{row['tflops']:.1f} TFLOP/s" if row["tflops"] >= 1 else f"{row['tflops'] * 1e3:,.0f} GFLOP/s"
    return f"{row['gbs']:,.1f} GB/s" if "gbs" in row else ""


def _share(row: dict) -> str:
    return f"{row['percent_of_ceiling']:.0f} % ({row['ceiling']})" if "ceiling" in row else ""


def _relative(path: Path, readme: Path) -> str:
    return Path(os.path.relpath(path, readme.parent)).as_posix()

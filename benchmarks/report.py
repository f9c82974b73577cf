"""Tables from a results file, and the block of README.md that holds them. Nothing here measures; nothing is typed in."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.plan import CEILINGS, PART_CASES, SCALING_CASE

RESULTS = Path(__file__).resolve().parent / "results"
README = Path(__file__).resolve().parent.parent / "README.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
TITLES = {
    "step_rho_0.02": "loss step, rho 0.02",
    "step_rho_1": "loss step, rho 1",
    "search": "its two searches alone",
    "local_mix": "local_mix, forward + backward",
    "topk": "topk_similarity, k 16",
    "product": "one product, N x C x N",
    "copy": "one copy",
}
STAGE_TITLES = {
    "check_finite": "check for NaN and infinity",
    "normalize_rows": "normalise rows",
    "normalize_rows_grad": "gradient of normalise",
    "max_similarity": "best match in the pool",
    "pairs_above": "pairs above the thresholds",
    "random_bits": "random columns",
    "count_bits": "positives per row",
    "contrastive_stats": "statistics",
    "contrastive_grad": "gradient",
}


def render(results: dict) -> str:
    """All tables of one results file, in Markdown."""
    parts = [_heading(results), _speed_table(results), _scaling_table(results), _stage_table(results)]
    return "\n\n".join(part for part in parts if part)


def rewrite_readme(readme: Path = README, folder: Path = RESULTS) -> None:
    """Put the tables of folder/cpu.json and folder/cuda.json between the markers of the README."""
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        raise ValueError(f"{readme}: expected the lines {BEGIN} and {END}")
    blocks = [render(json.loads(path.read_text())) for device in ("cpu", "cuda") if (path := folder / f"{device}.json").is_file()]
    head, rest = text.split(BEGIN, 1)
    tail = rest.split(END, 1)[1]
    readme.write_text("\n\n".join([head + BEGIN, *blocks, END]) + tail)


def _heading(results: dict) -> str:
    v, s = results["versions"], results["setting"]
    if s["device"] == "cuda":
        where = f"{v['gpu']}, {s['dtype']}, CUDA {v['cuda']}, Triton {v['triton']}"
    else:
        isa = f" (kernels: {v['cpu_isa']})" if "cpu_isa" in v else ""
        where = f"{v['cpu']}, {s['threads']} threads, {s['dtype']}{isa}"
    lines = [f"{where}; torch {v['torch']}; commit {results['commit']}, {results['date']}; `{results['command']}`."]
    speed = next((r for r in results["records"] if r["part"] == "speed" and r["case"] not in CEILINGS), None)
    if speed:
        shape = speed["shape"]
        lines.append(
            f"{shape['images']} images of {shape['grid'][0]} x {shape['grid'][1]} patches (N = {shape['rows']:,}), "
            f"C {shape['channels']}, D {shape['code']}, pools of {shape['pool']:,}; a step is the search and the forward and "
            "backward pass of both streams."
        )
    if results.get("density"):
        d = results["density"]
        lines.append(f"P is {d['P']:.2%} and Q {d['Q']:.2%} dense.")
    return " ".join(lines)


def _speed_table(results: dict) -> str:
    rows = []
    for case in PART_CASES:
        records = [r for r in results["records"] if r["case"] == case and r["part"] == "speed"]
        if case in results.get("red_gates", {}):
            rows.append([TITLES[case], "", f"not measured: {results['red_gates'][case]}", "", "", ""])
        ours = next((r for r in records if r["contender"] == "hpkernels" and "p50" in r), None)
        for r in records:
            against = ours and "p50" in r and r is not ours
            faster = f"{r['p50'] / ours['p50']:.1f}x" if against else ""
            memory = _ratio_of_memory(r, ours) if against else _memory(r)
            rows.append([TITLES[case], r["contender"], _time(r), memory, _rate(r), faster])
    if not rows:
        return ""
    header = ["job", "by", "time, p50 (p20 - p80)", "peak extra memory", "rate", "hpkernels is faster"]
    return "\n".join([_table(header, rows), *_search_line(results)])


def _search_line(results: dict) -> list[str]:
    step = _find(results, "step_rho_0.02", "hpkernels")
    products = _find(results, "search", "torch.mm")
    if not step or not products:
        return []
    ratio = step["p50"] / products["p50"]
    return ["", f"The whole step at rho 0.02 takes {ratio:.2f} times what `torch.mm` takes for the products of its search alone."]


def _scaling_table(results: dict) -> str:
    records = [r for r in results["records"] if r["case"] == SCALING_CASE]
    if not any(r["part"] == "scaling" for r in records):
        return ""
    rows = []
    for n in sorted({r["shape"]["rows"] for r in records}):
        by = {r["contender"]: r for r in records if r["shape"]["rows"] == n}
        ours, theirs = by.get("hpkernels", {}), by.get("published", {})
        rows.append([f"{n:,}", _time(ours), _memory(ours), _size(_bits_bytes(ours)), _time(theirs), _memory(theirs)])
    header = ["N", "time", "peak extra memory", "of it bits", "published: time", "peak extra memory"]
    return "How a step at rho 0.02 grows:\n\n" + _table(header, rows)


def _stage_table(results: dict) -> str:
    stages = results.get("stages")
    if not stages:
        return ""
    shape, seconds = stages["shape"], dict(stages["seconds"])
    whole = seconds.pop("step")
    ceiling = _find(results, "product", "torch.mm")
    rows = []
    order = {name: place for place, name in enumerate(STAGE_TITLES)}
    for stage, value in sorted(seconds.items(), key=lambda item: order.get(item[0].split("/")[0], len(order))):
        name, _, width = stage.partition("/")
        flop = _stage_flop(name, int(width or 0), shape)
        rate = flop / value / 1e9
        share = f"{rate / ceiling['gflops']:.0%}" if flop and ceiling else ""
        title = STAGE_TITLES.get(name, name) + (f", width {width}" if width else "")
        rows.append(
            [title, _milliseconds(value), f"{value / whole:.0%}", f"{flop / 1e9:.1f}" if flop else "",
             f"{rate:.0f}" if flop else "", share]
        )  # fmt: skip
    rest = whole - sum(seconds.values())
    rows.append(["everything else", _milliseconds(rest), f"{rest / whole:.0%}", "", "", ""])
    rows.append(["whole step", _milliseconds(whole), "100%", "", "", ""])
    header = ["stage", "ms", "share", "GFLOP", "GFLOP/s", "of torch.mm's rate"]
    return f"Where a step at rho 0.02, N = {shape['rows']:,}, spends its time:\n\n" + _table(header, rows)


def _stage_flop(name: str, width: int, shape: dict) -> float:
    n, rate = shape["rows"], 0.02
    return {
        "max_similarity": 2.0 * n * shape["pool"] * width,
        "pairs_above": 1.0 * n * n * width,
        "contrastive_stats": 4.0 * rate * n * n * shape["code"],
        "contrastive_grad": 8.0 * rate * n * n * shape["code"],
    }.get(name, 0.0)


def _find(results: dict, case: str, contender: str) -> dict | None:
    for r in results["records"]:
        if (r["case"], r["contender"], r["part"]) == (case, contender, "speed") and "p50" in r:
            return r
    return None


def _bits_bytes(record: dict) -> int | None:
    """P, Q and the random columns, packed in rows of whole 128-bit groups."""
    if not record:
        return None
    shape = record["shape"]
    row = 16 * -(-shape["rows"] // 128)
    return (2 * shape["rows"] + shape["grid"][0] * shape["grid"][1]) * row


def _time(record: dict) -> str:
    if "error" in record:
        return record["error"]
    if "p50" not in record:
        return "not run"
    p50, p20, p80 = (_milliseconds(record[key]) for key in ("p50", "p20", "p80"))
    return f"{p50} ms ({p20} - {p80})"


def _milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.3f}"


def _memory(record: dict) -> str:
    return _size(record.get("peak_bytes"))


def _ratio_of_memory(record: dict, ours: dict) -> str:
    if "peak_bytes" not in record or not ours.get("peak_bytes"):
        return _memory(record)
    return f"{_memory(record)} ({record['peak_bytes'] / ours['peak_bytes']:.1f}x)"


def _size(size: int | None) -> str:
    if size is None:
        return ""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def _rate(record: dict) -> str:
    if "gflops" in record:
        return f"{record['gflops']:,.0f} GFLOP/s"
    return f"{record['gbs']:,.1f} GB/s" if "gbs" in record else ""


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)]
    return "\n".join(lines)

"""`python -m benchmarks`: measure, print the tables, write results, plots and the README's tables.

python -m benchmarks                        everything of this device, then plots and README.md (figures to commit)
python -m benchmarks --quick                toy shapes, to see that it runs: nothing outside ./benchmark-quick changes
python -m benchmarks --case topk --case stages_rho_1 --peers hpkernels,torch.topk
python -m benchmarks --marks --device cuda  what the table of marks needs, and the table
python -m benchmarks --list
python -m benchmarks --case kmeans --merge  those rows into the results of the full run, then plots and README.md
python -m benchmarks --readme               plots and README.md's tables from benchmarks/results, measuring nothing
"""

from __future__ import annotations

import argparse
import datetime
import shlex
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import marks, plots, report, results, runner
from benchmarks.plan import CASES, PEERS, STAGES, build_plan, ceilings, names

RESULTS = Path(__file__).resolve().parent / "results"
README = Path(__file__).resolve().parent.parent / "README.md"
TIME_OUT = "no time left in this run"


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if options.list:
        _list()
        return 0
    if options.readme:
        _publish(RESULTS, README)
        return 0

    began = time.monotonic()
    setting = runner.Setting(options.device, options.dtype, options.threads, options.seconds)
    wanted = [(options.case, options.peers)]
    if options.marks:
        wanted = [([case], peers) for case, peers in marks.contest().items()]
    races = [
        race
        for cases, peers in wanted
        for race in build_plan(
            device=options.device, quick=options.quick, cases=cases, peers=peers, images=options.images
        )
    ]
    if not races:
        sys.exit(f"--peers: none of {', '.join(options.peers or ())} is measured in these cases; --list names them")
    earlier = results.load(options.out / f"{options.device}.json") if options.merge else None
    if options.merge and earlier is None:
        sys.exit(f"--merge: expected results of a full run in {options.out}, found none")
    versions = runner.versions(setting)
    head = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": _commit(),
        "command": shlex.join(["python", "-m", "benchmarks", *(sys.argv[1:] if arguments is None else arguments)]),
        "setting": vars(setting) | {"quick": options.quick},
        "versions": versions,
    }
    rows: list[dict] = []
    paths: list[Path] = []
    gates, measured = runner.Gates(setting), results.Ceilings()
    complete = True
    try:
        for race in [*ceilings(races, options.quick), *races]:
            if options.budget and time.monotonic() - began > options.budget:
                found = runner.not_run(race, setting, TIME_OUT)
            else:
                found = runner.run(race, setting, gates, measured, _say)
            for row in found:
                measured.note(row)
                rows.append(row | _provenance(head, row["peer"]))
            if earlier is None:  # after every race: an end by a time limit loses little
                paths = results.write(options.out, head | {"rows": rows})
    except KeyboardInterrupt:
        complete = False
    finally:
        gates.close()
    run = head | {"rows": rows}
    if earlier is not None and complete:
        run = results.merge(earlier, run)
        paths = results.write(options.out, run)
    print(report.render(run))
    if options.device == "cuda":
        print("\n" + marks.render(run))
    written = ", ".join(map(str, paths)) or "nothing, as the run was ended"
    _say(f"wrote {written} after {(time.monotonic() - began) / 60:.0f} minutes")
    if options.out == RESULTS and (options.case is None or options.merge) and options.peers is None and complete:
        _publish(RESULTS, README)
    return 1 if any(row["status"] == results.RED for row in rows) else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the cases and the peers and end")
    parser.add_argument("--case", action="append", choices=names(), help="only this one (repeatable)")
    parser.add_argument("--peers", type=lambda text: text.split(","), help="only these, by commas")
    parser.add_argument("--marks", action="store_true", help="only what benchmarks.marks needs, in its order")
    parser.add_argument("--quick", action="store_true", help="toy shapes, few repetitions: no figures to quote")
    parser.add_argument(
        "--merge", action="store_true", help="put the cases measured in the place of theirs in the results of --out"
    )
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    parser.add_argument("--readme", action="store_true", help="plots and README.md's tables from benchmarks/results")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32, on cuda bfloat16"
    )
    parser.add_argument("--images", type=int, help="images of a step, in cases of one shape")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of every contender")
    parser.add_argument("--seconds", type=float, default=30.0, help="a race ends early after this long")
    parser.add_argument("--budget", type=float, help="no race starts after this many seconds")
    options = parser.parse_args(arguments)
    unknown = set(options.peers or ()) - set(PEERS)
    if unknown:
        parser.error(f"--peers: expected some of {', '.join(PEERS)}, got {', '.join(sorted(unknown))}")
    if options.merge and (options.quick or options.peers or options.images or options.marks):
        parser.error("--merge: expected whole cases, not --quick, --peers, --images or --marks")
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    if options.out is None:
        partial = (options.case and not options.merge) or options.peers or options.images or options.marks
        options.out = (
            Path("benchmark-quick" if options.quick else "benchmark-partial") if options.quick or partial else RESULTS
        )
    return options


def _list() -> None:
    for name in names():
        case = CASES[STAGES.get(name, name)]
        title = f"the stages of: {case.title}" if name in STAGES else case.title
        sizes = [" ".join(f"{s.rows:,}" for s in case.shapes(device, False)) or "none" for device in ("cpu", "cuda")]
        print(f"{name:16} {title}; N on a CPU {sizes[0]}, on a GPU {sizes[1]}")
        if name not in STAGES:
            print(f"{'':16} by {', '.join(case.peers)}")
    print()
    for peer, meaning in PEERS.items():
        print(f"{peer:24} {meaning}")


def _publish(folder: Path, readme: Path) -> None:
    """The plots into the folder and the tables into the README, from the results of full runs in the folder."""
    reason = plots.why_not()
    drawn = [] if reason else plots.draw(folder)
    _say(f"plots: {reason or ', '.join(map(str, drawn))}")
    report.rewrite_readme(readme, folder)


def _provenance(head: dict, peer: str) -> dict:
    v, setting = head["versions"], head["setting"]
    return {
        "hpkernels": v["hpkernels"],
        "torch": v["torch"],
        "triton": v.get("triton"),
        "peer_version": v["peers"].get(peer),
        "python": v["python"],
        "processor": v["gpu"] if setting["device"] == "cuda" else v["cpu"],
        "threads": setting["threads"],
        "commit": head["commit"],
        "date": head["date"],
    }


def _commit() -> str:
    """Short hash of HEAD, "+" appended when files differ from it; "unknown" outside a repository."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, cwd=runner.ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

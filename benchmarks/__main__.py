"""`python -m benchmarks`: measure, print the README's tables, write a results file.

    python -m benchmarks                        everything, about ten minutes on two cores
    python -m benchmarks --quick                small shapes, to see that it runs
    python -m benchmarks --case topk --case stages
    python -m benchmarks --list
    python -m benchmarks --readme               rewrite README.md's tables from benchmarks/results, measuring nothing
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import subprocess
import sys
from pathlib import Path

from benchmarks import report, runner
from benchmarks.plan import PART_CASES, STAGES_CASE, Shape, build_plan

EXTRA_PARTS = {"scaling": "time and memory of a step against N", "stages": "where a step spends its time"}
GATES = {"scaling": STAGES_CASE, "stages": STAGES_CASE}


def main(arguments: list[str] | None = None) -> int:
    options = _parse(arguments)
    if options.list:
        for case, contenders in PART_CASES.items():
            print(f"{case:14} {report.TITLES[case]}: {', '.join(contenders)}")
        for part, title in EXTRA_PARTS.items():
            print(f"{part:14} {title}")
        return 0
    if options.readme:
        report.rewrite_readme()
        return 0

    images = options.images or (4 if options.quick else 8 if options.device == "cpu" else 64)
    setting = runner.Setting(options.device, options.dtype, options.threads, options.seconds)
    cases = options.case or [*PART_CASES, *EXTRA_PARTS]
    results = {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": _commit(),
        "command": shlex.join(["python", "-m", "benchmarks", *(sys.argv[1:] if arguments is None else arguments)]),
        "setting": vars(setting) | {"quick": options.quick},
        "versions": runner.versions(setting),
        "red_gates": {},
        "records": [],
    }
    for case in sorted({GATES.get(case, case) for case in cases}):
        reason = _red_gate(case, options.device)
        if reason:
            results["red_gates"][case] = reason
            _say(f"{case}: not measured, {reason}")

    for race in build_plan(images=images, quick=options.quick, cases=cases):
        if race.case not in results["red_gates"]:
            results["records"] += runner.run_race(race, setting, _say)
    if "stages" in cases and STAGES_CASE not in results["red_gates"]:
        shape = Shape(images, (14, 14) if options.quick else (28, 28))
        results["density"] = runner.density(shape, setting)
        results["stages"] = runner.run_stages(STAGES_CASE, shape, setting, 5)

    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"{options.device}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(report.render(results))
    _say(f"wrote {path}")
    return 1 if results["red_gates"] else 0


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="print the cases and end")
    parser.add_argument("--case", action="append", choices=[*PART_CASES, *EXTRA_PARTS], help="only this one (repeatable)")
    parser.add_argument("--quick", action="store_true", help="small shapes, few repetitions: no figures to quote")
    parser.add_argument("--out", type=Path, help="folder of the results file (default: benchmarks/results)")
    parser.add_argument("--readme", action="store_true", help="rewrite README.md's tables from benchmarks/results and end")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32, on cuda bfloat16")
    parser.add_argument("--images", type=int, help="images a step (default: 8, on cuda 64)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of every contender")
    parser.add_argument("--seconds", type=float, default=60.0, help="a race ends early after this long")
    options = parser.parse_args(arguments)
    options.dtype = options.dtype or ("float32" if options.device == "cpu" else "bfloat16")
    if options.out is None:
        options.out = Path("benchmark-quick") if options.quick else report.RESULTS
    return options


def _red_gate(case: str, device: str) -> str | None:
    """Why the case's contenders may not be measured, or None."""
    if case not in PART_CASES or case in report.CEILINGS:
        return None
    command = runner.command("benchmarks.checks", case, device)
    done = subprocess.run(command, cwd=runner.ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"its correctness gate ended with status {done.returncode}"


def _commit() -> str:
    """Short hash of HEAD, "+" appended when files differ from it; "unknown" outside a repository."""
    command = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, cwd=runner.ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

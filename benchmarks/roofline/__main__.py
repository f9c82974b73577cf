"""Predicted times of the GPU kernels, stage by stage, without a GPU: see README.md.

python -m benchmarks.roofline [--gpu h200] [--kernels]
python -m benchmarks.roofline --write [--accept]     benchmarks/results/roofline.json anew
python -m benchmarks.roofline --check                whether that is of the kernels as they are
"""

from __future__ import annotations

import argparse
import json
import sys

from benchmarks.roofline import table


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", choices=table.GPUS, default="h200")
    parser.add_argument("--kernels", action="store_true", help="also each kernel: registers, loops, what a block costs")
    parser.add_argument("--write", action="store_true", help="write the results file; refused where a stage has grown")
    parser.add_argument("--accept", action="store_true", help="with --write: what has grown is the new bound")
    parser.add_argument("--check", action="store_true", help="compare the results file with the kernels; compile few")
    parser.add_argument("--unions", action="store_true", help="count what notes.UNIONS holds, from the inputs")
    arguments = parser.parse_args()
    if arguments.unions:
        from benchmarks.roofline.unions import count

        print(count())
        return 0
    if arguments.check:
        wrong = table.check(arguments.gpu)
        print(*wrong, sep="\n")
        return int(bool(wrong))
    made = table.make(arguments.gpu)
    print(*table.lines(made), sep="\n")
    if arguments.kernels:
        print(*table.kernel_lines(made), sep="\n")
    if arguments.write:
        before = json.loads(table.RESULTS.read_text()) if table.RESULTS.exists() else {}
        grown = table.grown(made.milliseconds(), before.get(arguments.gpu, {}).get("bounds_ms", {}))
        if grown and not arguments.accept:
            print("not written, these have grown (--accept takes them):", *grown, sep="\n  ")
            return 1
        table.RESULTS.write_text(table.as_json(made, before, arguments.accept))
    return 0


if __name__ == "__main__":
    sys.exit(main())

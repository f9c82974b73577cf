"""`hpseg export RUN --out FILE`: for torch alone, or for the published code of Hidden Positives."""

from __future__ import annotations

import argparse

from hpseg.run.errors import UsageError

OF_PROGRAMS = ("input", "output", "size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("run", help="folder made by `hpseg train`")
    add("--out", required=True, help="file to write, ending in .pt2 for a program")
    add("--format", default="pt2", choices=("pt2", "hp"), help="torch.export program (default) or released checkpoint")
    add("--input", choices=("float", "uint8"), help="of a program: pictures in [0, 1] (default) or as bytes")
    add("--output", choices=("similarities", "labels"), help="of a program: of patches (default), or of pixels")
    add("--size", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="of a program, in pixels (default: free)")
    add("--overwrite", action="store_true", help="replace a file of this name")


def run(args: argparse.Namespace) -> None:
    given = {name: getattr(args, name) for name in OF_PROGRAMS if getattr(args, name) is not None}
    if args.format == "hp":
        from hpseg.interop.released_checkpoints import export_hp

        if given:
            raise UsageError(f"{next(iter(given))}: goes with --format pt2, got {next(iter(given.values()))!r}")
        facts = export_hp(args.run, args.out, overwrite=args.overwrite)
        note = (
            "" if facts["linear"] else "; no linear probe, which the published evaluation asks for (run `hpseg probe`)"
        )
        print(f"{args.out}: {facts['tensors']} tensors of the network{note}")
        return
    from hpseg.interop.torch_export import export

    facts = export(args.run, args.out, overwrite=args.overwrite, **given)
    height, width = facts["input"]["shape"][2:]
    print(f"{args.out}: {facts['input']['dtype']} (1, 3, {height}, {width}) to {facts['output']}, agrees with the run")

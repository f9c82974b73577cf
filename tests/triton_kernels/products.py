"""Which shipped launches hand `tl.dot` a tile that is narrower than 16 along some axis; nothing is compiled.

    python -m tests.triton_kernels.products

Triton before 3.8 refuses a product of fewer than 16 channels, and matrix units work on 16 x 16 or more of the others.
Every tile size (BLOCK_*) of a kernel that multiplies counts as an axis of its products. Needs a process without
TRITON_INTERPRET, as aot.py does.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

from triton.runtime.jit import JITFunction

from tests.triton_kernels import aot

SMALLEST = 16


def multiplies(kernel: JITFunction) -> bool:
    """Whether the kernel, or a function that it calls, has a tl.dot."""
    names, reached = kernel.fn.__code__.co_names, kernel.__globals__
    return "dot" in names or any(multiplies(f) for f in map(reached.get, names) if isinstance(f, JITFunction))


def launches(arch: str) -> Iterator[tuple[JITFunction, str]]:
    """Every kernel shipped for `arch`, with each of its launches by name."""
    kernels = {}
    with aot.Recorder(arch, compile=False) as recorder:
        record = JITFunction.run

        def run(kernel, *args, **kwargs):
            kernels[kernel.__name__] = kernel
            return record(kernel, *args, **kwargs)

        JITFunction.run = run  # the recorder puts back what was there before it
        for _, call in aot.cases():
            call()
    for name in recorder.launches:
        yield kernels[name.split()[0]], name


def main() -> int:
    products = {(arch, name) for arch in aot.TARGETS for kernel, name in launches(arch) if multiplies(kernel)}
    wrong = [
        f"{arch} {name}" for arch, name in products if min(map(int, re.findall(r" BLOCK_\w+=(\d+)", name))) < SMALLEST
    ]
    print(f"{len(products)} launches multiply; narrower than {SMALLEST}:", *sorted(wrong), sep="\n")
    return int(bool(wrong) or not products)


if __name__ == "__main__":
    sys.exit(main())

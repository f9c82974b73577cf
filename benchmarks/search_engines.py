"""Time of the CPU search ops by instruction set and screening engine: `python -m benchmarks.search_engines`.

One thread, CPU time (so that a busy machine disturbs little), the minimum of several calls, contenders interleaved. The
data are those of the other benchmarks: 8 images of 28 x 28 patches, C = 384 and D = 512, pools of 2,048.
"""

import time

import torch

from benchmarks.features import make_batch
from hpkernels import _cpu
from hpkernels.ops.similarity_search import cpu as native

REPEATS = 7
ENGINES = [
    ("avx2", "automatic"),
    ("avx512", "automatic"),
    ("avx512_bf16", "bf16"),
    ("avx512_bf16", "int8"),
    ("avx512_bf16", "automatic"),
]


def cpu_milliseconds(function) -> float:
    start = time.thread_time()
    function()
    return 1e3 * (time.thread_time() - start)


def contenders(batch):
    """{name: {column: function}}: the searches of one step, and a top-k search, for torch and every engine here."""
    sets = [(batch.features, batch.pool), (batch.head_features, batch.head_pool)]
    thresholds = [native.max_similarity(x, pool) for x, pool in sets]

    def by_engine(isa, screen, function):
        def call():
            _cpu.set_isa(isa)
            _cpu.set_search_screen(screen)
            function()

        return call

    def multiply(x):  # half of the products, as dense blocks: what the upper triangle has
        torch.mm(x, x[: len(x) // 2].T)

    (f, f_pool), (g, g_pool) = sets
    result = {
        "torch": {
            "max 384": lambda: torch.mm(f, f_pool.T),
            "max 512": lambda: torch.mm(g, g_pool.T),
            "pairs 384": lambda: multiply(f),
            "pairs 512": lambda: multiply(g),
            "top-16 384": lambda: torch.topk(f @ f.T, 16),
        }
    }
    ops = {
        "max 384": lambda: native.max_similarity(f, f_pool),
        "max 512": lambda: native.max_similarity(g, g_pool),
        "pairs 384": lambda: native.pairs_above(f, thresholds[0], None, None),
        "pairs 512": lambda: native.pairs_above(g, thresholds[1], None, None),
        "top-16 384": lambda: native.topk_similarity(f, f, 16, True, None, None),
    }
    for isa, screen in ENGINES:
        if isa in _cpu.isas():
            result[f"{isa}, {screen}"] = {column: by_engine(isa, screen, function) for column, function in ops.items()}
    return result


def main() -> None:
    torch.set_num_threads(1)
    rows = contenders(make_batch(8, density=0.006))
    best = {(name, column): float("inf") for name, calls in rows.items() for column in calls}
    for _ in range(REPEATS):
        for name, calls in rows.items():
            for column, function in calls.items():
                best[name, column] = min(best[name, column], cpu_milliseconds(function))
    columns = list(rows["torch"])
    print("| ms | " + " | ".join(columns) + " | search step |")
    print("|---" * (len(columns) + 2) + "|")
    for name in rows:
        step = sum(best[name, column] for column in columns[:4])
        print(f"| {name} | " + " | ".join(f"{best[name, column]:.1f}" for column in columns) + f" | {step:.1f} |")


if __name__ == "__main__":
    main()

"""The registry of cases and peers: what is measured, at which sizes on which device, by whom. Imports no torch.

A case is a kind of work (benchmarks/cases.py has the code of each) at one or several shapes. On a GPU the shapes are
those of training; on a CPU the same work with fewer images (`cpu` beside `cuda` below), and with `--quick` a toy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

NEIGHBOURS = 16  # k of top-k
SCALES, GROUPS = (8, 16, 32), 16  # of neighbor_density: numbers of neighbours, classes
CLUSTERS, ITERATIONS = 100, 10  # of k-means: centroids, passes that move them
QUICK_POOL = 256  # rows of the pools of a quick run
STREAMS = 2  # z and z_local
COPY_NUMBERS = 1 << 26  # of the copy that gives the ceiling of byte rates
PRODUCT_ROWS = 16384  # at most, of the square product that gives the ceiling of arithmetic rates


@dataclass(frozen=True)
class Shape:
    """Sizes of one training step: N = images * T patches, features of width C, codes of width D."""

    images: int
    grid: tuple[int, int] = (28, 28)
    channels: int = 384
    code: int = 512
    pool: int = 2048
    heads: int = 6
    rate: float = 0.02  # rho
    density: float = 0.002  # of P and Q

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def rows(self) -> int:
        return self.images * self.tokens

    @classmethod
    def from_dict(cls, fields: dict) -> Shape:
        return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})


OURS = ("hpkernels",)
BACKENDS = ("hpkernels-triton", "hpkernels-cuda")  # one backend asked for by name; a GPU has two to compare
PEERS = {
    "hpkernels": "the library as called by a user, backend chosen by itself",
    "hpkernels-triton": "the same with backend='triton'",
    "hpkernels-cuda": "the same with backend='cuda'",
    "published": "the published algorithm in plain torch, image by image (published.py)",
    "published-compiled": "its image loop body under torch.compile",
    "chunked": "plain torch in linear memory: blocks of rows, each backward at once (plain.py)",
    "chunked-compiled": "its block under torch.compile",
    "torch": "plain torch, whole tables at once",
    "torch-compiled": "the same under torch.compile",
    "torch.mm": "the library products of the job alone, nothing else",
    "torch.topk": "torch.topk(q @ k.T, k)",
    "pytorch-metric-learning": "losses.SupConLoss",
    "cut-cross-entropy": "its log-sum-exp; the positives by class sums",
    "inf-cl": "its log-sum-exp; the positives by class sums",
    "keops": "LazyTensor: its log-sum-exp, or argKmin",
    "faiss": "IndexFlatIP of faiss-cpu",
    "scikit-learn": "KMeans(algorithm='lloyd') from the same start",
    "flash-kmeans": "batch_kmeans_Euclid from the same start, one pass less",
    "fastkmeans": "FastKMeans from the same start, with the way of the rows to the GPU",
    "torch-linear-cross-entropy": "torch.nn.functional.linear_cross_entropy, the keys as weights",
    "siglip-kernel": "fused_siglip_loss: the same products for a sigmoid loss",
}

STEP = (*OURS, *BACKENDS, "published", "chunked")
STEP_COMPILED = (*OURS, *BACKENDS, "published", "published-compiled", "chunked", "chunked-compiled")


@dataclass(frozen=True)
class Case:
    kind: str
    title: str
    peers: tuple[str, ...]
    cpu: tuple[Shape, ...]  # none: only on a GPU
    cuda: tuple[Shape, ...]
    quick: tuple[Shape, ...] = ()
    repetitions: int = 5
    up_to: dict[str, int] = field(default_factory=dict)  # rows beyond which a peer is left out on a CPU, for its time

    def shapes(self, device: str, quick: bool) -> tuple[Shape, ...]:
        return self.quick if quick else self.cuda if device == "cuda" else self.cpu


def _case(
    kind: str, title: str, peers: tuple[str, ...], images: tuple[int, int] = (8, 64), repetitions=5, up_to=None, **sizes
) -> Case:
    """A case at one shape; images on a CPU and on a GPU."""
    cpu, cuda = (Shape(count, **sizes) for count in images)
    quick = replace(cpu, images=2, grid=(cpu.grid[0] // 2, cpu.grid[1] // 2), pool=QUICK_POOL)
    return Case(kind, title, peers, (cpu,), (cuda,), (quick,), repetitions, up_to or {})


CASES: dict[str, Case] = {
    "step_rho_0.02": _case("step", "loss step, rho 0.02", STEP_COMPILED),
    "step_rho_1": _case("step", "loss step, rho 1", STEP_COMPILED, rate=1.0),
    "search": _case("search", "its two searches alone", (*OURS, *BACKENDS, "torch.mm", "chunked"), repetitions=9),
    "topk": _case(
        "topk", f"topk_similarity, k {NEIGHBOURS}",
        (*OURS, *BACKENDS, "torch.mm", "torch.topk", "chunked", "faiss", "keops"), up_to={"keops": 1568},
    ),
    "local_mix": _case("local_mix", "local_mix, forward + backward", (*OURS, *BACKENDS, "published", "torch")),
    "local_mix_qk": _case("local_mix_qk", "the same from queries and keys", (*OURS, *BACKENDS, "published", "torch")),
    "scaling_n": Case(
        "step", "loss step, rho 0.02, against N", (*OURS, *BACKENDS, "published", "chunked"),
        cpu=tuple(Shape(b) for b in (2, 4, 8, 16, 32, 64, 128)),
        cuda=tuple(Shape(b) for b in (4, 8, 16, 32, 64, 128, 256)),
        quick=tuple(Shape(b, (14, 14), pool=QUICK_POOL) for b in (1, 2, 4)),
        repetitions=3,
        up_to={"published": 12544, "chunked": 12544},
    ),
    "supcon": _case(
        "supcon", "supervised contrastive loss, forward + backward",
        (*OURS, *BACKENDS, "torch", "torch-compiled", "chunked", "chunked-compiled", "pytorch-metric-learning",
         "cut-cross-entropy", "inf-cl", "keops"), (2, 64),
    ),
    "supcon_16k": Case(
        "supcon", "supervised contrastive loss, N 16,384, D 128",
        (*OURS, *BACKENDS, "chunked", "pytorch-metric-learning"),
        cpu=(Shape(16, (32, 32), code=128),), cuda=(Shape(16, (32, 32), code=128),),
        quick=(Shape(1, (14, 14), code=128, pool=QUICK_POOL),), repetitions=3,
    ),
    "supcon_64k": Case(
        "supcon", "supervised contrastive loss, N 65,536, D 128", (*OURS, *BACKENDS, "chunked"),
        cpu=(Shape(64, (32, 32), code=128),), cuda=(Shape(64, (32, 32), code=128),),
        quick=(Shape(2, (14, 14), code=128, pool=QUICK_POOL),), repetitions=3, up_to={"chunked": 16384},
    ),
    "infonce": Case(  # most of its peers need a GPU
        "infonce", "InfoNCE, one positive a row, gradients of both sides",
        (*OURS, *BACKENDS, "torch", "torch-linear-cross-entropy", "cut-cross-entropy", "inf-cl", "siglip-kernel"),
        cpu=(), cuda=(Shape(64),), quick=(Shape(2, (14, 14), pool=QUICK_POOL),),
    ),
    "density": Case(
        "density", f"neighbor_density, {GROUPS} classes, memory of 10,000", (*OURS, *BACKENDS, "torch.topk", "chunked"),
        cpu=(Shape(16, (25, 32), channels=256, pool=10000),), cuda=(Shape(16, (25, 32), channels=256, pool=10000),),
        quick=(Shape(1, (14, 14), channels=256, pool=1000),), repetitions=9,
    ),
    "density_banks": Case(
        "density", f"neighbor_density, {GROUPS} classes, memory of 10,000 each", (*OURS, *BACKENDS, "chunked"),
        cpu=(Shape(16, (25, 32), channels=256, pool=160000),), cuda=(Shape(16, (25, 32), channels=256, pool=160000),),
        quick=(Shape(1, (14, 14), channels=256, pool=2000),),
    ),
    "kmeans": _case(
        "kmeans", f"k-means, K {CLUSTERS}, {ITERATIONS} iterations",
        (*OURS, *BACKENDS, "chunked", "scikit-learn", "flash-kmeans", "fastkmeans"),
        (64, 256), repetitions=9,
    ),
    "step_s16": _case("step", "loss step, ViT-S/16 (T 196)", STEP, (32, 64), grid=(14, 14)),
    "step_b8": _case("step", "loss step, ViT-B/8 (C 768)", STEP, channels=768),
    "step_dinov2": _case("step", "loss step, DINOv2's grid (T 1,024)", STEP, (6, 64), grid=(32, 32)),
    "step_p0.1": _case("step", "loss step, 0.1 % positives", (*OURS, *BACKENDS, "chunked"), density=0.001),
    "step_p0.3": _case("step", "loss step, 0.3 % positives", (*OURS, *BACKENDS, "chunked"), density=0.003),
    "step_p1": _case("step", "loss step, 1 % positives", (*OURS, *BACKENDS, "chunked"), density=0.01),
    "scaling_d": Case(
        "step", "loss step, rho 1, against D", (*OURS, *BACKENDS, "chunked"),
        cpu=tuple(Shape(4, code=d, rate=1.0) for d in (64, 128, 256, 512, 1024)),
        cuda=tuple(Shape(32, code=d, rate=1.0) for d in (64, 128, 256, 512, 1024)),
        quick=tuple(Shape(1, (14, 14), code=d, pool=QUICK_POOL, rate=1.0) for d in (64, 1024)),
    ),
}  # fmt: skip
QUICK = (
    "step_rho_0.02",
    "step_rho_1",
    "search",
    "topk",
    "local_mix",
    "local_mix_qk",
    "supcon",
    "infonce",
    "density",
    "kmeans",
    "scaling_n",
)
STAGES = {  # where one call of ours spends its time, and the case it takes apart
    "stages_rho_0.02": "step_rho_0.02",
    "stages_rho_1": "step_rho_1",
}
CEILING_TITLES = {"product": "one library product", "copy": f"one copy of 2^{COPY_NUMBERS.bit_length() - 1} numbers"}
HEAD_CHANNELS = 64  # of an attention head
INNER: dict[str, Callable[[Shape], tuple[int, ...]]] = {  # inner dimensions of a kind's products
    "step": lambda shape: (shape.channels, shape.code),
    "stages": lambda shape: (shape.channels, shape.code),
    "search": lambda shape: (shape.channels, shape.code),
    "topk": lambda shape: (shape.channels,),
    "supcon": lambda shape: (shape.code,),
    "infonce": lambda shape: (shape.code,),
    "density": lambda shape: (shape.channels,),
    "kmeans": lambda shape: (shape.channels,),
    "local_mix_qk": lambda shape: (HEAD_CHANNELS,),
}


@dataclass(frozen=True)
class Race:
    """One case at one shape: the peers take turns, repetition by repetition."""

    case: str
    kind: str
    peers: tuple[str, ...]
    shape: Shape
    repetitions: int
    memory: bool = True
    left_out: tuple[str, ...] = ()  # peers that would take minutes a repetition at this size


def names() -> list[str]:
    """What `--case` takes, in the order of a run: what the marks need comes first, should time run out."""
    by_step = {step: stages for stages, step in STAGES.items()}
    return [name for case in CASES for name in (case, by_step.get(case)) if name]


def build_plan(
    *,
    device: str,
    quick: bool = False,
    cases: list[str] | None = None,
    peers: list[str] | None = None,
    images: int | None = None,
) -> list[Race]:
    """The races of a run; one of kind "stages" has the library alone. `images` replaces that of one-shape cases.

    Without `cases` all; with `quick` those of QUICK, which have one of every kind.
    """
    races = []
    for name in names():
        if name not in (cases or ((*QUICK, *STAGES) if quick else names())):
            continue
        case = CASES[STAGES.get(name, name)]
        shapes = case.shapes(device, quick)
        for shape in shapes:
            if images and len(shapes) == 1:
                shape = replace(shape, images=images)
            if any((race.kind, race.shape) == (case.kind, shape) for race in races if name not in STAGES):
                continue  # a scaling shape that is measured already; plots and tables find it by its sizes
            wanted = OURS + BACKENDS if name in STAGES else case.peers
            chosen = tuple(p for p in wanted if _wanted(p, device, quick, peers))
            late = tuple(
                p for p in chosen if not peers and device == "cpu" and shape.rows > case.up_to.get(p, shape.rows)
            )
            chosen = tuple(p for p in chosen if p not in late)
            if chosen:
                kind = "stages" if name in STAGES else case.kind
                repetitions = 2 if quick else case.repetitions
                races.append(Race(name, kind, chosen, shape, repetitions, memory=not (quick and races), left_out=late))
    return races


def ceilings(races: list[Race], quick: bool) -> list[Race]:
    """The copy, and a product at every inner dimension of the races: what the machine gives."""
    repetitions = 2 if quick else 5
    steps = (race for race in races if race.kind in ("step", "search") and not race.case.startswith("scaling"))
    rows = max((race.shape.rows for race in steps), default=6272)
    widths = sorted({k for race in races for k in INNER.get(race.kind, lambda shape: ())(race.shape)})
    shapes = [Shape(1, (1, min(rows, PRODUCT_ROWS)), channels=k) for k in widths]
    products = [Race("product", "product", ("torch.mm",), shape, repetitions, memory=False) for shape in shapes]
    return [Race("copy", "copy", ("torch",), Shape(1), repetitions, memory=False), *products]


def _wanted(peer: str, device: str, quick: bool, peers: list[str] | None) -> bool:
    if peers is not None:
        return peer in peers
    if quick and (peer.endswith("-compiled") or peer == "keops"):
        return False  # their compilers take longer than all the rest
    return device != "cpu" or peer not in BACKENDS

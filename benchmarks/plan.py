"""What `python -m benchmarks` runs: shapes, repetitions and the parts of the report. Imports no torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Shape:
    """Sizes of one training step."""

    images: int
    grid: tuple[int, int] = (28, 28)
    channels: int = 384
    code: int = 512
    pool: int = 2048
    heads: int = 6

    @property
    def tokens(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def rows(self) -> int:
        return self.images * self.tokens

    def as_dict(self) -> dict:
        return asdict(self) | {"rows": self.rows}


@dataclass(frozen=True)
class Race:
    """One case at one shape: the contenders take turns, repetition by repetition."""

    case: str
    contenders: tuple[str, ...]
    shape: Shape
    repetitions: int
    part: str = "speed"  # "speed" or "scaling": the table it belongs to
    memory: bool = True


PART_CASES = {
    "step_rho_0.02": ("hpkernels", "published"),
    "step_rho_1": ("hpkernels", "published"),
    "search": ("hpkernels", "torch.mm"),
    "local_mix": ("hpkernels", "published"),
    "topk": ("hpkernels", "torch.topk"),
    "product": ("torch.mm",),
    "copy": ("torch",),
}
CEILINGS = ("product", "copy")
SCALING_CASE = "step_rho_0.02"
STAGES_CASE = "step_rho_0.02"
# The published step keeps four N x N tables: at 32 images over 10 GB and minutes a repetition, so it stops at 16.
SCALING_IMAGES = {"hpkernels": (2, 4, 8, 16, 32), "published": (2, 4, 8, 16)}


def build_plan(*, images: int, quick: bool, cases: list[str] | None) -> list[Race]:
    """The races of a run. `cases` picks from PART_CASES, "scaling" and "stages"; None takes all."""
    grid = (14, 14) if quick else (28, 28)
    shape = Shape(images, grid)
    races = []
    for case, contenders in PART_CASES.items():
        if cases is None or case in cases:
            repetitions = 3 if quick else 5 if "published" in contenders else 9
            races.append(Race(case, contenders, shape, repetitions, memory=case not in CEILINGS))
    done = {(race.case, race.shape) for race in races}
    if cases is None or "scaling" in cases:
        for count in SCALING_IMAGES["hpkernels"][: 3 if quick else None]:
            scaled = Shape(max(1, count * images // 8), grid)
            contenders = tuple(name for name, counts in SCALING_IMAGES.items() if count in counts)
            if (SCALING_CASE, scaled) not in done:  # the table takes the figures of the speed part for that shape
                races.append(Race(SCALING_CASE, contenders, scaled, 3, part="scaling"))
    return races

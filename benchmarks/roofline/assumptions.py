"""Every number about a GPU that the model uses, in one place. README.md says where each is from."""

from __future__ import annotations

from dataclasses import dataclass, field

# Clocks that an instruction of a warp keeps its pipe in one of the four parts of a processor.
INTERVALS = dict(fma=1, imad=2, alu=2, xu=8, uniform=1, fp64=2)
# Clocks until its result can be used.
LATENCIES = dict(
    fma=4, imad=5, alu=5, xu=20, uniform=8, fp64=16, constant=30, shared=30, shuffle=24, barrier=20, branch=12,
    matrix=60, l2=280, hbm=700,
)  # fmt: skip


@dataclass(frozen=True)
class Gpu:
    target: str  # of tests/triton_kernels/aot.py
    family: str  # of the tuning tables
    clock: float  # Hz
    processors: int
    matrix: float  # bf16 operations a second that a large library product reaches
    hbm: float  # bytes a second that a copy reaches, read and written
    l2: float  # bytes a second from the second-level cache to all processors
    l2_clock: int  # bytes a clock from there to one
    registers: int  # 32-bit, of a processor
    shared_bytes: int  # of shared memory, of a processor
    shared_reserved: int  # of it, kept by the driver for each block
    threads: int  # of a processor
    blocks: int  # of a processor
    shared_clock: int  # bytes a clock of shared memory and the first-level cache
    host_launch: float  # s of the host for a Triton launch
    host_call: float  # s of the host for a torch call
    launch: float  # s of the device that a kernel takes beyond its work: start, drain, gap to the next
    block_start: float  # clocks from a block's end until the next in its place runs
    matrix_clock: int = 4096  # bf16 operations a clock and processor, by the datasheet
    intervals: dict[str, float] = field(default_factory=lambda: dict(INTERVALS))
    latencies: dict[str, float] = field(default_factory=lambda: dict(LATENCIES))
    queue: float = 32  # clocks of work that a memory pipe takes on before it holds up its warps

    @property
    def matrix_share(self) -> float:
        """Of the datasheet's rate that a large product reaches (power lowers the clock)."""
        return self.matrix / (self.matrix_clock * self.processors * self.clock)


GPUS = {
    "h200": Gpu(
        target="90", family="hopper", clock=1.9e9, processors=132, matrix=790e12, hbm=4.3e12, l2=6.9e12, l2_clock=64,
        registers=65536, shared_bytes=228 << 10, shared_reserved=1024, threads=2048, blocks=32, shared_clock=128,
        host_launch=25e-6, host_call=12e-6, launch=2.5e-6, block_start=300,
    ),
}  # fmt: skip

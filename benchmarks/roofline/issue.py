"""How long straight code keeps a block: one warp stands for all of its block, pipes are busy for all of them.

Instructions go out in order, each when its operands are there and its pipe is free. Copies to shared memory and matrix
products run on beside, until the code waits for them. What is left out: bank conflicts, the second warp's head start.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field

from benchmarks.roofline.assumptions import Gpu
from benchmarks.roofline.sass import Instruction

PIPES = ("issue", "fma", "alu", "xu", "shared", "l2", "matrix")
_FMA = {"FADD", "FMUL", "FFMA", "HADD2", "HMUL2", "HFMA2", "FSEL32I"}
_XU = {"MUFU", "POPC", "FLO", "BREV", "F2I", "I2F", "F2F", "FRND", "I2FP.F64"}
_CONSTANT = {"LDC", "S2R", "S2UR", "ULDC", "CS2R"}
_SHARED = {"LDS", "LDSM", "STS", "STSM", "ATOMS"}
_GLOBAL = {"LDG", "STG", "LD", "ST", "LDL", "STL", "RED", "ATOMG", "ATOM", "LDGSTS"}
_COPY = {"UTMALDG", "UTMASTG", "UBLKCP"}
_MATRIX = {"HGMMA", "QGMMA", "IGMMA", "HMMA", "IMMA"}


@dataclass
class Cost:
    """Of one block, in clocks of one processor."""

    time: float = 0.0  # when it is alone
    busy: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PIPES, 0.0))

    def plus(self, other: Cost, times: float = 1.0) -> Cost:
        busy = {pipe: clocks + times * other.busy[pipe] for pipe, clocks in self.busy.items()}
        return Cost(self.time + times * other.time, busy)


@dataclass(frozen=True)
class Setting:
    """What code alone does not say about a turn of it."""

    warps: int  # of the block
    latency: float  # clocks of a load from memory
    repeats: bool = True  # a loop that has been running for some turns; else once
    fills: bool = False  # its copies are the first ones of a loop within, whose last turns make none: counted there
    ahead: int = 1  # turns by which bulk copies run ahead of their use
    reuse: float = 1.0  # lanes that share a word of a plain load
    copy_bytes: float = 0.0  # of a bulk copy (TMA)


def cost(body: list[Instruction], gpu: Gpu, setting: Setting) -> Cost:
    """Of a turn of this code."""
    run = _Run(gpu, setting)
    turns = 4 + setting.ahead if setting.repeats else 1
    before = Cost()
    for turn in range(turns):
        if turn == turns - 1:
            before = Cost(run.now, dict(run.busy))
        run.bulk.append([])
        for instruction in body:
            run.issue(instruction)
        if setting.repeats:
            run.now += gpu.latencies["branch"]
    if not setting.repeats:
        run.now = max([run.now, *run.ready.values()])
    return Cost(run.now, run.busy).plus(before, -1.0)


class _Run:
    def __init__(self, gpu: Gpu, setting: Setting) -> None:
        self.gpu, self.setting = gpu, setting
        self.warps, self.each = setting.warps, max(1.0, setting.warps / 4)  # of a block, of its fullest scheduler
        self.share = self.warps / 4 / self.each  # of the four schedulers: blocks of one warp use one
        self.now = 0.0
        self.free = dict.fromkeys(PIPES, 0.0)
        self.busy = dict.fromkeys(PIPES, 0.0)
        self.ready: dict[str, float] = {}
        self.copies: list[float] = []  # ends of those not yet in a group
        self.groups: deque[float] = deque()
        self.products: list[float] = []
        self.product_groups: deque[float] = deque()
        self.bulk: list[list[float]] = []  # ends of bulk copies, by turn

    def use(self, pipe: str, clocks: float, queue: float = 0.0, share: float = 1.0) -> float:
        """When the pipe is done with it; the warp goes on once fewer than `queue` clocks of work wait.

        share: of the processor's pipes of this kind that are kept busy.
        """
        self.now = max(self.now, self.free[pipe] - queue)
        self.free[pipe] = max(self.now, self.free[pipe]) + clocks
        self.busy[pipe] += clocks * share
        return self.free[pipe]

    def issue(self, instruction: Instruction) -> None:
        gpu, name = self.gpu, instruction.name
        self.now = max([self.now, *(self.ready.get(register, 0.0) for register in instruction.sources)])
        start = self.now
        done = self.memory(instruction) if name in _SHARED | _GLOBAL | _COPY else None
        if done is None:
            if name in _MATRIX:
                done = self.matrix(instruction)
            elif name == "SHFL":
                done = self.use("shared", float(self.warps), gpu.queue) + gpu.latencies["shuffle"]
            elif name in _CONSTANT:
                done = self.now + gpu.latencies["constant" if name != "CS2R" else "alu"]
            elif not self.waits(instruction):
                pipe = self.arithmetic(instruction)
                clocks = gpu.intervals[pipe] * self.each
                place = "fma" if pipe in ("fma", "imad", "fp64") else pipe
                done = (
                    self.use(place, clocks, share=self.share) - clocks if place in self.free else self.now
                ) + gpu.latencies[pipe]
        self.busy["issue"] += self.each * self.share
        self.now = max(self.now, start) + self.each
        for register in instruction.results:
            self.ready[register] = done or self.now

    def arithmetic(self, instruction: Instruction) -> str:
        name = instruction.name
        if name in _FMA:
            return "fma"
        if name.startswith("IMAD"):
            return "imad"
        if name in _XU:
            return "xu"
        if name in ("DADD", "DMUL", "DFMA"):
            return "fp64"
        return "uniform" if name.startswith("U") or name in ("R2UR", "BRA", "EXIT", "NOP") else "alu"

    def memory(self, instruction: Instruction) -> float:
        gpu, name = self.gpu, instruction.name
        if name in _COPY:
            size = 0.0 if self.setting.fills else self.setting.copy_bytes
            self.use("shared", size / gpu.shared_clock, 1e9)
            end = self.from_l2(size) + self.setting.latency
            if name == "UTMALDG":
                self.bulk[-1].append(end)
            return end
        size = 0.0 if name == "LDGSTS" and self.setting.fills else instruction.lane_bytes * 32.0 * self.warps
        end = self.use("shared", max(size / gpu.shared_clock, float(self.warps)), gpu.queue * self.warps)
        if name in _SHARED:
            return end + gpu.latencies["shared"]
        shared_word = name == "LDG" and instruction.lane_bytes < 16
        end = self.from_l2(size / self.setting.reuse if shared_word else size) + self.setting.latency
        if name == "LDGSTS":
            self.copies.append(end)
        return end

    def from_l2(self, size: float) -> float:
        return self.use("l2", size / self.gpu.l2_clock, 4 * self.setting.latency)

    def matrix(self, instruction: Instruction) -> float:
        gpu, (rows, columns, _) = self.gpu, instruction.shape
        if instruction.name in ("HMMA", "IMMA"):  # the older form: a warp's own, at less than two thirds of the rate
            clocks = self.warps * 2 * rows * columns * instruction.shape[2] / (0.62 * gpu.matrix_clock)
            return self.use("matrix", clocks, clocks) + 2 * gpu.latencies["alu"]
        groups = self.warps / 4
        clocks = groups * columns / 2 / gpu.matrix_share
        size = 32 * columns + (0 if re.match(r"R\d+, R\d+", instruction.operands) else 32 * rows)
        self.use("shared", groups * size / gpu.shared_clock, 1e9)
        end = max(self.use("matrix", clocks, 1e9), self.free["shared"]) + gpu.latencies["matrix"]
        self.products.append(end)
        if "gsb0" in instruction.operands:
            self.product_groups.append(max(self.products))
            self.products = []
        return self.now

    def waits(self, instruction: Instruction) -> bool:
        """Whether it is an instruction that waits, or arranges that others can."""
        name, operands = instruction.name, instruction.operands
        if name == "LDGDEPBAR":
            self.groups.append(max(self.copies, default=self.now))
            self.copies = []
        elif name == "DEPBAR" and self.groups:
            self.drain(self.groups, operands)
        elif instruction.op.startswith("WARPGROUP.DEPBAR"):
            self.drain(self.product_groups, operands)
        elif instruction.op.startswith("SYNCS.PHASECHK"):
            self.now = max([self.now, *(end for copies in self.bulk[: -self.setting.ahead] for end in copies)])
        elif name in ("BAR", "MEMBAR", "FENCE"):
            self.now += self.gpu.latencies["barrier"] if name == "BAR" else 0.0
        else:
            return name in ("WARPGROUP", "DEPBAR", "SYNCS")
        return True

    def drain(self, groups: deque[float], operands: str) -> None:
        """Wait until no more groups are under way than the last operand says."""
        left = int(operands.split(",")[-1].strip(), 16)
        while len(groups) > left:
            self.now = max(self.now, groups.popleft())

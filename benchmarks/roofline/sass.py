"""A compiled kernel read back: its machine code as loops within loops, each with the instructions of its own level.

`nvdisasm` comes with Triton. Loops are those of the flow graph (an edge back to a block that dominates it). Where code
branches, the longer side is taken as what runs: an `if` counts as entered. Only long pieces within a loop that a branch
may skip are told apart, as the last turn of a loop over tiles and steps.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\d+|!?U?PT)\s+)?([A-Z][A-Za-z0-9_.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.L_x_\d+):")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")
_REGISTER = re.compile(r"\b(UR|R|UP|P)(\d+)(\.64)?\b")
_MATRIX_SHAPE = re.compile(r"(\d+)x(\d+)x(\d+)")
_WITHOUT_RESULT = ("ST", "RED.", "LDGSTS", "BAR", "BRA", "EXIT", "DEPBAR", "LDGDEPBAR", "WARPGROUP", "MEMBAR", "FENCE")
_WITHOUT_RESULT += ("UTMA", "NOP", "SYNCS.ARRIVE", "BSYNC", "WARPSYNC", "ERRBAR", "CCTL", "YIELD", "NANOSLEEP", "BPT")


@dataclass(frozen=True)
class Instruction:
    op: str  # with its modifiers: LDG.E.128
    operands: str
    results: tuple[str, ...] = ()  # registers: R4, UR7, P0
    sources: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.op.partition(".")[0]

    @property
    def lane_bytes(self) -> int:
        """Bytes that a lane moves."""
        if self.name in ("LDSM", "STSM"):
            return 4 * _matrices(self.op)
        for mark, size in ((".128", 16), (".64", 8), (".U8", 1), (".S8", 1), (".U16", 2), (".S16", 2)):
            if mark in self.op:
                return size
        return 4

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a matrix instruction: rows, columns and depth."""
        if found := _MATRIX_SHAPE.search(self.op):
            return tuple(int(size) for size in found.groups())
        return {"16816": (16, 8, 16), "1688": (16, 8, 8), "1684": (16, 8, 4)}[self.op.split(".")[1]]


@dataclass
class Loop:
    """The instructions that one turn runs itself, in order, and the loops within it, in the order of the code.

    The whole kernel is a Loop of one turn. Within a loop a long piece that a branch may skip is one, too: it does not
    repeat, but has turns of its own, fewer than the loop.
    """

    body: list[Instruction] = field(default_factory=list)
    inner: list[Loop] = field(default_factory=list)
    repeats: bool = True

    @property
    def copies(self) -> bool:
        """Whether it copies to shared memory while it goes on."""
        return any(instruction.name in ("LDGSTS", "UTMALDG") for instruction in self.body)

    def shown(self) -> str:
        """Instructions of a turn (those of the loops within); "?": of a piece that is skipped at times."""
        within = f"({' '.join(loop.shown() for loop in self.inner)})" if self.inner else ""
        return f"{'' if self.repeats else '?'}{len(self.body)}{within}"


def read(cubin: bytes) -> Loop:
    """The loops of the only function of a cubin."""
    return loops(disassembled(cubin))


def disassembled(cubin: bytes) -> str:
    import triton  # here: what is read may come from anywhere

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", str(file)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def loops(text: str) -> Loop:
    blocks, edges = _blocks(text)
    found = _natural_loops(edges, len(blocks))
    return _nest(blocks, edges, frozenset(range(len(blocks))), 0, found)


def parse(line: str) -> tuple[Instruction, bool] | None:
    """An instruction and whether a predicate may keep it from running."""
    if (found := _LINE.search(line)) is None:
        return None
    predicate, op, operands = found.groups()
    parts = [part.strip() for part in operands.split(",")]
    results: list[str] = []
    leading: list[str] = []
    if parts[0] and not op.startswith(_WITHOUT_RESULT):
        leading = parts[:1]
        if len(parts) > 1 and (re.match(r"U?P[\dT]", parts[0]) or re.match(r"U?P[\dT]", parts[1])):
            leading = parts[:2]
        for part in leading:
            if register := _REGISTER.match(part):
                results += _wide(register[1], int(register[2]), _width(op))
    sources = [predicate.lstrip("!")] if predicate else []
    for part in parts[len(leading) :]:
        for kind, number, pair in _REGISTER.findall(part):
            sources += _wide(kind, int(number), 2 if pair else 1)
    return Instruction(op, operands, tuple(results), tuple(sources)), predicate is not None and "PT" not in predicate


def _wide(kind: str, first: int, width: int) -> list[str]:
    return [f"{kind}{first + n}" for n in range(width if kind in ("R", "UR") else 1)]


def _matrices(op: str) -> int:
    """Of 8 x 8, that LDSM and STSM move: LDSM.16.M88.4."""
    last = op.rpartition(".")[2]
    return int(last) if last in ("2", "4") else 1


def _width(op: str) -> int:
    """Registers of a result."""
    name = op.partition(".")[0]
    if name in ("HGMMA", "QGMMA", "IGMMA"):
        return int(_MATRIX_SHAPE.search(op)[2]) // 2
    if name in ("HMMA", "IMMA"):
        return 4
    if name == "LDSM":
        return _matrices(op)
    if name in ("LDG", "LDS", "LDL", "LD", "LDC", "ULDC") and ".128" in op:
        return 4
    return 2 if ".64" in op or ".WIDE" in op or name in ("CS2R", "DADD", "DMUL", "DFMA") else 1


# ------------------------------------------------------------------ the flow graph

Blocks = list[list[Instruction]]
Edges = list[list[int]]
END = -1
LONG = 100  # instructions of a piece that gets turns of its own


def _blocks(text: str) -> tuple[Blocks, Edges]:
    """Straight pieces of code in the order of their addresses, and which may follow which."""
    pieces: list[list[tuple[Instruction, bool]]] = [[]]
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := _LABEL.match(line.strip()):
            if pieces[-1]:
                pieces.append([])
            labels[label[1]] = len(pieces) - 1
        elif parsed := parse(line):
            pieces[-1].append(parsed)
            if parsed[0].name in ("BRA", "EXIT", "RET", "BRX", "BREAK"):
                pieces.append([])
    edges: Edges = []
    for number, piece in enumerate(pieces):
        following = [number + 1] if number + 1 < len(pieces) else []
        if piece and (last := piece[-1][0]).name in ("BRA", "EXIT", "RET"):
            conditional = piece[-1][1] or re.match(r"!?U?P\d", last.operands)
            following = following if conditional else []
            if target := _TARGET.search(last.operands):
                following = [*following, labels[target[1]]]
        edges.append(list(dict.fromkeys(following)))
    return [[instruction for instruction, _ in piece if instruction.name != "NOP"] for piece in pieces], edges


def _natural_loops(edges: Edges, count: int) -> dict[int, frozenset[int]]:
    """Blocks of each loop by its first block."""
    before: Edges = [[] for _ in range(count)]
    for number, following in enumerate(edges):
        for after in following:
            before[after].append(number)
    reached, pending = {0}, [0]
    while pending:
        for after in edges[pending.pop()]:
            if after not in reached:
                reached.add(after)
                pending.append(after)
    dominators = {n: set(reached) for n in reached} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for n in sorted(reached - {0}):
            new = {n} | set.intersection(*(dominators[p] for p in before[n] if p in reached))
            changed, dominators[n] = changed or new != dominators[n], new
    found: dict[int, frozenset[int]] = {}
    for tail in reached:
        for head in edges[tail]:
            if head in dominators[tail]:
                body, pending = {head, tail}, [tail]
                while pending:
                    n = pending.pop()
                    for p in before[n] if n != head else ():
                        if p in reached and p not in body:
                            body.add(p)
                            pending.append(p)
                found[head] = found.get(head, frozenset()) | body
    return found


def _nest(blocks: Blocks, edges: Edges, own: frozenset[int], head: int, found: dict[int, frozenset[int]]) -> Loop:
    """The code of `own`, entered at `head`, as a Loop: a loop within it is one place of its flow."""
    inside = {h: body for h, body in found.items() if body < own}
    outermost = {h: body for h, body in inside.items() if not any(body < other for other in inside.values())}
    waits = {h for h, body in outermost.items() if _is_wait(blocks, body)}
    place = {n: h for h, body in outermost.items() for n in body}
    start = place.get(head, head)
    after: dict[int, set[int]] = {place.get(n, n): set() for n in own}
    for n in own:
        # The way back to the head ends a turn, one out of the loop ends it too, but for all turns.
        after[place.get(n, n)] |= {END if m == head else place.get(m, m) for m in edges[n] if m in own or m == head}
    for n, following in after.items():
        following -= {n}

    def length(n: int) -> int:
        return 0 if n in outermost and n not in waits else sum(len(blocks[m]) for m in outermost.get(n, {n}))

    loops = set(outermost) - waits
    parts = _parts(after, length, loops) if own in found.values() else {}
    hidden = {n for nodes in parts.values() for n in nodes}
    loop = Loop()
    for n in _longest({n: following - hidden for n, following in after.items()}, start, length, loops):
        if n in waits:
            loop.body += [i for m in sorted(outermost[n]) for i in blocks[m] if i.name != "BRA"]
        elif n not in outermost:
            loop.body += blocks[n]
    for h in sorted([h for h in outermost if h not in waits | hidden] + list(parts)):
        if h in parts:
            nodes = frozenset(m for n in parts[h] for m in outermost.get(n, {n}))
            loop.inner.append(replace(_nest(blocks, edges, nodes, h, found), repeats=False))
        else:
            loop.inner.append(_nest(blocks, edges, outermost[h], h, found))
    return loop


def _parts(after: dict[int, set[int]], length: Callable[[int], int], loops: set[int]) -> dict[int, set[int]]:
    """Long pieces of a turn that a branch may skip, without loops, the outermost ones: their places by the first."""
    before: dict[int, set[int]] = {n: {m for m in after if n in after[m]} for n in after}
    found: dict[int, set[int]] = {}
    for n in sorted(after):
        for first, join in itertools.permutations(after[n], 2) if len(after[n]) == 2 else ():
            if first == END:
                continue
            nodes, pending = {first}, [first]
            while pending:
                for m in after[pending.pop()] - nodes - {join, END}:
                    nodes.add(m)
                    pending.append(m)
            alone = n not in nodes and all(before[m] <= nodes | {n} for m in nodes)
            leaves = all(after[m] <= nodes | {join, END} for m in nodes)
            known = any(nodes <= other for other in found.values())
            if alone and leaves and not known and not nodes & loops and sum(map(length, nodes)) >= LONG:
                found[first] = nodes
    return found


def _longest(after: dict[int, set[int]], start: int, length: Callable[[int], int], loops: set[int]) -> list[int]:
    """Places of the longest way from the start; a loop is longer than any code."""
    ways: dict[int, tuple[int, list[int]]] = {END: (0, [])}

    def follow(n: int) -> tuple[int, list[int]]:
        if n not in ways:
            best = max((follow(m) for m in sorted(after[n])), default=(0, []))
            ways[n] = ((10_000 if n in loops else length(n)) + best[0], [n, *best[1]])
        return ways[n]

    return follow(start)[1]


def _is_wait(blocks: Blocks, body: frozenset[int]) -> bool:
    """A loop that only asks a barrier in shared memory whether a copy has arrived."""
    instructions = [i for n in body for i in blocks[n]]
    return len(instructions) <= 12 and any(i.op.startswith("SYNCS.PHASECHK") for i in instructions)

"""Which pointer offsets of a compiled kernel are products taken in 32 bits, read from its TTIR.

Every 32-bit number gets a degree: 0 for constants and tile positions, 1 for what indexes or counts (arguments, program
ids, loaded numbers), and products add theirs. A row is degree 1, row * stride is degree 2 and may pass 2^31 where
neither factor does, so no number of degree 2 may be widened to 64 bits or added to a pointer as it is.

    a * b           the sum of both         a // b    less by b's, but an index stays an index
    a % b           an index, if a is       a - b     a's: what is subtracted is no larger
    min             the smaller             a + b     the larger, as of all other operations
    loaded, counted 1                       a loop's counter: that of its end

An index times a constant counts as an index. So does the row R t + b of a token position: R, the tokens of an image, is
degree 0. Numbers of 64 bits have no degree. Names that sibling blocks share are taken together, at their largest.
"""

from __future__ import annotations

import re

_NAME = r"%[\w$.-]+(?:#\d+)?"
_RESULT = re.compile(r"^(%[\w$.-]+)(?::\d+)? = \"?([\w.]+)\"?(.*)$")
_LOCATION = re.compile(r"\s*loc\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)")
_PERIOD = "%R"
_LOOPS = ("scf.for", "scf.while", "scf.if")


def narrow_offsets(ttir: str) -> list[str]:
    """The lines that widen, or add to a pointer, a 32-bit product of two runtime numbers."""
    lines = [_LOCATION.sub("", line.strip()) for line in ttir.splitlines() if not line.startswith("#")]
    function = next(line for line in lines if line.startswith("tt.func"))
    degrees = {name: int(name != _PERIOD) for name in re.findall(r"(%\w+): i\d+", function)}
    while True:  # until the numbers that loops carry no longer grow
        before = dict(degrees)
        found = _walk(lines, degrees)
        if degrees == before:
            return found


def _walk(lines: list[str], degrees: dict[str, int]) -> list[str]:
    """One pass over the function; degrees only grow."""
    found, regions = [], []  # regions: the result and the carried names of each operation whose body we are in

    def join(name: str, degree: int) -> None:
        degrees[name] = min(3, max(degrees.get(name, 0), degree))

    for line in lines:
        if line.startswith("}"):
            region = regions.pop()
            if line.endswith("{"):  # else, do
                regions.append(region)
            continue
        match = _RESULT.match(line)
        result, operation, rest = match.groups() if match else ("", line.split(" ")[0], line)
        names = re.findall(_NAME, rest)
        carried = re.findall(rf"({_NAME}) = ({_NAME})", rest)
        if operation == "scf.for":
            counter, end = re.search(rf"({_NAME}) = {_NAME} to ({_NAME})", line).groups()
            join(counter, degrees.get(end, 0))
            carried = [pair for pair in carried if pair[0] != counter]
        if operation in _LOOPS:
            for n, (name, start) in enumerate(carried):
                for target in (name, result, f"{result}#{n}"):
                    join(target, degrees.get(start, 0))
        elif operation in ("scf.yield", "scf.condition"):
            result, inside = regions[-1]
            values = re.findall(_NAME, line.split(" : ")[0])[operation == "scf.condition" :]
            for n, value in enumerate(values):
                for target in (result, f"{result}#{n}", *inside[n : n + 1]):
                    join(target, degrees.get(value, 0))
        elif operation.startswith("^bb") and regions[-1][0]:  # the second half of a while loop
            for n, name in enumerate(re.findall(rf"({_NAME}): ", line)):
                join(name, degrees.get(f"{regions[-1][0]}#{n}", 0))
        elif result:
            operands = [degrees.get(name, 0) for name in names]
            join(result, 0 if re.search(r"\bi64>?$|xi64>?$", rest) else _degree(operation, operands))
            widened = operation in ("arith.extsi", "arith.extui") and re.search(r"to (tensor<[\dx]+x)?i64>?$", rest)
            added = operation == "tt.addptr" and re.search(r"i32>?$", rest)
            if (widened or added) and operands[-1] > 1:
                found.append(line)
        if line.endswith("{"):
            regions.append((result if operation in _LOOPS else "", [name for name, _ in carried]))
    return found


def _degree(operation: str, operands: list[int]) -> int:
    if operation == "arith.constant" or operation == "tt.make_range" or operation.startswith("arith.cmp"):
        return 0
    if operation in ("tt.get_program_id", "tt.get_num_programs", "tt.load", "arith.fptosi", "arith.trunci"):
        return 1
    if operation in ("tt.reduce", "tt.scan"):
        return min(1, max(operands, default=0))
    if operation == "arith.muli":
        return sum(operands)
    if operation in ("arith.divsi", "arith.divui"):
        return max(min(operands[0], 1), operands[0] - operands[1])
    if operation in ("arith.remsi", "arith.remui"):
        return min(operands[0], 1)
    if operation in ("arith.minsi", "arith.minui"):
        return min(operands)
    if operation == "arith.subi":
        return operands[0]
    if operation == "arith.select":
        return max(operands[1:])
    return max(operands, default=0)

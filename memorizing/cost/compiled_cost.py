"""Reads the cost of a program out of the text that a compiler for TPUs gives of it.

The compiler notes on each instruction how many cycles it expects it to take. `cost_analysis` of JAX counts the body of a loop once; here every loop counts as often as it runs,
by the bound that its condition compares with.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterator

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.+?) (?P<opcode>[a-z][\w\-]*)\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{\s*$")
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CONSTANT = re.compile(r"\b[su]32\[\][^=]* constant\((\d+)\)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:to_apply|calls|body|branch_computations|called_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
_MOVES = ("gather", "scatter", "scatter-add", "sort")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a program, as often as it runs.

    Attributes:
      opcode: of HLO.
      op_name: the scopes that it comes from.
      cycles: of one run, as the compiler expects.
      num_bytes: of its result.
      count: how often it runs in one run of the program.
    """

    opcode: str
    op_name: str
    cycles: int
    num_bytes: int
    count: int

    @property
    def total_cycles(self) -> int:
        return self.cycles * self.count


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All instructions of a kind: how many run, and the bytes of their results on one device."""

    count: int
    num_bytes: int


def instructions(text: str) -> list[Instruction]:
    """All instructions that the entry computation runs, those in loops with the number of their runs, and those of every branch.

    Args:
      text: `as_text()` of a compiled program.

    Raises:
      ValueError: the text has no entry computation, or the bound of a loop cannot be read.
    """
    computations, entry = _computations(text)
    if entry is None:
        raise ValueError("the text of the program has no entry computation")
    return list(_run(entry, 1, computations))


def cycles(program: list[Instruction], scope: str = "") -> int:
    """Cycles of the instructions whose scopes match a regular expression."""
    return sum(instruction.total_cycles for instruction in program if re.search(scope, instruction.op_name))


def collectives(program: list[Instruction]) -> dict[str, Traffic]:
    """The collectives by kind."""
    return _traffic(program, lambda instruction: instruction.opcode.removesuffix("-start"), _COLLECTIVES)


def moves(program: list[Instruction]) -> dict[str, Traffic]:
    """Gathers, scatters and sorts that the compiler names no cycles for, alone or as what a fusion is made for, by kind."""

    def kind(instruction: Instruction) -> str:
        is_fusion = instruction.opcode == "fusion"
        name = instruction.op_name.rpartition("/")[2] if is_fusion else instruction.opcode
        return name if not instruction.cycles else ""

    return _traffic(program, kind, _MOVES)


def _traffic(
    program: list[Instruction], kind_of: Callable[[Instruction], str], kinds: tuple[str, ...]
) -> dict[str, Traffic]:
    counts, num_bytes = Counter(), Counter()
    for instruction in program:
        kind = kind_of(instruction)
        if kind in kinds:
            counts[kind] += instruction.count
            num_bytes[kind] += instruction.count * instruction.num_bytes
    return {kind: Traffic(counts[kind], num_bytes[kind]) for kind in sorted(counts)}


def _computations(text: str) -> tuple[dict[str, list[str]], str | None]:
    """Lines of each computation by its name, and the name of the entry."""
    computations: dict[str, list[str]] = {}
    entry, lines = None, []
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            lines = computations[found["name"]] = []
            if line.startswith("ENTRY"):
                entry = found["name"]
        else:
            lines.append(line)
    return computations, entry


def _run(name: str, count: int, computations: dict[str, list[str]]) -> Iterator[Instruction]:
    for line in computations[name]:
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        opcode = found["opcode"]
        if opcode == "while":
            condition = re.search(r"condition=%?([\w.\-]+)", line)[1]
            trips = _trip_count(condition, computations)
            yield from _run(re.search(r"body=%?([\w.\-]+)", line)[1], count * trips, computations)
            continue
        if opcode in ("call", "conditional", "async-start"):
            for group, single in _CALLED.findall(line):
                for called in re.findall(r"[\w.\-]+", group or single):
                    yield from _run(called, count, computations)
        cost, scope = _CYCLES.search(line), _OP_NAME.search(line)
        yield Instruction(
            opcode=opcode,
            op_name=scope[1] if scope else "",
            cycles=int(cost[1]) if cost else 0,
            num_bytes=_num_bytes(found["type"], opcode),
            count=count,
        )


def _trip_count(condition: str, computations: dict[str, list[str]]) -> int:
    """The bound that the counter of a loop is compared with: the only integer in its condition, or in what that calls."""
    waiting, bounds = [condition], set()
    while waiting:
        for line in computations[waiting.pop()]:
            bounds |= {int(bound) for bound in _CONSTANT.findall(line)}
            waiting += [called for group, called in _CALLED.findall(line) if called in computations]
    if len(bounds) != 1:
        raise ValueError(f"cannot read how often the loop with the condition {condition} runs: {sorted(bounds)}")
    return bounds.pop()


def _num_bytes(result: str, opcode: str) -> int:
    arrays = _ARRAY.findall(result)
    if opcode in ("all-gather-start", "collective-permute-start"):
        # What is sent, what arrives, and for some of them counters.
        arrays = arrays[1:2]
    total = 0.0
    for dtype, shape in arrays:
        size = 1 if dtype == "pred" else int(re.search(r"\d+", dtype)[0]) / 8
        for length in filter(None, shape.split(",")):
            size *= int(length)
        total += size
    return int(total)

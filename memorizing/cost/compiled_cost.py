"""Reads the cost of a program out of the text that a compiler for TPUs gives of it.

The compiler notes on each instruction how many cycles it expects it to take. `cost_analysis` of JAX counts the body of
a loop once; here it counts as often as the loop runs, by the bound that the loop's condition compares with.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator

_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.+?) (?P<opcode>[a-z][\w\-]*)\(")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{\s*$")
_CYCLES = re.compile(r'"estimated_cycles":"?(\d+)')
# What a kernel says of itself, which the compiler does not price.
_FLOPS = re.compile(r'"cost_estimate":\{"flops":"(\d+)"')
_OP_NAME = re.compile(r'op_name="([^"]*)"')
_CONSTANT = re.compile(r"\b[su]32\[\][^=]* constant\((\d+)\)")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\]")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_CALLS = re.compile(r"\bcalls=%?([\w.\-]+)")
_BODY = re.compile(r"body=%?([\w.\-]+)")
_NAME = re.compile(r"[\w.\-]+")
_DIGITS = re.compile(r"\d+")
_CALLED = re.compile(r"\b(?:to_apply|calls|body|branch_computations|called_computations)=(?:\{([^}]*)\}|%?([\w.\-]+))")
_COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
_START = 'custom_call_target="AsyncCollectiveStart"'
_MOVES = ("gather", "scatter", "scatter-add", "sort")
# What the compiler notes where it cannot tell.
_UNKNOWN_CYCLES = 2**63 - 1
_UNKNOWN = "unknown"


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a program, as often as it runs.

    Attributes:
      opcode: the operation, as HLO names it.
      op_name: the scopes that it comes from.
      cycles: of one run, as the compiler expects; None where it says that it cannot tell, 0 where it says nothing.
      num_bytes: size of its result.
      count: how often it runs in one run of the program.
      is_rare: whether it belongs to a branch that hardly ever runs.
      kernel_flops: of one run of a kernel, as it says itself; 0 for all other instructions.
    """

    opcode: str
    op_name: str
    cycles: int | None
    num_bytes: int
    count: int
    is_rare: bool
    kernel_flops: int = 0

    @property
    def total_cycles(self) -> int:
        return (self.cycles or 0) * self.count


@dataclasses.dataclass(frozen=True)
class Traffic:
    """All instructions of one kind: how often they run, and the bytes of their results on one device.

    Those of a reduce-scatter are the bytes of what is summed.
    """

    count: int
    num_bytes: int


def instructions(text: str, rare: str = "") -> list[Instruction]:
    """All instructions that the entry computation runs, those of every branch among them.

    Instructions in a loop have the number of their runs.

    Args:
      text: `as_text()` of a compiled program.
      rare: name of the scope in which branches hardly ever run.

    Raises:
      ValueError: the text has no entry computation, or the bound of a loop cannot be read.
    """
    computations, entry = _computations(text)
    if entry is None:
        raise ValueError("the text of the program has no entry computation")
    return list(_run(entry, 1, computations, rare))


def cycles(program: list[Instruction], scope: str = "") -> int:
    """Cycles of the instructions whose scopes match a regular expression."""
    return sum(instruction.total_cycles for instruction in program if re.search(scope, instruction.op_name))


def collectives(program: list[Instruction]) -> dict[str, Traffic]:
    """The collectives by kind."""
    return _traffic(program, lambda instruction: instruction.opcode.removesuffix("-start"), _COLLECTIVES)


def moves(program: list[Instruction]) -> dict[str, Traffic]:
    """Gathers, scatters and sorts for which the compiler names no cycles, by kind, and what else it cannot tell.

    A fusion has the kind of the operation that it is named after.
    """

    def kind(instruction: Instruction) -> str:
        if instruction.cycles is None:
            return _UNKNOWN
        if instruction.cycles:
            return ""
        if instruction.opcode == "fusion":
            return instruction.op_name.rpartition("/")[2]
        return instruction.opcode

    return _traffic(program, kind, (*_MOVES, _UNKNOWN))


def _traffic(
    program: list[Instruction], kind_of: Callable[[Instruction], str], kinds: tuple[str, ...]
) -> dict[str, Traffic]:
    counts = Counter()
    num_bytes = Counter()
    for instruction in program:
        kind = kind_of(instruction)
        if kind in kinds:
            counts[kind] += instruction.count
            num_bytes[kind] += instruction.count * instruction.num_bytes
    return {kind: Traffic(counts[kind], num_bytes[kind]) for kind in sorted(counts)}


def _computations(text: str) -> tuple[dict[str, list[str]], str | None]:
    """Lines of each computation by its name, and the name of the entry."""
    computations: dict[str, list[str]] = {}
    entry = None
    # Lines before the first computation belong to none.
    lines: list[str] = []
    for line in text.splitlines():
        found = _COMPUTATION.match(line)
        if found is None:
            lines.append(line)
            continue
        name = found["name"]
        lines = []
        computations[name] = lines
        if line.startswith("ENTRY"):
            entry = name
    return computations, entry


def _run(
    name: str, count: int, computations: dict[str, list[str]], rare: str, is_rare: bool = False
) -> Iterator[Instruction]:
    """Instructions of a computation that runs `count` times, and of those that it calls."""
    for line in computations[name]:
        found = _INSTRUCTION.match(line)
        if not found:
            continue
        opcode = found["opcode"]
        if opcode == "while":
            trips = _trip_count(_group(_CONDITION, line), computations)
            yield from _run(_group(_BODY, line), count * trips, computations, rare, is_rare)
            continue
        op_name = _group(_OP_NAME, line, default="")
        if opcode == "fusion":
            called = _group(_CALLS, line, default="")
            for kind, num_bytes in _collectives_in(called, computations.get(called, [])):
                yield Instruction(kind, op_name, 0, num_bytes, count, is_rare)
        if opcode in ("call", "conditional", "async-start"):
            for group, single in _CALLED.findall(line):
                for called in _NAME.findall(group or single):
                    is_rarely_called = is_rare or (opcode == "conditional" and rare in op_name.split("/"))
                    yield from _run(called, count, computations, rare, is_rarely_called)
        told = int(_group(_CYCLES, line, default="0"))
        yield Instruction(
            opcode=opcode,
            op_name=op_name,
            cycles=None if told == _UNKNOWN_CYCLES else told,
            num_bytes=_num_bytes(found["type"], opcode),
            count=count,
            is_rare=is_rare,
            kernel_flops=int(_group(_FLOPS, line, default="0")),
        )


def _collectives_in(name: str, lines: list[str]) -> Iterator[tuple[str, int]]:
    """Kind and bytes of the collectives that a fusion begins.

    Those that run beside products are in several fusions, of which one starts them. A sum of which each device keeps
    its part is one fusion, and has the bytes of what is summed.
    """
    is_scattered = name.startswith("all-reduce-scatter")
    if is_scattered or any(_START in line for line in lines):
        for line in lines:
            found = _INSTRUCTION.match(line)
            if found and found["opcode"] in _COLLECTIVES:
                kind = "reduce-scatter" if is_scattered else found["opcode"]
                yield kind, _num_bytes(found["type"], found["opcode"])


def _group(pattern: re.Pattern[str], line: str, default: str | None = None) -> str:
    """What the group of a pattern holds in a line. Raises ValueError where it is not there and has no default."""
    found = pattern.search(line)
    if found:
        return found[1]
    if default is None:
        raise ValueError(f"cannot read the instruction {line.strip()[:200]}")
    return default


def _trip_count(condition: str, computations: dict[str, list[str]]) -> int:
    """How often a loop runs: the bound that its counter is compared with.

    This is the only integer in the loop's condition, or in a computation that the condition calls.
    """
    bounds: set[int] = set()
    waiting = [condition]
    while waiting:
        for line in computations[waiting.pop()]:
            bounds |= set(map(int, _CONSTANT.findall(line)))
            waiting += [called for _, called in _CALLED.findall(line) if called in computations]
    if len(bounds) != 1:
        raise ValueError(f"cannot read how often the loop with the condition {condition} runs: {sorted(bounds)}")
    return bounds.pop()


def _num_bytes(result: str, opcode: str) -> int:
    """Bytes of an instruction's result, from its type."""
    arrays = _ARRAY.findall(result)
    if opcode in ("all-gather-start", "collective-permute-start"):
        # What is sent, what arrives, and for some of them counters.
        arrays = arrays[1:2]
    total = 0.0
    for dtype, shape in arrays:
        # Such as pred, s32, bf16 and f8e4m3fn.
        bits = 8 if dtype == "pred" else int(_DIGITS.findall(dtype)[0])
        lengths = map(int, filter(None, shape.split(",")))
        total += math.prod(lengths) * bits / 8
    return int(total)

"""Loops in machine code: basic blocks, dominators, natural loops.

A backward branch alone is no loop: rare paths are compiled to the end of a kernel, from where they
jump back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

Graph = list[list[int]]


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: its full name, where it may jump to, and whether the next may follow."""

    address: int
    name: str
    target: int | None = None
    falls_through: bool = True


def innermost_loops(instructions: Sequence[Instruction]) -> list[list[Instruction]]:
    """The instructions of every loop that has no other inside, in the order of their addresses."""
    blocks = basic_blocks(instructions)
    loops = natural_loops(successors(blocks))
    inner = [
        body
        for header, body in sorted(loops.items())
        if not any(other in body for other in loops if other != header)
    ]
    return [[each for block in sorted(body) for each in blocks[block]] for body in inner]


def basic_blocks(instructions: Sequence[Instruction]) -> list[list[Instruction]]:
    """Stretches that are entered only at their first and left only at their last instruction."""
    targets = {each.target for each in instructions}
    blocks: list[list[Instruction]] = []
    begins = True
    for each in instructions:
        if begins or each.address in targets:
            blocks.append([])
        blocks[-1].append(each)
        begins = each.target is not None or not each.falls_through
    return blocks


def successors(blocks: Sequence[Sequence[Instruction]]) -> Graph:
    """The blocks that may follow each block."""
    numbers = {block[0].address: number for number, block in enumerate(blocks)}
    found: Graph = []
    for number, block in enumerate(blocks):
        last = block[-1]
        after = [number + 1] if last.falls_through and number + 1 < len(blocks) else []
        jumps = [numbers[last.target]] if last.target in numbers else []
        found.append(sorted({*after, *jumps}))
    return found


def natural_loops(graph: Graph) -> dict[int, set[int]]:
    """The blocks of every loop, by the block through which alone it is entered."""
    before = _predecessors(graph)
    loops: dict[int, set[int]] = {}
    for block, above in dominators(graph).items():
        for header in above.intersection(graph[block]):
            body = loops.setdefault(header, {header})
            waiting = [block]
            while waiting:
                if (each := waiting.pop()) not in body:
                    body.add(each)
                    waiting += before[each]
    return loops


def dominators(graph: Graph) -> dict[int, set[int]]:
    """The blocks that every way from the first one passes, itself included; reachable ones only."""
    reached = _reachable(graph)
    before = _predecessors(graph)
    found = {block: set(reached) for block in reached} | {0: {0}}
    changed = True
    while changed:
        changed = False
        for block in reached[1:]:
            ways = [found[each] for each in before[block] if each in found]
            now = {block} | set.intersection(*ways)
            changed |= now != found[block]
            found[block] = now
    return found


def _reachable(graph: Graph) -> list[int]:
    seen, waiting = {0}, [0]
    while waiting:
        new = set(graph[waiting.pop()]) - seen
        seen |= new
        waiting += new
    return sorted(seen)


def _predecessors(graph: Graph) -> Graph:
    before: Graph = [[] for _ in graph]
    for block, after in enumerate(graph):
        for each in after:
            before[each].append(block)
    return before

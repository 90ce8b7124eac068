"""Spread what depends on nothing, such as hints to fetch memory, over the turns of a loop.

A loop of hints in one place waits for the memory that it asks for: a processor has some 20 requests
under way and stops at the next one. A few hints before every few hundred instructions cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from tvm.s_tir import SBlock, SBlockRealize, Schedule
from tvm.s_tir.sblock_scope import StmtSRef
from tvm.s_tir.schedule import LoopRV
from tvm.tirx import Expr, For, ForKind, SeqStmt, Stmt, Var, const
from tvm.tirx import min as smaller


def spread(sch: Schedule, names: Sequence[str], loops: Sequence[LoopRV]) -> None:
    """Do the blocks `names` in equal parts, each at the start of a turn of `loops`.

    Each of them has one loop, whose iterations may be repeated, and writes nothing; `loops` are
    those between the block that all of this is in and the turns. Nothing else may be scheduled
    around these loops afterwards.
    """
    nests = [sch.get(sch.get_loops(sch.get_sblock(name))[0]) for name in names]
    path = [sch.get(loop) for loop in loops]
    around = _enclosing_block(sch.get_sref(sch.get_sblock(names[0])))
    block = around.stmt
    parts = [_part(nest, *_turns(path)) for nest in nests]
    body = _with_parts(_without(block.body, nests), path, parts)
    changed = SBlock(
        block.iter_vars, block.reads, block.writes, block.name_hint, body, block.init,
        block.alloc_buffers, block.match_buffers, block.annotations,
    )  # fmt: skip
    sch.state.replace(around, changed, {block: changed})


def _enclosing_block(sref: StmtSRef) -> StmtSRef:
    while not isinstance((sref := sref.parent).stmt, SBlock):
        pass
    return sref


def _turns(path: Sequence[For]) -> tuple[Expr, int]:
    """The number of a turn of nested loops, and how many there are."""
    turn, turns = const(0), 1
    for loop in path:
        extent = int(loop.extent)
        turn, turns = turn * extent + loop.loop_var, turns * extent
    return turn, turns


def _part(nest: For, turn: Expr, turns: int) -> Stmt:
    """The iterations of `nest` that belong to `turn` of `turns`; the last one fills up."""
    count, realize = int(nest.extent), nest.body
    size = -(-count // turns)
    step = Var("step", "int32")
    at = turn * size + step
    if size * turns != count:
        at = smaller(at, count - 1)
    part = SBlockRealize([at], realize.predicate, realize.block)
    return For(step, const(0), const(size), ForKind.UNROLLED, part)


def _without(stmt: Stmt, nests: Sequence[For]) -> Stmt:
    """A sequence without these of its statements."""
    kept = [each for each in stmt.seq if not any(each.same_as(nest) for nest in nests)]
    return kept[0] if len(kept) == 1 else SeqStmt(kept)


def _with_parts(stmt: Stmt, path: Sequence[For], parts: Sequence[Stmt]) -> Stmt:
    """`stmt` with `parts` at the start of the body of the last loop of `path`."""
    if isinstance(stmt, SeqStmt):
        return SeqStmt([_with_parts(each, path, parts) for each in stmt.seq])
    if not stmt.same_as(path[0]):
        return stmt
    inner = path[1:]
    body = _with_parts(stmt.body, inner, parts) if inner else SeqStmt([*parts, stmt.body])
    return For(
        stmt.loop_var, stmt.min, stmt.extent, stmt.kind, body, stmt.thread_binding,
        stmt.annotations, stmt.step,
    )  # fmt: skip

"""Spread work that depends on nothing, such as hints to fetch memory, over the turns of a loop."""

from __future__ import annotations

from collections.abc import Sequence

from tvm.s_tir import SBlock, SBlockRealize, Schedule
from tvm.s_tir.schedule import LoopRV
from tvm.tirx import For, ForKind, SeqStmt, Stmt, Var, const, min as smaller


def spread(sch: Schedule, names: Sequence[str], loops: Sequence[LoopRV]) -> None:
    """Do the blocks `names`, each with one loop, in equal parts at the start of every turn.

    `loops` are those from the blocks' scope down to the one whose turns are meant. Nothing may
    depend on the blocks. Too many turns do their last part again, which must be harmless.
    """
    path = [sch.get(loop) for loop in loops]
    nests = {sch.get(sch.get_loops(sch.get_sblock(name))[0]).loop_var: name for name in names}
    scope = sch.get_sref(sch.get_sblock(names[0])).parent
    while not isinstance(scope.stmt, SBlock):
        scope = scope.parent
    turn, turns = const(0), 1
    for loop in path:
        extent = int(loop.extent)
        turn, turns = turn * extent + loop.loop_var, turns * extent
    found: list[Stmt] = []

    def without(stmt: Stmt) -> Stmt | None:
        if isinstance(stmt, SeqStmt):
            kept = [each for each in map(without, stmt.seq) if each is not None]
            return kept[0] if len(kept) == 1 else SeqStmt(kept)
        if isinstance(stmt, For) and stmt.loop_var in nests:
            found.append(stmt)
            return None
        return stmt

    def with_parts(stmt: Stmt, depth: int) -> Stmt:
        if isinstance(stmt, SeqStmt):
            return SeqStmt([with_parts(each, depth) for each in stmt.seq])
        if not isinstance(stmt, For) or not stmt.loop_var.same_as(path[depth].loop_var):
            return stmt
        if depth + 1 < len(path):
            body = with_parts(stmt.body, depth + 1)
        else:
            body = SeqStmt([*(_part(nest, turn, turns) for nest in found), stmt.body])
        return For(
            stmt.loop_var, stmt.min, stmt.extent, stmt.kind, body, stmt.thread_binding,
            stmt.annotations,
        )  # fmt: skip

    old = scope.stmt
    body = without(old.body)
    new = SBlock(
        old.iter_vars, old.reads, old.writes, old.name_hint, with_parts(body, 0), old.init,
        old.alloc_buffers, old.match_buffers, old.annotations,
    )  # fmt: skip
    sch.state.replace(scope, new, {old: new})


def _part(nest: For, turn, turns: int) -> Stmt:
    """The part of a loop over one block that belongs to `turn` of `turns`."""
    count = int(nest.extent)
    size = -(-count // turns)
    realize = nest.body
    step = Var("step", "int32")
    at = smaller(turn * size + step, count - 1) if size * turns != count else turn * size + step
    part = SBlockRealize([at], realize.predicate, realize.block)
    return For(step, const(0), const(size), ForKind.UNROLLED, part)

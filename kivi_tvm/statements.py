"""What passes over TensorIR share: statements rebuilt, and sizes of buffers."""

from __future__ import annotations

from collections.abc import Callable

import tvm
from tvm.tirx import AttrStmt, Buffer, For, IfThenElse, IntImm, SeqStmt, Stmt


def changed(stmt: Stmt, change: Callable[[Stmt], Stmt]) -> Stmt:
    """A statement with `change` applied to everything in it, from the inside out."""
    if isinstance(stmt, SeqStmt):
        stmt = SeqStmt([changed(each, change) for each in stmt.seq])
    elif isinstance(stmt, For):
        stmt = For(
            stmt.loop_var, stmt.min, stmt.extent, stmt.kind, changed(stmt.body, change),
            stmt.thread_binding, stmt.annotations, stmt.step,
        )  # fmt: skip
    elif isinstance(stmt, AttrStmt):
        stmt = AttrStmt(stmt.node, stmt.attr_key, stmt.value, changed(stmt.body, change))
    elif isinstance(stmt, IfThenElse):
        other = stmt.else_case and changed(stmt.else_case, change)
        stmt = IfThenElse(stmt.condition, changed(stmt.then_case, change), other)
    return change(stmt)


def constant_bytes(buffer: Buffer) -> int:
    """Bytes of a buffer whose shape is known, else 0."""
    count: int = tvm.DataType(buffer.dtype).itemsize
    for extent in buffer.shape:
        if not isinstance(extent, IntImm):
            return 0
        count *= int(extent)
    return count

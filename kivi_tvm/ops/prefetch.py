"""Hints to load memory into the cache before it is used: they change no result."""

from __future__ import annotations

from tvm.script import tirx as T

LINE_BYTES = 64
READ, KEEP, DATA = 0, 3, 1  # arguments of llvm.prefetch


def prefetch_block(name: str, pages: int, rows: int, columns: int, itemsize: int):
    """Ask for `[rows, columns]` of one head in each of `pages` pages, a cache line at a time.

    The macro takes the buffer `[N, H_kv, rows, columns]`, a function from `0 .. pages - 1` to a
    page's number, and the head.
    """
    step = min(LINE_BYTES // itemsize, rows * columns)

    @T.macro
    def prefetch(buffer, page, head):
        for j, line in T.grid(pages, T.ceildiv(rows * columns, step)):
            with T.sblock(name):
                vj, vl = T.axis.remap("SS", [j, line])
                T.reads()
                T.writes()
                T.evaluate(
                    T.call_intrin(
                        "void",
                        "tirx.prefetch",
                        T.address_of(
                            buffer[page(vj), head, vl * step // columns, vl * step % columns]
                        ),
                        READ,
                        KEEP,
                        DATA,
                    )
                )

    return prefetch

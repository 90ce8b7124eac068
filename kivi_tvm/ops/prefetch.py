"""Hints to load memory into the cache before it is used: they change no result."""

from __future__ import annotations

from tvm.script import tirx as T

LINE_BYTES = 64
# Arguments of llvm.prefetch. 2 is the second-level cache: what the next chunk needs would drive
# this one's out of the first (T=32768, D=128, M=4, int8, one thread: 3.5 ms, with 3 instead 4.2).
READ, KEEP, DATA = 0, 2, 1


def prefetch_block(name: str, pages: int, rows: int, columns: int, itemsize: int):
    """Ask for `[rows, columns]` of one head in each of `pages` pages, a cache line at a time.

    The macro takes the buffer `[N, H_kv, rows, columns]`, the pages' numbers `[pages]` and the
    head.
    """
    step = min(LINE_BYTES // itemsize, rows * columns)
    lines = -(-rows * columns // step)

    @T.macro
    def prefetch(buffer, page, head):
        for line in range(pages * lines):
            with T.sblock(name):
                vl = T.axis.opaque(pages * lines, line)
                T.reads()
                T.writes()
                first = T.meta_var(vl % lines * step)
                T.evaluate(
                    T.call_intrin(
                        "void",
                        "tirx.prefetch",
                        T.address_of(
                            buffer[page[vl // lines], head, first // columns, first % columns]
                        ),
                        READ,
                        KEEP,
                        DATA,
                    )
                )

    return prefetch


def prefetch_tokens(name: str, tokens: int, channels: int, itemsize: int):
    """Ask for `tokens` tokens of one head, a cache line at a time.

    The macro takes the buffer `[rows, H_kv, T, channels]`, a row, the head and a function from
    `0 .. tokens - 1` to a token.
    """
    step = min(LINE_BYTES // itemsize, channels)
    lines = -(-channels // step)

    @T.macro
    def prefetch(buffer, row, head, token):
        for line in range(tokens * lines):
            with T.sblock(name):
                vl = T.axis.opaque(tokens * lines, line)
                T.reads()
                T.writes()
                T.evaluate(
                    T.call_intrin(
                        "void",
                        "tirx.prefetch",
                        T.address_of(buffer[row, head, token(vl // lines), vl % lines * step]),
                        READ,
                        KEEP,
                        DATA,
                    )
                )

    return prefetch

"""Rows copied, permuted and selected: complete pages are shared, what is written is copied."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from kivi_tvm import layout
from kivi_tvm.runtime.rows import NO_SLOT, Row

if TYPE_CHECKING:
    from kivi_tvm.runtime.cache import Cache


def rearrange(cache: Cache, index: list[int]) -> None:
    """Let row `i` be what row `index[i]` was; rows that nobody takes are forgotten.

    The first to take a row keeps its slot: a permutation copies nothing. Every other one gets the
    complete pages as a further owner, and copies of the incomplete pages (at most R/P + 2) and of
    the windows.
    """
    old = cache.rows.rows
    rows, copies = _take_slots(old, index)
    taken = {row.slot for row in rows}
    dropped = [row.slot for row in old if row.slot != NO_SLOT and row.slot not in taken]
    # Slots that nobody used come first: their windows need not be saved.
    unused = [slot for slot in range(cache.rows.capacity) if slot not in {*taken, *dropped}]
    added = max(len(rows), len(taken - {NO_SLOT}) + len(copies)) - cache.rows.capacity
    unused += range(cache.rows.capacity, cache.rows.capacity + max(0, added))
    targets = (unused + dropped)[: len(copies)]
    cache.make_slots(cache.rows.capacity + max(0, added))
    shares = [
        (rows[i].slot, target, _written_pages(cache, rows[i]))
        for i, target in zip(copies, targets, strict=True)
    ]
    copied = sum(len(written) for _, _, written in shares)
    cache.make_pages(cache.pages.missing({}, copies=copied))
    with cache.all_or_nothing([slot for slot in targets if slot in dropped]):
        pages = cache.pages.share(shares, dropped)
        windows = [(source, target) for source, target, _ in shares]
        for layer in cache.layers:
            layer.memory.copy_pages(pages)
            layer.memory.copy_windows(windows)
        for i, target in zip(copies, targets, strict=True):
            rows[i].slot = target
        cache.rows.rows = rows
        cache.rows_changed()


def _take_slots(old: list[Row], index: list[int]) -> tuple[list[Row], list[int]]:
    """The new rows, and which of them must get a slot of their own."""
    rows = [replace(old[i]) for i in index]
    seen: set[int] = set()
    copies = []
    for i, row in enumerate(rows):
        if row.slot != NO_SLOT and row.slot in seen:
            copies.append(i)
        seen.add(row.slot)
    return rows, copies


def _written_pages(cache: Cache, row: Row) -> range:
    """Numbers of a row's pages that will be written to: not all keys and values are packed."""
    cfg, length = cache.cfg, cache.rows.body(row.length)
    complete = layout.packed_values(cfg, length) // cfg.P
    return range(complete, layout.num_pages(cfg, layout.packed_keys(cfg, length)))

"""Tokens taken back: exactly where full-precision data is still held, else by what codes give."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from kivi_tvm import layout
from kivi_tvm.runtime.rows import NO_SLOT, Row

if TYPE_CHECKING:
    from kivi_tvm.runtime.cache import Cache
    from kivi_tvm.runtime.layer import CacheLayer


class Cropped(NamedTuple):
    """What `crop` did.

    `refilled` has, for each row, the tokens of its window that now hold dequantized values because
    the full-precision ones were gone; 0 where the row equals one that never saw the removed tokens.
    """

    refilled: list[int]

    @property
    def exact(self) -> bool:
        return not any(self.refilled)


class Rewind(NamedTuple):
    """What a row's windows need after it was made shorter, in body tokens.

    `values`: values, and keys beside them, that are replaced by dequantized ones. `keys`: keys that
    count as exact from now on but are dequantized. `restored`: keys that were packed and are not
    any more, taken from the exact ring.
    """

    slot: int
    values: range
    keys: range
    restored: range

    @property
    def refilled(self) -> int:
        return len({*self.values, *self.keys})


def crop(cache: Cache, counts: list[int]) -> Cropped:
    """Remove the last `counts[i]` tokens of row `i`."""
    cfg, rows, pages = cache.cfg, cache.rows, cache.pages
    after = [row.length - count for row, count in zip(rows.rows, counts, strict=True)]
    plans = [_plan(cache, row, length) for row, length in zip(rows.rows, after, strict=True)]
    bodies = {
        row.slot: rows.body(n) for row, n in zip(rows.rows, after, strict=True) if n < row.length
    }
    written = {slot: layout.packed_values(cfg, body) // cfg.P for slot, body in bodies.items()}
    cache.make_pages(pages.missing({}, copies=pages.copies_to_reopen(written)))
    changed = [plan for plan in plans if plan.values or plan.keys or plan.restored]
    with cache.all_or_nothing([plan.slot for plan in changed]):
        copies = pages.reopen(written)
        for layer in cache.layers:
            layer.memory.copy_pages(copies)
            for plan in changed:
                _rewind(layer, plan)
        for slot, body in bodies.items():
            pages.release(slot, layout.num_pages(cfg, layout.packed_keys(cfg, body)))
        for row, plan, length in zip(rows.rows, plans, after, strict=True):
            _shorten(cache, row, plan, length)
        cache.rows_changed()
    return Cropped([plan.refilled for plan in plans])


def enable(cache: Cache, rollback: int) -> None:
    """Rebuild the rings for `rollback` tokens to take back; what they hold stays."""
    rows = cache.rows
    windows = [layer.memory.new_windows(rows.capacity, rollback) for layer in cache.layers]
    held = [(row, rows.body(row.length), *rows.bounds(row)) for row in rows.rows]
    for layer, new in zip(cache.layers, windows, strict=True):
        for row, length, values_from, _ in held:
            if row.slot != NO_SLOT:
                _move_window(layer, new, row.slot, range(values_from, length))
    with cache.all_or_nothing([]):
        for row, length, values_from, keys_from in held:
            kept = max(0, length - cache.cfg.R - rollback)
            row.values_from, row.keys_from = max(values_from, kept), max(keys_from, kept)
        before = rows.rollback, [layer.memory.windows for layer in cache.layers]
        try:
            _install(cache, rollback, windows)
        except BaseException:
            _install(cache, *before)
            raise


def _install(cache: Cache, rollback: int, windows: list[dict[str, Tensor]]) -> None:
    """Let the layers use these windows."""
    cache.rows.rollback = rollback
    for layer, new in zip(cache.layers, windows, strict=True):
        layer.memory.windows = new
    cache.bind()


def _plan(cache: Cache, row: Row, after: int) -> Rewind:
    """How to make a row `after` tokens long."""
    cfg, rows = cache.cfg, cache.rows
    nothing = range(0)
    if row.length == after:
        return Rewind(row.slot, nothing, nothing, nothing)
    length = rows.body(after)
    values_from, keys_from = rows.bounds(row)
    window_from, exact_from = _needed(cache, length)
    unpacked = layout.packed_keys(cfg, rows.body(row.length)) > exact_from
    exact_ring = rows.rollback > 0 and cache.window == "kivi"
    return Rewind(
        row.slot,
        values=range(window_from, min(values_from, length)),
        keys=range(exact_from, min(keys_from, length)),
        restored=range(max(exact_from, keys_from), length) if unpacked and exact_ring else nothing,
    )


def _needed(cache: Cache, length: int) -> tuple[int, int]:
    """Body tokens from which on a row of this length needs full-precision values and keys."""
    window_from = layout.packed_values(cache.cfg, length)
    if cache.window == "exact":
        return window_from, window_from
    return window_from, layout.packed_keys(cache.cfg, length)


def _shorten(cache: Cache, row: Row, plan: Rewind, after: int) -> None:
    if row.length == after:
        return
    values_from, keys_from = cache.rows.bounds(row)
    window_from, exact_from = _needed(cache, cache.rows.body(after))
    row.length = after
    row.values_from, row.keys_from = min(values_from, window_from), min(keys_from, exact_from)
    row.refilled += plan.refilled


def _rewind(layer: CacheLayer, plan: Rewind) -> None:
    """Bring one row's rings of one layer to an earlier length."""
    windows = {name: window[plan.slot] for name, window in layer.memory.windows.items()}
    if plan.values:
        k, v = layer.dequantize_tokens(plan.slot, plan.values)
        put_tokens(windows["k_ring"], plan.values, k)
        put_tokens(windows["v_ring"], plan.values, v)
    if "k_exact" in windows:
        if plan.keys:
            k, _ = layer.dequantize_tokens(plan.slot, plan.keys)
            put_tokens(windows["k_exact"], plan.keys, k)
        if plan.restored:
            put_tokens(
                windows["k_ring"], plan.restored, get_tokens(windows["k_exact"], plan.restored)
            )


def _move_window(layer: CacheLayer, new: dict[str, Tensor], slot: int, tokens: range) -> None:
    """Copy a slot's tokens into other rings; a new exact ring starts with the keys seen."""
    old = layer.memory.windows
    for name, window in new.items():
        source = old.get(name, old["k_ring"])
        if name.endswith("sink"):
            window[slot] = source[slot]
        else:
            last = tokens[-min(len(tokens), window.shape[2]) :]
            put_tokens(window[slot], last, get_tokens(source[slot], last))


def put_tokens(ring: Tensor, tokens: range, x: Tensor) -> None:
    """Write `x [H_kv, n, D]` to the places of these tokens in `ring [H_kv, slots, D]`."""
    ring[:, _places(ring, tokens)] = x


def get_tokens(ring: Tensor, tokens: range) -> Tensor:
    """A copy `[H_kv, n, D]` of these tokens in `ring [H_kv, slots, D]`."""
    return ring[:, _places(ring, tokens)]


def _places(ring: Tensor, tokens: range) -> Tensor:
    return torch.arange(tokens.start, tokens.stop, device=ring.device) % ring.shape[1]

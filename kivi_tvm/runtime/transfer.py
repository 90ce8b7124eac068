"""Contents taken out of a cache and put into a new one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kivi_tvm import layout
from kivi_tvm.runtime.checks import outside_inference_mode
from kivi_tvm.runtime.contents import Contents, StoredRow
from kivi_tvm.runtime.pages import Ownership
from kivi_tvm.runtime.rollback import get_tokens, put_tokens
from kivi_tvm.runtime.rows import NO_SLOT, Row

if TYPE_CHECKING:
    from kivi_tvm.runtime.cache import Cache
    from kivi_tvm.runtime.layer import CacheLayer


def describe(cache: Cache) -> tuple[Contents, Tensor]:
    """What `cache` holds, and int64 `[num_pages]`: each page's place in the cache's pool."""
    rows = cache.rows
    owned = [_pages_in_use(cache, row) for row in rows.rows]
    used = sorted({page for pages in owned for page in pages})
    number = {page: i for i, page in enumerate(used)}
    stored = tuple(
        StoredRow(
            active=row.slot != NO_SLOT,
            length=row.length,
            values_from=bounds[0],
            keys_from=bounds[1],
            refilled=row.refilled,
            pages=tuple(number[page] for page in pages),
        )
        for row, bounds, pages in zip(rows.rows, map(rows.bounds, rows.rows), owned, strict=True)
    )
    options = cache.num_layers, cache.window, cache.rollback, cache.sink_tokens
    places = torch.tensor(used, dtype=torch.int64, device=cache.device)
    return Contents(*options, len(used), stored), places


def take(layer: CacheLayer, contents: Contents, places: Tensor) -> dict[str, Tensor]:
    """Copies of what one layer holds, as `Contents.buffers` says; places without a token are 0."""
    cache = layer.cache
    found = {name: buffer.index_select(0, places) for name, buffer in layer.memory.pages.items()}
    for row in contents.rows:
        _blank_unwritten(found, cache, row.pages, contents.body(row))
    for name, window in layer.memory.windows.items():
        held = [
            get_tokens(window[row.slot], tokens)
            for row, tokens in zip(cache.rows.rows, contents.tokens(name), strict=True)
        ]
        found[name] = torch.cat(held, 1)
    return found


@outside_inference_mode
def fill(cache: Cache, contents: Contents, tensors_of: Callable[[int], dict[str, Tensor]]) -> None:
    """Put contents into a new cache of as many layers and rows, whatever its rollback.

    `tensors_of(index)` gives the tensors of one layer.
    """
    _own_pages(cache, contents)
    cache.rows.rows = [
        Row(i if row.active else NO_SLOT, row.length, row.values_from, row.keys_from, row.refilled)
        for i, row in enumerate(contents.rows)
    ]
    for layer in cache.layers:
        tensors = tensors_of(layer.index)
        for name, buffer in layer.memory.pages.items():
            buffer[: contents.num_pages] = tensors[name]
        for name, window in layer.memory.windows.items():
            _fill_window(window, name, contents, tensors)
    cache.rows_changed()


def copy(cache: Cache) -> Cache:
    """An independent cache with the same contents."""
    contents, places = describe(cache)
    new = cache.module.new_cache(
        num_layers=cache.num_layers,
        batch_size=cache.batch_size,
        max_tokens=cache.max_tokens,
        device=cache.device,
        rollback=cache.rollback,
        window=cache.window,
        sink_tokens=cache.sink_tokens,
    )
    fill(new, contents, lambda index: take(cache.layer(index), contents, places))
    return new


def _pages_in_use(cache: Cache, row: Row) -> tuple[int, ...]:
    """Pages that a row's tokens fill; it may own more, by `reserve`."""
    if row.slot == NO_SLOT:
        return ()
    packed = layout.packed_keys(cache.cfg, cache.rows.body(row.length))
    return cache.pages.owned(row.slot)[: layout.num_pages(cache.cfg, packed)]


def _own_pages(cache: Cache, contents: Contents) -> None:
    """Let the rows of a new cache own the pages of the contents, shared ones together."""
    cache.make_pages(contents.num_pages)
    cache.pages.reshape(cache.rows.capacity, max(1, *(len(row.pages) for row in contents.rows)))
    cache.bind()
    references = Counter(page for row in contents.rows for page in row.pages)
    cache.pages.restore(
        Ownership(
            owned=[row.pages for row in contents.rows],
            free=[page for page in reversed(range(cache.pages.capacity)) if not references[page]],
            references=[references[page] for page in range(cache.pages.capacity)],
        )
    )


def _blank_unwritten(
    pages: dict[str, Tensor], cache: Cache, numbers: tuple[int, ...], length: int
) -> None:
    """Zero what a row of `length` body tokens has not written in its last pages.

    They may hold what was taken back, or what another row wrote before it was freed.
    """
    cfg = cache.cfg
    keys, values = layout.packed_keys(cfg, length), layout.packed_values(cfg, length)
    for i in range(values // cfg.P, len(numbers)):
        page = {name: buffer[numbers[i]] for name, buffer in pages.items()}
        k, v = (min(max(0, n - i * cfg.P), cfg.P) for n in (keys, values))
        page["k_code"][:, :, k:] = 0
        page["v_code"] &= _mask_of_first(v, layout.value_order(cache.module.key))[:, None]
        for name in ("scale", "zero"):
            page[f"k_{name}"][:, k // cfg.G_k :] = 0
            page[f"v_{name}"][:, :, v:] = 0


def _mask_of_first(tokens: int, order: layout.PackOrder) -> Tensor:
    """The bits of a page's words `int32 [P / W]` that hold its first `tokens` tokens."""
    word = torch.arange(order.span // order.codes_per_word)[:, None]
    slot = torch.arange(order.codes_per_word)
    held = order.element(word, slot) < tokens
    mask: Tensor = held * (order.code_mask << order.shift(slot))
    return mask.sum(1).to(torch.int32)


def _fill_window(window: Tensor, name: str, contents: Contents, tensors: dict[str, Tensor]) -> None:
    """Write every row's tokens into its ring, as many of the last ones as it holds."""
    # A cache without rollback has no ring of exact keys: those of the window are exact.
    source = name if name in tensors else "k_ring"
    joined = tensors[source].split([len(tokens) for tokens in contents.tokens(source)], 1)
    for slot, (tokens, held) in enumerate(zip(contents.tokens(name), joined, strict=True)):
        if kept := min(len(tokens), window.shape[2]):
            put_tokens(window[slot], tokens[-kept:], held[:, -kept:])


def joined_pages(layer: CacheLayer, slot: int, count: int) -> dict[str, Tensor]:
    """Every page buffer of a row's first `count` pages, joined along the tokens."""
    ids = list(layer.cache.pages.owned(slot)[:count])
    found = {}
    for name, axis in layout.TOKEN_AXES.items():
        # [n, H_kv, ...] -> [H_kv, ..., n, a page's tokens, ...] -> [H_kv, ..., tokens, ...]
        found[name] = layer.pages[name][ids].movedim(0, axis).flatten(axis, axis + 1)
    return found


def write_pages(layer: CacheLayer, slot: int, name: str, joined: Tensor) -> None:
    """Write `joined [H_kv, ..., tokens, ...]` into the row's pages of one buffer."""
    axis, buffer = layout.TOKEN_AXES[name], layer.pages[name]
    parts = joined.split(buffer.shape[axis + 1], axis)
    for page, part in zip(layer.cache.pages.owned(slot), parts, strict=False):
        buffer[page].narrow(axis, 0, part.shape[axis]).copy_(part)

"""Who owns which page of a cache: what must add up after every operation."""

from __future__ import annotations

from collections import defaultdict

from kivi_tvm import layout


def body_length(cache, row):
    """Tokens of a row behind the sinks: the ones that pages and rings hold."""
    return max(0, cache.lengths[row] - cache.sink_tokens)


def packed_values(cache, row):
    return layout.packed_values(cache.cfg, body_length(cache, row))


def packed_keys(cache, row):
    return layout.packed_keys(cache.cfg, body_length(cache, row))


def incomplete_pages(cache, row):
    """Pages of a row that tokens are still written to: what a fork must copy."""
    cfg = cache.cfg
    return layout.num_pages(cfg, packed_keys(cache, row)) - packed_values(cache, row) // cfg.P


def assert_pages_add_up(cache):
    """Fail unless every row has its pages, and pages of several rows are complete in all."""
    cfg, pages, slots = cache.cfg, cache.pages, [row.slot for row in cache.rows.rows]
    taken = [slot for slot in slots if slot >= 0]
    assert len(set(taken)) == len(taken) and [slot >= 0 for slot in slots] == cache.active
    assert cache.rows.slots.tolist() == slots
    owners = defaultdict(list)
    for row, slot in enumerate(slots):
        if slot < 0:
            continue
        owned = list(pages.owned(slot))
        assert len(owned) >= layout.num_pages(cfg, packed_keys(cache, row))
        named = cache.page_table[slot].tolist()
        assert named == owned + [layout.NO_PAGE] * (len(named) - len(owned))
        for at, page in enumerate(owned):
            owners[page].append((row, at))
    for slot in set(range(len(cache.page_table))) - set(taken):
        assert not pages.owned(slot)
    _assert_shared_are_complete(cache, owners)
    _assert_counts(cache, owners)


def _assert_shared_are_complete(cache, owners):
    for page, held in owners.items():
        rows = [row for row, _ in held]
        assert len(set(rows)) == len(rows), f"page {page} is twice in a row: {held}"
        if len(held) > 1:
            assert len({at for _, at in held}) == 1, f"page {page} is at several places: {held}"
            for row, at in held:
                assert (at + 1) * cache.cfg.P <= packed_values(cache, row), (page, held)


def _assert_counts(cache, owners):
    pages = cache.pages
    references = [pages.references(page) for page in range(pages.capacity)]
    assert references == [len(owners.get(page, ())) for page in range(pages.capacity)]
    shared = sum(n > 1 for n in references)
    used = sum(n > 0 for n in references)
    assert cache.report()["pages"] == {
        "capacity": pages.capacity,
        "used": used,
        "shared": shared,
    }
    for i in range(cache.num_layers):
        held = cache.layer(i).pages.values()
        # some may be longer after an exception in the middle of their growth
        assert all(buffer.shape[0] >= pages.capacity for buffer in held)

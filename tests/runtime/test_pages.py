"""Pages that are written belong to one sequence, and those owned are in the table."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from kivi_tvm import KiviConfig
from kivi_tvm.layout import NO_PAGE, num_pages
from kivi_tvm.runtime.pages import PageTable

CFG = KiviConfig(head_dim=64, num_heads=2, num_kv_heads=1, page_size=32)
SLOTS = 3
COUNTS = st.lists(st.integers(0, 700), min_size=SLOTS, max_size=SLOTS)


def make_room(table, counts):
    tokens = dict(enumerate(counts))
    missing = table.missing(tokens)
    if missing:
        table.grow(table.capacity + missing)
    table.reshape(SLOTS, max(table.width, *(num_pages(CFG, n) for n in counts)))
    table.assign(tokens)


@given(st.lists(COUNTS, min_size=1, max_size=6))
def test_every_page_once(requests):
    table = PageTable(CFG, SLOTS, torch.device("cpu"))
    owned = [0] * SLOTS
    for tokens in requests:
        before = table.table.clone()
        make_room(table, tokens)
        owned = [max(n, num_pages(CFG, t)) for n, t in zip(owned, tokens, strict=True)]
        for slot, count in enumerate(owned):
            row = table.table[slot]
            assert (row[:count] >= 0).all() and (row[count:] == NO_PAGE).all()
            kept = before[slot][before[slot] >= 0]
            assert torch.equal(row[: len(kept)], kept)
        named = table.table[table.table >= 0].tolist()
        assert len(set(named)) == len(named) <= table.capacity
        assert max(named, default=-1) < table.capacity
        assert table.missing(dict(enumerate(tokens))) == 0


@given(COUNTS, COUNTS)
def test_clear_gives_all_pages_back(first, second):
    table = PageTable(CFG, SLOTS, torch.device("cpu"))
    make_room(table, first)
    capacity = table.capacity
    table.clear()
    assert (table.table == NO_PAGE).all() and table.capacity == capacity
    needed = sum(num_pages(CFG, n) for n in second)
    assert table.missing(dict(enumerate(second))) == max(0, needed - capacity)
    make_room(table, second)


def test_a_fresh_pool_is_filled_in_order():
    table = PageTable(CFG, SLOTS, torch.device("cpu"))
    make_room(table, [96, 0, 64])
    assert table.table[:, :3].tolist() == [[0, 1, 2], [NO_PAGE] * 3, [3, 4, NO_PAGE]]

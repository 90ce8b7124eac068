"""The work list names every split once, in equal runs whose costs are near."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from kivi_tvm.runtime.work import IDLE, work_list

SPLIT = 512
ROWS = st.lists(st.integers(0, 9000), min_size=1, max_size=9)


@given(ROWS, st.integers(1, 8), st.integers(1, 9))
def test_every_split_once_and_nothing_else(packed, heads, threads):
    found = work_list(packed, SPLIT, heads, threads)
    assert found.dtype == torch.int32 and found.ndim == 2 and found.shape[1] == 2
    items = [tuple(item) for item in found.tolist() if tuple(item) != IDLE]
    expected = [(row, i) for row, n in enumerate(packed) for i in range(-(-n // SPLIT))]
    assert sorted(items) == expected


@given(ROWS, st.integers(1, 8), st.integers(1, 9))
def test_no_thread_does_much_more_than_its_share(packed, heads, threads):
    """Whatever is dealt out, the longest part exceeds a fair one by at most two whole items."""
    work = work_list(packed, SPLIT, heads, threads).tolist()
    cost = [min(SPLIT, packed[row] - i * SPLIT) if row >= 0 else 0 for row, i in work]
    units = [c for c in cost for _ in range(heads)]
    size = -(-len(units) // threads)
    parts = [sum(units[at : at + size]) for at in range(0, len(units), max(size, 1))]
    fair = sum(units) / threads
    assert max(parts, default=0) <= fair + 2 * heads * SPLIT


def test_nothing_packed():
    assert work_list([0, 0], SPLIT, 8, 2).shape == (0, 2)

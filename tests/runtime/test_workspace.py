"""Scratch of attention as on a GPU, where steps go on without the host until it has to act."""

import pytest
import torch

from kivi_tvm import KiviConfig, layout
from kivi_tvm.runtime.workspace import Workspace


def on_gpu(cfg):
    """A workspace that lists no work, on the CPU for want of another device."""
    space = Workspace(cfg, cfg.kernel_key(), 1, 1, torch.device("cpu"))
    space._listed = False
    space._allocate(1)
    return space


def parts_of(cfg, space, length):
    packed = layout.packed_values(cfg, length)
    return -(-packed // layout.split_tokens(cfg.kernel_key(), packed, space.split))


@pytest.mark.parametrize(("compute", "page_size"), [("half", 128), ("half", 192), ("float", 128)])
@pytest.mark.parametrize("start", [1, 600, 641, 1200, 1900, 2177, 2500, 3000, 4225, 5000, 6000])
def test_there_is_room_for_every_part_until_the_host_acts(compute, page_size, start):
    """Also after a prefill of rows that have fewer parts than shorter ones."""
    cfg = KiviConfig(64, 2, 1, compute=compute, page_size=page_size)
    space = on_gpu(cfg)
    length, turns = start, 0
    while length < 40_000:
        space.fit([length], 1)
        steps = space.steps_until_new_splits([length])
        assert steps >= 0
        for later in range(length, length + steps + 1):
            assert parts_of(cfg, space, later) <= space.capacity, (length, later)
        length, turns = length + steps + 1, turns + 1
    assert turns < 20  # it grows with the row
    assert space.work.shape == (space.capacity, 2)


def test_few_parts_of_short_rows_are_work():
    space = on_gpu(KiviConfig(64, 2, 1, compute="half"))
    assert space.capacity == 1
    for tokens, capacity in ((512, 1), (1024, 5), (32768, 37)):
        space.fit([128 + tokens], 1)
        assert space.capacity == capacity

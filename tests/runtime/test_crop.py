"""`crop`: exact within the rollback, as the reference says beyond it, refused otherwise."""

import pytest
import torch
from caches import assert_unchanged, feed, snapshot
from configurations import FEW, config_id, with_window
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import draw
from pairs import E, R, add, assert_go_on_alike, pair
from twins import SMALL, WIDE, Twins

WINDOWS = ("kivi", "exact")


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("cfg", FEW, ids=config_id)
def test_every_kind_of_kernel(cfg, window):
    """Over a flush and back, ragged, on every dtype."""
    cfg = with_window(cfg, cfg.G_k)
    lengths, back = [3 * cfg.R - 2, cfg.R - 1, 40], [7, 3, 5]
    cache, never, inputs = pair(cfg, lengths, window=window, rollback=7)
    add(cache, 1, back)
    found = cache.crop(back)
    assert found.exact and list(found.refilled) == [0, 0, 0]
    assert_go_on_alike(cache, never, inputs)


@pytest.mark.parametrize("window", WINDOWS)
def test_every_length_and_count(window):
    """All positions of the cut among flushes and pages: one row per length."""
    lengths = list(range(0, 4 * R + 2, 3))
    for count in (1, E):
        cache, never, inputs = pair(SMALL, lengths, window=window, rollback=E)
        add(cache, count, [count] * len(lengths))
        assert cache.crop(count).exact
        assert_go_on_alike(cache, never, inputs)


@pytest.mark.parametrize("rollback", [R, 2 * R + 3])
@pytest.mark.parametrize("window", WINDOWS)
def test_rollback_of_whole_blocks(window, rollback):
    lengths = list(range(0, 4 * R + 2, 5))
    cache, never, inputs = pair(SMALL, lengths, window=window, rollback=rollback)
    add(cache, 1, [rollback] * len(lengths))
    assert cache.crop(rollback).exact
    assert_go_on_alike(cache, never, inputs)


@pytest.mark.parametrize("window", WINDOWS)
def test_tokens_by_decode(window):
    """Flushes of single steps are taken back like those of `extend`."""
    lengths = [5 * R - 3, 2 * R - 1, 0]
    cache, never, inputs = pair(SMALL, lengths, window=window, rollback=E)
    feed(cache, draw(SMALL, 1, batch_size=3, steps=E, seed=7), E)
    assert cache.crop(E).exact
    assert_go_on_alike(cache, never, inputs)


@settings(max_examples=10)
@given(
    st.sampled_from(WINDOWS),
    st.lists(st.integers(0, 70), min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(1, E), st.randoms(use_true_random=False)), max_size=12),
)
def test_rounds_of_speculation(window, lengths, rounds):
    """Tokens are proposed, some are taken back: only those that stay leave a trace."""
    cache, never, inputs = pair(SMALL, lengths, window=window, rollback=E)
    for seed, (proposed, rng) in enumerate(rounds):
        kept = [rng.randint(0, proposed) for _ in lengths]
        add(cache, seed, [proposed] * len(lengths))
        assert cache.crop([proposed - n for n in kept]).exact
        if any(kept):
            extra = draw(SMALL, proposed, [proposed] * len(lengths), seed=seed)
            q = torch.zeros(len(lengths), SMALL.H, proposed, SMALL.D, dtype=never.dtype)
            never.extend(q, extra.k, extra.v, lengths=kept)
    assert_go_on_alike(cache, never, inputs)


@pytest.mark.parametrize("window", WINDOWS)
def test_layers_are_rolled_back_together(window):
    twins = Twins(SMALL, 2, layers=3, window=window, rollback=E)
    twins.prefill([0, 1], [2 * R - 2, 70])
    twins.extend([E, 5])
    assert twins.crop([E, 5]).exact
    twins.check()
    twins.decode(R + 1)
    twins.check()


@pytest.mark.parametrize("rollback", [0, E])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    "cfg", [SMALL, pytest.param(WIDE, marks=pytest.mark.slow)], ids=["small", "wide"]
)
def test_beyond_the_rollback(cfg, window, rollback):
    """The window is filled with what the codes say; the row goes on from there."""
    for count in (rollback + 1, cfg.R, 2 * cfg.R + 3, 5 * cfg.R):
        twins = Twins(cfg, 3, layers=1, window=window, rollback=rollback)
        twins.prefill([0, 1, 2], [6 * cfg.R + 3, 5 * cfg.R, 5 * cfg.R + cfg.R // 2])
        refilled = twins.crop(count).refilled
        assert any(refilled) and len(refilled) == 3
        twins.check()
        twins.decode(cfg.R + 2)
        twins.check()
        twins.extend([3 * cfg.R, 1, 0])
        twins.check()


def test_refilled_counts_by_hand():
    """Row of 40 tokens, R=16, E=4: values from token 20 on and keys from 20 on are exact."""
    twins = Twins(SMALL, 1, layers=1, rollback=4)
    twins.prefill([0], [40])
    assert twins.crop(4).refilled == [0]  # values from 20 on are the window of 36 tokens
    assert twins.crop(1).refilled == [1]  # value 19 was forgotten; keys of the window begin at 32
    # The window of 20 tokens lacks values 4..18 and keys 16..19: 16 tokens in all.
    assert twins.crop(15).refilled == [16]
    assert twins.cache.report()["refilled"] == [17]
    twins.decode(5)
    assert twins.crop(4).refilled == [0]  # stand-ins count as exact from then on
    twins.cache.free(0)
    assert twins.cache.report()["refilled"] == [0]


def test_stand_ins_are_restored_like_exact_keys():
    """Taken back too far into a block, which is then completed and reopened."""
    twins = Twins(SMALL, 2, layers=1, rollback=E)
    twins.prefill([0, 1], [6 * R, 6 * R + 1])
    assert all(twins.crop([2 * R + 8, 2 * R + 3]).refilled)
    twins.extend([R - 6, R - 6])
    twins.check()
    assert twins.crop(E).exact
    twins.check()
    twins.decode(R)
    twins.check()


def test_a_window_of_prompt_tokens_stays_exact():
    """Without rollback, what the window still holds is exact: no key block is reopened."""
    twins = Twins(SMALL, 1, layers=1)
    twins.prefill([0], [R - 2])
    assert twins.crop(5).exact
    twins.check()
    twins.decode(R)
    twins.check()


def test_everything_may_be_taken_back():
    twins = Twins(SMALL, 2, rollback=E)
    twins.prefill([0, 1], [70, 5])
    assert twins.crop([70, 5]).exact and twins.cache.lengths == [0, 0]
    twins.check()
    assert twins.cache.active == [True, True]
    twins.prefill([0, 1], [3, 50])
    twins.check()


def test_nothing_may_be_taken_back():
    twins = Twins(SMALL, 3)
    twins.free(1)
    assert twins.crop(0).exact
    twins.prefill([0], [50])
    before = snapshot(twins.cache)
    assert twins.crop(0).exact and twins.crop([0, 0, 0]).refilled == [0, 0, 0]
    assert_unchanged(twins.cache, before, [50, 0, 0])


def test_pages_come_back():
    cache, _, inputs = pair(SMALL, [40, 3])
    used = cache.report()["pages"]["used"]
    add(cache, 1, [200, 0])
    assert cache.report()["pages"]["used"] > used
    cache.crop([200, 0])
    assert cache.report()["pages"]["used"] == used
    feed(cache, inputs, 3)

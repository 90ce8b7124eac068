"""A row alone and the same row in any batch, slot, page and thread: the same bits."""

import random

import pytest
import torch
from caches import assert_same_contents, assert_same_outputs, feed, new_cache
from configurations import CONFIGS, FEW, config_id
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import draw

STEPS = 2


def run(cfg, inputs, rows, threads=2, prepare=None, **options):
    """A cache of some rows of the inputs, fed all steps, with its outputs."""
    torch.set_num_threads(threads)
    cache = new_cache(cfg, len(rows), **options)
    if prepare:
        prepare(cache)
    cache.prefill(inputs.k[rows], inputs.v[rows], [inputs.lengths[row] for row in rows])
    return cache, feed(cache, inputs, len(inputs.q), rows)


def assert_rows_agree(one, rows, other, other_rows):
    """Compare the rows that two runs share."""
    for at, row in enumerate(rows):
        if row in other_rows:
            there = other_rows.index(row)
            assert_same_contents(one[0], at, other[0], there)
            assert_same_outputs(one[1], other[1], at, there)


@pytest.mark.parametrize("cfg", CONFIGS, ids=config_id)
def test_every_kernel(cfg):
    inputs = draw(cfg, 700, [700, 3, cfg.R + 40], steps=STEPS)
    batch = run(cfg, inputs, [2, 0, 1])
    for row in range(3):
        assert_rows_agree(run(cfg, inputs, [row], threads=1), [row], batch, [2, 0, 1])


@settings(max_examples=12)
@given(
    st.sampled_from(FEW),
    st.lists(st.integers(0, 1300), min_size=2, max_size=5),
    st.randoms(use_true_random=False),
    st.sampled_from([1, 2, 3]),
)
def test_any_company(cfg, lengths, rng, threads):
    inputs = draw(cfg, max(lengths), lengths, steps=STEPS)
    everyone = list(range(len(lengths)))
    some = rng.sample(everyone, rng.randint(1, len(everyone)))
    batch = run(cfg, inputs, everyone, threads=2)
    assert_rows_agree(run(cfg, inputs, some, threads), some, batch, everyone)


@pytest.mark.parametrize("cfg", FEW, ids=config_id)
def test_permuted_pages(cfg):
    """Which page holds what changes nothing."""
    inputs = draw(cfg, 900, [900, 450], steps=cfg.R + 2)

    def shuffle(cache):
        cache.reserve(900 + cfg.R + 2)
        cache.pages.clear()
        random.Random(0).shuffle(cache.pages._free)

    plain, permuted = run(cfg, inputs, [0, 1]), run(cfg, inputs, [0, 1], prepare=shuffle)
    assert not torch.equal(plain[0].page_table[:, :3], permuted[0].page_table[:, :3])
    assert_rows_agree(plain, [0, 1], permuted, [0, 1])


def test_a_neighbour_full_of_nan():
    cfg = FEW[2]
    inputs = draw(cfg, 500, [500, 400], steps=STEPS)
    k, v = inputs.k.clone(), inputs.v.clone()
    k[1], v[1] = float("nan"), float("inf")
    clean = run(cfg, inputs, [0])
    hurt = run(cfg, inputs._replace(k=k, v=v), [0, 1])
    assert_rows_agree(clean, [0], hurt, [0, 1])
    assert all(out[0].isfinite().all() and out[1].isnan().all() for out, _ in hurt[1])

"""Pairs of caches, of which one has seen tokens that it gave back."""

from __future__ import annotations

import torch
from caches import assert_same_contents, assert_same_outputs, feed, new_cache
from inputs import draw
from pools import assert_same_bits
from twins import SMALL

R, E = SMALL.R, 9


def pair(cfg, lengths, seed=0, **options):
    """Two caches with the same prompts, and inputs for steps to come."""
    inputs = draw(cfg, max(lengths), lengths, steps=2 * cfg.R + 3, seed=seed)
    caches = [new_cache(cfg, len(lengths), **options) for _ in range(2)]
    for cache in caches:
        cache.prefill(inputs.k, inputs.v, lengths)
    return *caches, inputs


def add(cache, seed, lengths):
    """`extend` by tokens that depend on the seed alone; a length 0 leaves the row alone."""
    extra = draw(cache.cfg, max(lengths), lengths, seed=seed)
    q = torch.zeros(len(lengths), cache.cfg.H, max(lengths), cache.cfg.D, dtype=cache.dtype)
    return cache.extend(q, extra.k, extra.v, lengths=lengths)


def assert_equal_caches(cache, other):
    assert cache.lengths == other.lengths
    for found, expected in zip(cache.dequantize(), other.dequantize(), strict=True):
        assert_same_bits(found, expected, "dequantize")
    for row in range(cache.batch_size):
        assert_same_contents(cache, row, other, row)


def assert_go_on_alike(cache, other, inputs):
    """Equal now, in every step across the next flushes, and after another way back."""
    assert_equal_caches(cache, other)
    steps = len(inputs.q)
    assert_same_outputs(feed(cache, inputs, steps), feed(other, inputs, steps))
    assert_equal_caches(cache, other)
    for each in (cache, other):
        assert each.crop(min(each.rollback, min(each.lengths))).exact
    assert_equal_caches(cache, other)

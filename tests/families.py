"""Caches whose rows are copied about, and what every row was told."""

from __future__ import annotations

import torch
from books import assert_pages_add_up
from caches import assert_same_contents, new_cache
from pools import assert_same_bits

LAYERS = 2


class Family:
    """A cache whose rows are copied about, and what each row was told: tokens of every layer."""

    def __init__(self, cfg, batch_size, seed=0, **options):
        self.cfg, self.options = cfg, options
        self.cache = new_cache(cfg, batch_size, num_layers=LAYERS, **options)
        self._generator = torch.Generator().manual_seed(seed)
        empty = torch.zeros(LAYERS, 3, cfg.H_kv, 0, cfg.D, dtype=self.cache.dtype)
        self.told = [empty] * batch_size

    def draw(self, rows, n):
        """Tokens `[rows, layers, (q, k, v), H_kv, n, D]`; queries are repeated over heads."""
        shape = (rows, LAYERS, 3, self.cfg.H_kv, n, self.cfg.D)
        return torch.randn(shape, generator=self._generator).to(self.cache.dtype)

    def extend(self, lengths):
        n = max(lengths)
        tokens = self.draw(len(lengths), n)
        extend(self.cache, tokens, lengths)
        for row, length in enumerate(lengths):
            self.told[row] = torch.cat([self.told[row], tokens[row, ..., :length, :]], -2)

    def select(self, index):
        self.cache.select(index)
        self.told = [self.told[row] for row in index]

    def alone(self, row):
        """A cache that only ever had this row, fed in one go."""
        cache = new_cache(self.cfg, num_layers=LAYERS, **self.options)
        for i in range(LAYERS):
            cache.layer(i).prefill(self.told[row][None, i, 1], self.told[row][None, i, 2])
        return cache

    def check(self, rows=None):
        """Fail unless every row, now and while it goes on, has the bits of one fed alone."""
        cache = self.cache
        rows = range(len(self.told)) if rows is None else rows
        alone = {row: self.alone(row) for row in rows}
        assert_pages_add_up(cache)
        for steps in (0, 1, self.cfg.R):
            tokens = self.draw(cache.batch_size, steps)
            found = decode(cache, tokens)
            for row, other in alone.items():
                expected = decode(other, tokens[row : row + 1])
                assert_same_bits(found[row : row + 1], expected, f"outputs of row {row}")
                for i in range(LAYERS):
                    assert_same_contents(cache, row, other, 0, i)
            assert_pages_add_up(cache)
        back = min(cache.rollback, *cache.lengths)
        assert cache.crop(back).exact
        for row, other in alone.items():
            assert other.crop(back).exact
            assert_same_contents(cache, row, other, 0)


def spread_queries(cfg, q):
    return q.repeat_interleave(cfg.H // cfg.H_kv, 1)


def extend(cache, tokens, lengths):
    """One step of all layers."""
    for i in range(LAYERS):
        q, k, v = tokens[:, i].unbind(1)
        cache.layer(i).extend(spread_queries(cache.cfg, q), k, v, lengths=lengths)


def decode(cache, tokens):
    """Decode steps of all layers, outputs `[B, steps, layers, H, D]`."""
    B, _, _, _, steps, D = tokens.shape
    found = torch.zeros(B, steps, LAYERS, cache.cfg.H, D, dtype=cache.dtype)
    for step in range(steps):
        for i in range(LAYERS):
            q, k, v = tokens[:, i, :, :, step].unbind(1)
            found[:, step, i] = cache.layer(i).decode(spread_queries(cache.cfg, q), k, v)
    return found

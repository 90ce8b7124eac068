"""A cache and the plain-torch KIVI side by side: calls go to both, answers are compared."""

from __future__ import annotations

import copy
import math

import torch
from books import assert_pages_add_up
from caches import new_cache
from configurations import FEW, POINTS, config, module, with_window
from pools import assert_same_bits
from tolerance import assert_close

from kivi_tvm import layout
from kivi_tvm.reference import ReferenceCache, ReferenceRow

# Half a page is one flush: boundaries of blocks and of pages come every few tokens.
SMALL = with_window(config(POINTS[3]), 16)
# A window of three groups, pages of two windows, float32.
WIDE = with_window(FEW[2], 48)


class Twins:
    """A cache of some layers and a `ReferenceCache` for each of them.

    Parameters
    ----------
    cfg : KiviConfig
    batch_size, layers : int
    seed : int
        Of the tokens drawn.
    window, rollback, sink_tokens
        As `new_cache` takes them.
    """

    def __init__(self, cfg, batch_size, layers=2, seed=0, window="kivi", rollback=0, sink_tokens=0):
        self.cfg, self.window = cfg, window
        self.rollback, self.sink_tokens = rollback, sink_tokens
        options = {"window": window, "rollback": rollback, "sink_tokens": sink_tokens}
        self.cache = new_cache(cfg, batch_size, num_layers=layers, **options)
        self.references = [ReferenceCache(cfg, batch_size, **options) for _ in range(layers)]
        self._generator = torch.Generator().manual_seed(seed)

    @property
    def rows(self):
        """The rows of the first layer's reference; None is an inactive one."""
        return self.references[0].rows

    @property
    def lengths(self):
        return [0 if row is None else row.length for row in self.rows]

    @property
    def active(self):
        """Numbers of the active rows."""
        return [i for i, row in enumerate(self.rows) if row is not None]

    def draw(self, lengths, layers=None):
        """`q, k, v [B, heads, n, D]` for every layer; NaN beyond the lengths."""
        n = max(lengths)
        return [self._draw(lengths, n) for _ in range(layers or len(self.references))]

    def _draw(self, lengths, n):
        cfg, dtype = self.cfg, getattr(torch, self.cfg.dtype)
        q, k, v = (
            torch.randn(len(lengths), heads, n, cfg.D, generator=self._generator).to(dtype)
            for heads in (cfg.H, cfg.H_kv, cfg.H_kv)
        )
        for row, length in enumerate(lengths):
            k[row, :, length:] = v[row, :, length:] = math.nan
        return q, k, v

    def prefill(self, rows, lengths):
        """Prompts for empty or inactive rows."""
        for i, (_, k, v) in enumerate(self.draw(lengths)):
            self.cache.layer(i).prefill(k, v, lengths, rows=rows)
            for at, (row, n) in enumerate(zip(rows, lengths, strict=True)):
                if n:
                    self._reference_row(i, row).append(k[at, :, :n], v[at, :, :n])

    def decode(self, steps=1):
        """Steps of one token for every active row."""
        lengths = [int(row is not None) for row in self.rows]
        for _ in range(steps):
            for i, (q, k, v) in enumerate(self.draw(lengths)):
                reference = self.references[i]
                q, k, v = q[:, :, 0], k[:, :, 0], v[:, :, 0]
                out, lse = self.cache.layer(i).decode(q, k, v, return_lse=True)
                reference.append(k, v)
                want, want_lse = reference.attend(q)
                for row, added in enumerate(lengths):
                    if added:
                        assert_close(out[row], want[row], out.dtype, what=f"decode row {row}")
                        assert_close(lse[row], want_lse[row], what=f"lse row {row}", bound=1e-4)
                    else:
                        assert (out[row] == 0).all() and (lse[row] == -math.inf).all()

    def extend(self, lengths):
        """New tokens for every row with a length; inactive ones begin anew."""
        for i, (q, k, v) in enumerate(self.draw(lengths)):
            out = self.cache.layer(i).extend(q, k, v, lengths=lengths)
            want = self.references[i].extend(q, k, v, lengths=lengths)
            for row, n in enumerate(lengths):
                if n:
                    found, expected = out[row, :, :n], want[row, :, :n]
                    assert_close(found, expected, out.dtype, what=f"extend row {row}")

    def crop(self, counts):
        """Take the last tokens back; an int means so many of every active row."""
        found = self.cache.crop(counts)
        every = [counts] * len(self.rows) if isinstance(counts, int) else counts
        every = [0 if row is None else n for row, n in zip(self.rows, every, strict=True)]
        for reference in self.references:
            expected = reference.crop(every)
            assert list(found.refilled) == expected
        assert found.exact == (not any(expected))
        return found

    def select(self, index):
        self.cache.select(index)
        self._select(index)

    def reorder(self, index):
        self.cache.reorder(index)
        self._select(index)

    def repeat(self, n):
        self.cache.repeat(n)
        self._select([row for row in range(len(self.rows)) for _ in range(n)])

    def fork(self, row):
        """Returns the index of the copy."""
        empty = [i for i, each in enumerate(self.rows) if each is None]
        expected = empty[0] if empty else len(self.rows)
        assert self.cache.fork(row) == expected
        for reference in self.references:
            reference.rows[expected : expected + 1] = [copy.deepcopy(reference.rows[row])]
        return expected

    def free(self, row):
        self.cache.free(row)
        for reference in self.references:
            reference.rows[row] = None

    def reset(self):
        self.cache.reset()
        for reference in self.references:
            reference.rows[:] = [self._new_row() for _ in reference.rows]

    def enable_rollback(self, tokens):
        self.cache.enable_rollback(tokens)
        self.rollback = max(self.rollback, tokens)
        for reference in self.references:
            reference.enable_rollback(self.rollback)

    def copy(self):
        """Go on with a copy of the cache."""
        self.cache = self.cache.copy()

    def save_and_load(self, path):
        """Go on with what a file holds."""
        self.cache.save(path)
        self.cache = module(self.cfg).load_cache(path)

    def check(self):
        """Fail unless the cache holds what the references say, and its books are right."""
        cache = self.cache
        assert cache.batch_size == len(self.rows)
        assert cache.lengths == self.lengths
        assert cache.active == [row is not None for row in self.rows]
        assert_pages_add_up(cache)
        self._check_report()
        for i, reference in enumerate(self.references):
            k, v = cache.layer(i).dequantize()
            assert k.shape[2] == v.shape[2] == max(self.lengths)
            for row, held in enumerate(reference.rows):
                self._check_row(f"layer {i} row {row}", held, k[row], v[row])

    def _check_row(self, what, held, k, v):
        expected = torch.zeros_like(k), torch.zeros_like(v)
        if held is not None:
            for dense, seen in zip(expected, held.visible(), strict=True):
                dense[:, : held.length] = seen.to(k.dtype)
        assert_same_bits(k, expected[0], f"{what} keys")
        assert_same_bits(v, expected[1], f"{what} values")

    def _check_report(self):
        report = self.cache.report()
        assert report["lengths"] == self.lengths
        assert report["active"] == self.cache.active
        assert report["window"] == self.window
        assert report["rollback"] == self.rollback == self.cache.rollback
        assert report["sink_tokens"] == self.sink_tokens
        assert report["refilled"] == [0 if row is None else row.refilled for row in self.rows]
        assert report["bytes"] == self.cache.nbytes
        pages = layout.page_buffers(self.cfg, report["pages"]["capacity"]).values()
        packed = len(self.references) * sum(buffer.nbytes for buffer in pages)
        assert report["bytes"]["packed"] == packed

    def _select(self, index):
        for reference in self.references:
            reference.select(index)

    def _reference_row(self, layer, row):
        """The reference of a row, made if the row was inactive."""
        rows = self.references[layer].rows
        if rows[row] is None:
            rows[row] = self._new_row()
        return rows[row]

    def _new_row(self):
        return ReferenceRow(self.cfg, self.window, self.rollback, self.sink_tokens)

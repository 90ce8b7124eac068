"""Partial results of `attend` and `attend_window` against float64 softmax over the same tokens."""

from __future__ import annotations

import torch
from pools import assert_same_bits, poisoned
from tolerance import assert_close, limit


class Partials:
    """Poisoned partial results `[B, H, X, D]` and `[B, H, X, 2]` of (max in log2 units, sum)."""

    def __init__(self, cfg, batch_size, entries):
        self.cfg = cfg
        self.acc = poisoned((batch_size, cfg.H, entries, cfg.D), torch.float32)
        self.stat = poisoned((batch_size, cfg.H, entries, 2), torch.float32)

    @property
    def args(self):
        return self.acc, self.stat

    def assert_equals_softmax(self, row, entry, q, k, v, scale, bound=None):
        """One entry of a row against attention of `q [H, D]` over `k, v [H_kv, t, D]`."""
        score = q.double().unflatten(0, (self.cfg.H_kv, -1)) @ k.double().mT * scale
        score = score.flatten(0, 1)  # [H, t]
        value = v.double().repeat_interleave(self.cfg.M, 0)
        out = torch.einsum("ht,htd->hd", score.softmax(-1), value)
        top, total = self.stat[row, :, entry].double().unbind(-1)
        found = self.acc[row, :, entry].double() / total[:, None]
        worst = score.abs().max().item()
        what = f"row {row} entry {entry}"
        limited = limit(torch.float32, worst, self.cfg.compute_mode())
        assert_close(found, out, what=what, bound=bound or limited)
        lse = (top + total.log2()) * torch.log(torch.tensor(2.0, dtype=torch.float64))
        assert_close(lse, score.logsumexp(-1), what=f"{what} lse", bound=limited)

    def assert_untouched(self, row, entries=slice(None)):
        """Entries of a row that nobody may write."""
        for found in (self.acc[row][:, entries], self.stat[row][:, entries]):
            assert_same_bits(found.contiguous(), poisoned(found.shape, torch.float32), f"row {row}")

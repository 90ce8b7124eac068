"""A batch of sequences, with the calls of `kivi_tvm`'s cache."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor

from kivi_tvm.config import KiviConfig
from kivi_tvm.reference.formulas import attention
from kivi_tvm.reference.row import ReferenceRow


class ReferenceCache:
    """A batch of `ReferenceRow`s in plain torch, one layer.

    Parameters
    ----------
    cfg : KiviConfig
    batch_size : int
    accumulate : torch.dtype
        Dtype of the attention arithmetic and of its results.
    window, rollback, sink_tokens, key_axis
        As in `ReferenceRow`.

    Attributes
    ----------
    rows : list of ReferenceRow or None
        None is an inactive row: put it there to free one; tokens make it active again.
    """

    def __init__(
        self,
        cfg: KiviConfig,
        batch_size: int,
        window: str = "kivi",
        accumulate: torch.dtype = torch.float64,
        rollback: int = 0,
        sink_tokens: int = 0,
        key_axis: str = "channel",
    ) -> None:
        self.cfg, self.accumulate = cfg, accumulate
        self.window, self.rollback = window, rollback
        self.sink_tokens, self.key_axis = sink_tokens, key_axis
        self.rows: list[ReferenceRow | None] = [self._new_row() for _ in range(batch_size)]

    def _new_row(self) -> ReferenceRow:
        return ReferenceRow(self.cfg, self.window, self.rollback, self.sink_tokens, self.key_axis)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, 0 where it is inactive."""
        return [row.length if row else 0 for row in self.rows]

    def enable_rollback(self, rollback: int) -> None:
        """Keep `rollback` tokens from now on; those added before are held as they were."""
        self.rollback = rollback
        for row in filter(None, self.rows):
            row.rollback = rollback

    def prefill(self, k: Tensor, v: Tensor, lengths: Sequence[int] | None = None) -> None:
        """Store `k, v [B, H_kv, T, D]`, the first `lengths[i]` tokens of row `i`.

        Without `lengths`, all `T` in every active row, or in every row if none is active.
        """
        for i, n in enumerate(self._new_lengths(k.shape[2], lengths)):
            if n:
                self._active(i).append(k[i, :, :n], v[i, :, :n])

    def append(self, k: Tensor, v: Tensor) -> None:
        """Store one new token per active row, `k, v [B, H_kv, D]`."""
        for i, row in enumerate(self.rows):
            if row:
                row.append(k[i, :, None], v[i, :, None])

    def attend(self, q: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
        """`q [B, H, D]` against everything stored: out `[B, H, D]` and lse `[B, H]`.

        Inactive rows give 0 and -inf.
        """
        out = torch.zeros(q.shape, dtype=self.accumulate)
        lse = torch.full(q.shape[:2], -torch.inf, dtype=self.accumulate)
        for i, row in enumerate(self.rows):
            if row:
                k, v = (x.to(self.accumulate) for x in row.visible())
                out[i], lse[i] = attention(q[i].to(self.accumulate), k, v, scale)
        return out, lse

    def decode(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """One step: append `k, v [B, H_kv, D]`, then attend with `q [B, H, D]`."""
        self.append(k, v)
        return self.attend(q, scale)[0]

    def extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int] | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Attend to the history as it is and causally to the exact new tokens; then append these.

        Parameters
        ----------
        q : Tensor
            `[B, H, n, D]`.
        k, v : Tensor
            `[B, H_kv, n, D]`, the first `lengths[i]` tokens of row `i`; default as in `prefill`.

        Returns
        -------
        Tensor
            `[B, H, n, D]`, 0 beyond `lengths`.
        """
        out = torch.zeros(q.shape, dtype=self.accumulate)
        for i, n in enumerate(self._new_lengths(k.shape[2], lengths)):
            if n:
                row, new = self._active(i), (k[i, :, :n], v[i, :, :n])
                seen = [torch.cat(x, 1).to(self.accumulate) for x in zip(row.visible(), new)]
                for t in range(n):
                    past = [x[:, : row.length + t + 1] for x in seen]
                    query = q[i, :, t].to(self.accumulate)
                    out[i, :, t] = attention(query, past[0], past[1], scale)[0]
                row.append(*new)
        return out

    def crop(self, c: int | Sequence[int]) -> list[int]:
        """Remove the last `c` tokens of every active row, or `c[i]` of row `i`.

        Returns
        -------
        list of int
            Per row, what `ReferenceRow.crop` returns; 0 for inactive rows.
        """
        counts = [c] * len(self.rows) if isinstance(c, int) else c
        return [row.crop(n) if row else 0 for row, n in zip(self.rows, counts, strict=True)]

    def select(self, index: Sequence[int]) -> None:
        """Row `i` becomes an independent copy of old row `index[i]`; any count."""
        self.rows = [copy.deepcopy(self.rows[i]) for i in index]

    def _new_lengths(self, n: int, lengths: Sequence[int] | None) -> list[int]:
        if lengths is not None:
            return list(lengths)
        none_active = not any(self.rows)
        return [n if row or none_active else 0 for row in self.rows]

    def _active(self, i: int) -> ReferenceRow:
        row = self.rows[i] or self._new_row()
        self.rows[i] = row
        return row

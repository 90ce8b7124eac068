"""Scratch of attention, shared by all layers: partial results and the work list."""

from __future__ import annotations

import torch
import tvm_ffi

from kivi_tvm import layout
from kivi_tvm.config import KernelKey, KiviConfig
from kivi_tvm.runtime.checks import outside_inference_mode
from kivi_tvm.runtime.work import every_split, work_list

SPARE = 8  # where more are needed on a GPU, there is room for another split, and one for so many


class Workspace:
    """Partial results for every split of the longest row and what follows; who computes them.

    Parameters
    ----------
    cfg : KiviConfig
    key : KernelKey
        Of the kernels that use it: how many tokens' queries they take, and where they split.
    tail : int
        Results that follow the splits: 1 for the window, 2 with new tokens before it.

    Attributes
    ----------
    rows : int
        Tokens whose queries one pass takes.
    split, tail : int
        As `combine` takes them: `split` is the most that one part of a row has.
    parts : tuple
        What the kernels take: accumulators `[B, H n, X, D]` and statistics `[B, H n, X, 2]`.
    one_part : bool
        On a GPU in mode "half": whether the packed tokens of every row are one part, and will be
        in the next `R` steps.
    work : object or None
        What `attend` takes, `int32 [n, 2]` of (row, split); None on CPUs while nothing is packed.
    """

    def __init__(
        self, cfg: KiviConfig, key: KernelKey, tail: int, batch_size: int, device: torch.device
    ) -> None:
        self._cfg, self._key = cfg, key
        self._batch_size, self._device = batch_size, device
        self._queries = cfg.H * key.rows_per_query
        self.rows = key.rows_per_query
        self.split, self.tail = key.split_tokens, tail
        # On a GPU every split that there is room for is work, so that launches do not change from
        # step to step. Those beyond a row's tokens end soon, but not for nothing: with room for
        # twice as many splits, steps of 8 rows of 32k tokens took 2% longer on an H100, of 32 rows
        # 5%.
        self._listed = device.type == "cpu"
        self._planned: tuple[int, ...] = ()
        self._items = torch.empty(0, 2, dtype=torch.int32)
        self.work: object | None = None
        self.one_part = False
        # On a GPU never without any: what follows `attend` begins before it ends, and must know
        # that everything before it has ended (`schedules/gpu/combine_window.py`).
        self._allocate(0 if self._listed else 1)

    @property
    def nbytes(self) -> int:
        return self._acc.nbytes + self._stat.nbytes + self._items.nbytes

    @property
    def capacity(self) -> int:
        """Splits of a row that there is room for."""
        return self._acc.shape[2] - self.tail

    def fit(self, lengths: list[int], threads: int) -> None:
        """Prepare for rows of these lengths and kernels on so many threads."""
        packed = [layout.packed_values(self._cfg, length) for length in lengths]
        parts = [layout.split_tokens(self._key, tokens, self.split) for tokens in packed]
        splits = [-(-tokens // part) for tokens, part in zip(packed, parts, strict=True)]
        if (most := max(splits)) > self.capacity:
            self._allocate(most if self._listed else most + 1 + most // SPARE)
        if not self._listed:
            self.one_part = max(packed) + self._cfg.R <= layout.one_part_tokens(self._key)
            return
        plan = (threads, *splits)
        if plan != self._planned:
            self._items = work_list(packed, self.split, self._cfg.H_kv, threads)
            self.work = tvm_ffi.from_dlpack(self._items) if len(self._items) else None
            self._planned = plan

    def steps_until_new_splits(self, lengths: list[int]) -> int:
        """Tokens that every row can take before the work list changes, or there is no room."""
        R, split = self._cfg.R, self.split
        packed = (layout.packed_values(self._cfg, length) for length in lengths)
        rows = zip(packed, lengths, strict=True)
        if not self._listed:
            ends = ((layout.tokens_of_splits(self._key, self.capacity, n), m) for n, m in rows)
            return min((R + end - length for end, length in ends), default=0)
        steps = (-tokens % split if tokens else R - length for tokens, length in rows)
        return min(steps, default=0)

    @outside_inference_mode
    def _allocate(self, splits: int) -> None:
        items = None if self._listed else every_split(self._batch_size, splits, self._device)
        shape = (self._batch_size, self._queries, splits + self.tail)
        acc = torch.empty(*shape, self._cfg.D, device=self._device)
        stat = torch.empty(*shape, 2, device=self._device)
        # All at once: kernels write as many results as `_acc` has room for.
        parts = (tvm_ffi.from_dlpack(acc), tvm_ffi.from_dlpack(stat))
        self._acc, self._stat, self.parts = acc, stat, parts
        if items is not None:
            self._items, self.work = items, tvm_ffi.from_dlpack(items)

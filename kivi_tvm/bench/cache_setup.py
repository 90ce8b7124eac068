"""The filled cache that the operations of `bench cache` start from, and what it must show."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kivi_tvm.errors import UserError
from kivi_tvm.runtime import Cache, Module
from kivi_tvm.workloads import Inputs, Workload, make_inputs

EXTEND = 8  # tokens of `extend`, and of the crop that undoes it
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Setup:
    """A filled cache, what it was filled with, and what it shows: `dense` is its `dequantize`."""

    module: Module
    inputs: Inputs
    rollback: int
    base: Cache
    dense: Pair
    scratch: Path

    @classmethod
    def make(cls, w: Workload, rollback: int, target: str, scratch: Path) -> Setup:
        """Fill a cache with the tokens of `w` and half a window more.

        Raises
        ------
        UserError
            The operations need more rows or tokens, or rows of equal length.
        """
        import kivi_tvm

        least = {
            "rollback": (EXTEND, rollback),
            "tokens": (w.residual_length + rollback, w.tokens),
            "batch_size": (2, w.batch_size),
        }
        for name, (bound, got) in least.items():
            if got < bound:
                raise UserError(f"`{name}` must be at least {bound} here, got {got}")
        if w.lengths is not None:
            raise UserError(f"`lengths` must be None here, got {w.lengths}")
        inputs = make_inputs(replace(w, tokens=w.tokens + w.residual_length // 2), EXTEND)
        module = kivi_tvm.build(w.cfg, target=target)
        base = module.new_cache(batch_size=w.batch_size, rollback=rollback)
        base.prefill(inputs.k, inputs.v)
        base.save(scratch / "base.safetensors")
        return cls(module, inputs, rollback, base, base.dequantize(), scratch)

    @property
    def tokens(self) -> int:
        return self.inputs.k.shape[2]

    @property
    def new(self) -> Pair:
        """The tokens of `extend`, `[B, H_kv, 8, D]`."""
        k, v = (x.movedim(0, 2) for x in (self.inputs.k_new, self.inputs.v_new))
        return k.contiguous(), v.contiguous()

    @property
    def queries(self) -> Tensor:
        """The queries of `extend`, `[B, H, 8, D]`."""
        return self.inputs.q.movedim(0, 2).contiguous()

    def dense_and(self, n: int) -> Pair:
        """What the cache shows, then the first `n` tokens of `extend`."""
        pairs = zip(self.dense, self.new, strict=True)
        k, v = (torch.cat([x, new[:, :, :n]], 2) for x, new in pairs)
        return k, v

    def warm(self) -> Cache:
        """A copy that has taken tokens and given them back: its scratch memory is in place."""
        cache = self.base.copy()
        cache.extend(self.queries, *self.new)
        cache.crop(EXTEND)
        cache.decode(self.inputs.q[0], self.inputs.k_new[0], self.inputs.v_new[0])
        cache.crop(1)
        return cache

    def roomy(self) -> Cache:
        """A copy with free slots and pages, as after some steps: a full pool must grow first."""
        cache, B = self.base.copy(), self.base.batch_size
        cache.repeat(2)
        cache.select(range(0, 2 * B, 2))
        return cache

    def empty(self) -> Cache:
        """A cache of the same kind without tokens."""
        return self.module.new_cache(batch_size=self.base.batch_size, rollback=self.rollback)

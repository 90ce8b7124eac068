"""The plain-torch KIVI in a transformers model: the oracle of tests, the baselines of evaluation.

`ReferenceModule` stands where a built module does, and its caches where runtime caches do; all
that a `KiviCache` does beside that is the same.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kivi_tvm.config import KiviConfig
from kivi_tvm.hf.cache import KiviCache
from kivi_tvm.reference import ReferenceCache


class ReferenceKiviCache(KiviCache):
    """`KiviCache` over `kivi_tvm.reference`: nothing is compiled, every token is kept unpacked.

    Parameters
    ----------
    config, key_bits, ...
        As in `KiviCache`; there is no `target`.
    key_axis : str
        "channel" (KIVI) or "token": keys in groups of channels of one token, the paper's baseline.
    accumulate : torch.dtype
        Dtype of the attention arithmetic.
    """

    def __init__(
        self,
        config: Any,
        *,
        key_axis: str = "channel",
        accumulate: torch.dtype = torch.float64,
        **options: Any,
    ) -> None:
        self.key_axis, self.accumulate = key_axis, accumulate
        super().__init__(config, **options)

    def _build(self, cfg: KiviConfig, device: torch.device) -> ReferenceModule:
        return ReferenceModule(cfg, self.key_axis, self.accumulate)


class ReferenceModule:
    """Makes the caches of one configuration."""

    source = "torch"

    def __init__(
        self,
        cfg: KiviConfig,
        key_axis: str = "channel",
        accumulate: torch.dtype = torch.float64,
    ) -> None:
        self.cfg, self.key_axis, self.accumulate = cfg, key_axis, accumulate

    def new_cache(
        self,
        num_layers: int = 1,
        batch_size: int = 1,
        max_tokens: int | None = None,
        device: torch.device | str = "cpu",
        rollback: int = 0,
        window: str = "kivi",
        sink_tokens: int = 0,
    ) -> ReferenceStore:
        """A cache whose arguments mean what they do in `Module.new_cache`."""
        layers = [
            ReferenceCache(
                self.cfg, batch_size, window, self.accumulate, rollback, sink_tokens, self.key_axis
            )
            for _ in range(num_layers)
        ]
        return ReferenceStore(layers, max_tokens)


class Refilled(NamedTuple):
    """What a crop gives: tokens per row that have a stand-in now."""

    refilled: list[int]


class ReferenceStore:
    """The runtime cache's calls over one `ReferenceCache` per layer, every row active.

    A step is begun once for all layers, so lengths count before the layers hold the tokens.
    """

    def __init__(self, layers: list[ReferenceCache], max_tokens: int | None) -> None:
        self.layers = [ReferenceLayer(x) for x in layers]
        self.max_tokens = max_tokens
        self.lengths = [0] * len(layers[0].rows)

    @property
    def rollback(self) -> int:
        return self.layers[0].cache.rollback

    @property
    def nbytes(self) -> dict[str, int]:
        rows = [row for layer in self.layers for row in layer.cache.rows if row]
        held = [x for row in rows for x in (row.k_exact, row.v_exact, row.k_sink, row.v_sink)]
        total = sum(x.nbytes for x in held)
        return {"torch": total, "total": total}

    def layer(self, i: int) -> ReferenceLayer:
        """The layer `i`."""
        return self.layers[i]

    def begin(self, n: int, lengths: Sequence[int] | None = None) -> None:
        """Count the tokens of a step of `n` new columns."""
        new = [n] * len(self.lengths) if lengths is None else lengths
        total = [a + b for a, b in zip(self.lengths, new, strict=True)]
        if self.max_tokens is not None and max(total) > self.max_tokens:
            raise ValueError(f"`max_tokens` must be at least {max(total)}, got {self.max_tokens}")
        self.lengths = total

    def reset(self) -> None:
        """Forget every token."""
        for layer in self.layers:
            layer.reset()
        self.lengths = [0] * len(self.lengths)

    def crop(self, c: int | Sequence[int]) -> Refilled:
        """Remove the last tokens of each row."""
        refilled = [layer.cache.crop(c) for layer in self.layers]
        self.lengths = self.layers[0].cache.lengths
        return Refilled(refilled[0])

    def enable_rollback(self, rollback: int) -> None:
        """Hold more tokens in full precision from now on."""
        for layer in self.layers:
            layer.cache.enable_rollback(rollback)

    def reorder(self, index: Sequence[int]) -> None:
        """Row `i` becomes a copy of old row `index[i]`."""
        self.select(index)

    def repeat(self, n: int) -> None:
        """Every row `n` times, one after another."""
        self.select([i for i in range(len(self.lengths)) for _ in range(n)])

    def select(self, index: Sequence[int]) -> None:
        """Row `i` becomes a copy of old row `index[i]`, any count."""
        for layer in self.layers:
            layer.cache.select(index)
        self.lengths = [self.lengths[i] for i in index]

    def copy(self) -> ReferenceStore:
        """An independent cache with the same contents."""
        return copy.deepcopy(self)

    def report(self) -> dict[str, Any]:
        """Tokens per row that a crop replaced by stand-ins."""
        rows = self.layers[0].cache.rows
        return {"refilled": [row.refilled if row else 0 for row in rows]}


class ReferenceLayer:
    """One layer of a `ReferenceStore`."""

    def __init__(self, cache: ReferenceCache) -> None:
        self.cache = cache

    def reset(self) -> None:
        """Forget every token."""
        old = self.cache
        self.cache = ReferenceCache(
            old.cfg,
            len(old.rows),
            old.window,
            old.accumulate,
            old.rollback,
            old.sink_tokens,
            old.key_axis,
        )

    def prefill(self, k: Tensor, v: Tensor, lengths: Sequence[int] | None = None) -> None:
        """As `ReferenceCache.prefill`."""
        self.cache.prefill(k, v, lengths)

    def decode(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """As `ReferenceCache.decode`, in the dtype of `q`."""
        return self.cache.decode(q, k, v, scale).to(q.dtype)

    def extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int] | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """As `ReferenceCache.extend`, in the dtype of `q`."""
        return self.cache.extend(q, k, v, lengths, scale).to(q.dtype)

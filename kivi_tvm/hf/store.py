"""The runtime caches behind a `KiviCache`: one for all layers of equal geometry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from kivi_tvm.hf.padding import Padding, Rewind


class LayerStore(Protocol):
    """What is used of one layer of a runtime cache."""

    def prefill(self, k: Tensor, v: Tensor, lengths: Sequence[int] | None = None) -> None:
        """Store a prompt's `k, v [B, H_kv, T, D]`."""

    def decode(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
        """Append `k, v [B, H_kv, D]`, then attend with `q [B, H, D]`."""

    def extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int] | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Attend with `q [B, H, n, D]`, then append `k, v [B, H_kv, n, D]`."""


class CacheStore(Protocol):
    """What is used of a runtime cache."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes held, by part."""

    @property
    def rollback(self) -> int:
        """Tokens that `crop` removes exactly."""

    def layer(self, i: int) -> Any:
        """The `LayerStore` of layer `i`."""

    def begin(self, n: int, lengths: Sequence[int] | None = None) -> None:
        """Start a forward step of `n` new columns."""

    def reset(self) -> None:
        """Forget every token, keep the memory."""

    def crop(self, c: Sequence[int]) -> Any:
        """Remove the last `c[i]` tokens of row `i`; `.refilled` says what got a stand-in."""

    def enable_rollback(self, E: int) -> None:
        """From now on, `crop` of `E` tokens is exact."""

    def select(self, index: Sequence[int]) -> None:
        """Row `i` becomes a copy of old row `index[i]`."""

    def copy(self) -> CacheStore:
        """An independent cache with the same contents."""

    def report(self) -> dict[str, Any]:
        """What was applied; "refilled": tokens of each row that have a stand-in."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """What layers must have in common to share a runtime cache."""

    batch_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, query: Tensor, key: Tensor) -> Geometry:
        """Geometry of `query [B, H, T, D]` and `key [B, H_kv, T, D]`."""
        B, H_kv, _, D = key.shape
        return cls(B, query.shape[1], H_kv, D, key.dtype, key.device)

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")


@dataclass(slots=True)
class Step:
    """One forward of the model over the KIVI layers.

    Parameters
    ----------
    start, tokens : int
        Columns stored before the step, and new ones.
    padding : Padding or None
        Of the new columns.
    mask : Tensor or None
        The mask that was checked; other layers usually get the very same object.
    waiting : set of int
        Layers that have not attended yet.
    rewind : Rewind or None
        What to forget before the step.
    """

    start: int
    tokens: int
    padding: Padding | None
    mask: Tensor | None
    waiting: set[int]
    rewind: Rewind | None = None

    @property
    def lengths(self) -> list[int] | None:
        return None if self.padding is None else self.padding.lengths

    @property
    def width(self) -> int:
        """Tokens of the longest row: columns that are left after compaction."""
        return self.tokens if self.padding is None else max(self.padding.lengths)

    def compact(self, x: Tensor) -> Tensor:
        """`x [B, H, T, D]` without padding: `[B, H, width, D]`."""
        return x if self.padding is None else self.padding.compact(x)


@dataclass(slots=True)
class Store:
    """A runtime cache, the layers that own a part of it, and the step it has begun."""

    geometry: Geometry
    module: Any
    cache: CacheStore
    members: list[int]
    step: Step | None = field(default=None)

    def begin(self, step: Step) -> None:
        """Advance the shared state, once per forward."""
        if self.step is not step:
            self.cache.begin(step.width, step.lengths)
            self.step = step

    def select(self, index: list[int]) -> None:
        """Row `i` becomes a copy of old row `index[i]`."""
        self.cache.select(index)
        self.geometry = replace(self.geometry, batch_size=len(index))

    def copy(self) -> Store:
        """The same with a cache of its own."""
        return Store(self.geometry, self.module, self.cache.copy(), self.members)

    def layer(self, index: int) -> LayerStore:
        layer: LayerStore = self.cache.layer(self.members.index(index))
        return layer

    def describe(self) -> dict[str, Any]:
        """For the report: layers served, geometry, and where the kernels came from."""
        shape = self.geometry
        return {
            "layers": self.members,
            "num_heads": shape.num_heads,
            "num_kv_heads": shape.num_kv_heads,
            "head_dim": shape.head_dim,
            "dtype": shape.dtype_name,
            "device": str(shape.device),
            "source": self.module.source,
        }

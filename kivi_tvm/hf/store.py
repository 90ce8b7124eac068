"""The runtime caches behind a `KiviCache`: one for all layers of equal geometry."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from kivi_tvm.hf.padding import Padding


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

    def layer(self, i: int) -> Any:
        """The `LayerStore` of layer `i`."""

    def begin(self, n: int, lengths: Sequence[int] | None = None) -> None:
        """Start a forward step of `n` new columns."""

    def reset(self) -> None:
        """Forget every token, keep the memory."""


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
    """

    start: int
    tokens: int
    padding: Padding | None
    mask: Tensor | None
    waiting: set[int]

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

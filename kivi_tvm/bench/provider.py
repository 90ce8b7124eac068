"""A provider: one way to compute decode attention, checked before it is timed; who offers some."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kivi_tvm import reference
from kivi_tvm.bench import harness
from kivi_tvm.errors import UserError
from kivi_tvm.workloads import Inputs, Workload

# Torch also rounds scores and probabilities to 16 bits: at most 1.4e-2 with bfloat16 and 1.8e-3
# with float16 over normal, outlier, peaked and zero-mean data at 300 and 4,096 tokens.
PEER_TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
# What a provider keeps the cache in; "ours" are packed codes.
OURS, WIDE, HALF, QUANTIZED = "ours", "32-bit", "16-bit", "quantized"


class Unusable(UserError):
    """A peer that cannot run this workload here, and why."""


@dataclass(frozen=True, slots=True)
class Provider:
    """Calls that do the same work on copies of one cache, and what they must return.

    Parameters
    ----------
    name : str
    source : str
        "default" or "tuned" schedules for ours, "peer" for others.
    calls : sequence of callables
        One per copy; each returns a tensor of `B * H * D` elements in that order.
    nbytes : int
        Bytes that one call must read, by the byte model.
    expected : Tensor
        `[B, H, D]` float64, the first result of every call.
    tolerance : float
        Largest relative L2 distance to `expected` that counts as correct.
    kind : str
        `OURS`, `WIDE`, `HALF` or `QUANTIZED`.
    compute : str, optional
        The compute mode of ours.
    auto : bool
        Whether that is the mode which "auto" takes.
    padded : bool
        Whether shorter rows cost as much as the longest.
    """

    name: str
    source: str
    calls: Sequence[Callable[[], Any]]
    nbytes: int
    expected: Tensor
    tolerance: float
    kind: str = WIDE
    compute: str | None = None
    auto: bool = False
    padded: bool = False

    def check(self) -> float:
        """Run every call once and give the largest relative L2 error."""
        return max(relative_l2(call(), self.expected) for call in self.calls)


@dataclass(frozen=True)
class Setting:
    """What peers are made from: a workload's inputs, and how many copies a run rotates over.

    Parameters
    ----------
    w : Workload
    inputs : Inputs
    state : str
        "cold" or "warm".
    l3_bytes : int
    """

    w: Workload
    inputs: Inputs
    state: str
    l3_bytes: int
    shared: dict[Any, Any] = field(default_factory=dict)

    def copies(self, nbytes: int) -> int:
        """Copies of a cache of `nbytes`."""
        return harness.copies_for(nbytes, self.state, self.l3_bytes)

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """What `make` returned for `key` before, or returns now."""
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of every row, the new one included."""
        return [length + 1 for length in self.w.row_lengths]

    @cached_property
    def keys(self) -> Tensor:
        """`[B, H_kv, T + 1, D]` with the new token in its place and zeros behind it."""
        return self._appended(self.inputs.k, self.inputs.k_new)

    @cached_property
    def values(self) -> Tensor:
        """Like `keys`."""
        return self._appended(self.inputs.v, self.inputs.v_new)

    def _appended(self, old: Tensor, new: Tensor) -> Tensor:
        shape = (*old.shape[:2], max(self.lengths), old.shape[3])
        made = torch.zeros(shape, dtype=old.dtype)
        for row, length in enumerate(self.lengths):
            made[row, :, : length - 1] = old[row, :, : length - 1]
            made[row, :, length - 1] = new[0][row]
        return made

    def exact(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """`exact_attention` over the valid tokens of `k, v [B, H_kv, T, D]`."""
        return exact_attention(q, k, v, self.lengths)


@dataclass(frozen=True, slots=True)
class Peer:
    """Another implementation under one name.

    Parameters
    ----------
    name : str
    kind : str
        `WIDE`, `HALF` or `QUANTIZED`: what it keeps the cache in.
    make : callable
        From a `Setting`; raises `Unusable` where it cannot run.
    modules : tuple of str
        What must be importable.
    install : str
        How to get that.
    default : bool
        Whether it runs when no peers are named.
    """

    name: str
    kind: str
    make: Callable[[Setting], Provider]
    modules: tuple[str, ...] = ()
    install: str = ""
    default: bool = True

    def missing(self) -> str | None:
        """Why it cannot run at all, or None."""
        absent = [name for name in self.modules if importlib.util.find_spec(name) is None]
        return f"no {' and '.join(absent)} here: {self.install}" if absent else None


def relative_l2(output: Tensor, expected: Tensor) -> float:
    """`|output - expected| / |expected|` in float64; infinity if anything is not finite."""
    difference = output.double().reshape(expected.shape) - expected
    error = float(difference.norm() / expected.norm())
    return error if math.isfinite(error) else math.inf


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int] | None = None
) -> Tensor:
    """float64 attention of `q [B, H, D]` over `k, v [B, H_kv, T, D]` as they are stored.

    `lengths` are the valid tokens of every row, all `T` by default.
    """
    rows = [
        reference.attention(q[i].double(), k[i, :, :n].double(), v[i, :, :n].double())[0]
        for i, n in enumerate(lengths or [k.shape[2]] * len(q))
    ]
    return torch.stack(rows)

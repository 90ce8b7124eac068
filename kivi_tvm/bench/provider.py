"""A provider: one way to compute decode attention, checked before it is timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kivi_tvm import reference

# Torch also rounds scores and probabilities to 16 bits: at most 1.4e-2 with bfloat16 and 1.8e-3
# with float16 over normal, outlier, peaked and zero-mean data at 300 and 4,096 tokens.
PEER_TOLERANCES = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}


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
    """

    name: str
    source: str
    calls: Sequence[Callable[[], Any]]
    nbytes: int
    expected: Tensor
    tolerance: float

    def check(self) -> float:
        """Run every call once and give the largest relative L2 error."""
        return max(relative_l2(call(), self.expected) for call in self.calls)


def relative_l2(output: Tensor, expected: Tensor) -> float:
    """`|output - expected| / |expected|` in float64; infinity if anything is not finite."""
    difference = output.double().reshape(expected.shape) - expected
    error = float(difference.norm() / expected.norm())
    return error if math.isfinite(error) else math.inf


def exact_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """float64 attention of `q [B, H, D]` over `k, v [B, H_kv, T, D]` as they are stored."""
    rows = zip(q.double(), k.double(), v.double(), strict=True)
    return torch.stack([reference.attention(*row)[0] for row in rows])

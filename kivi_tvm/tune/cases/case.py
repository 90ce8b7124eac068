"""What a case consists of, as `measure.py` reads it: its docstring has the format."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kivi_tvm.layout import Buffer
from kivi_tvm.tune.measure import FORMAT

Argument = dict[str, Any]
Rule = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """One call: its arguments, what is compared by relative L2, its share of the time."""

    arguments: list[Argument]
    close: list[Rule] = field(default_factory=list)
    weight: float = 1.0

    def to_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "arguments": self.arguments, "close": self.close}


@dataclass(frozen=True, slots=True)
class Case:
    """The calls on which candidates of a task are checked and timed.

    Parameters
    ----------
    task_id, function : str
    check : list of Call
        Small ones whose every argument comes with what the call must leave in it.
    timed : list of Call
        The task's workload; big arguments are recipes that the measuring process follows.
    nbytes : int
        What a timed call must read and write, by layout.
    """

    task_id: str
    function: str
    check: list[Call]
    timed: list[Call]
    nbytes: int

    def save(self, path: Path) -> None:
        """Write the case as one file of plain data and tensors, complete or not at all."""
        part = path.with_name(f".{path.name}.{os.getpid()}")
        content = {
            "format": FORMAT,
            "task": self.task_id,
            "function": self.function,
            "nbytes": self.nbytes,
            "check": [call.to_dict() for call in self.check],
            "timed": [call.to_dict() for call in self.timed],
        }
        torch.save(content, part)
        os.replace(part, path)


def scalar(value: float) -> Argument:
    """A number."""
    return {"scalar": value}


def tensor(
    value: Tensor, after: Tensor | None = None, words: bool = False, cold: bool = False
) -> Argument:
    """A tensor; `after` is what the call leaves in it, by default the same."""
    return {"tensor": value, "after": after, "words": words, "cold": cold}


def fill(buffer: Buffer, how: str, amount: float = 1.0, cold: bool = True) -> Argument:
    """A recipe of a tensor: how its elements are drawn (`measure.FILLS`) and their size."""
    words = buffer.dtype == "uint32"
    dtype = "int32" if words else buffer.dtype
    shape = list(buffer.shape)
    return {
        "fill": how, "amount": amount, "shape": shape, "dtype": dtype, "words": words, "cold": cold,
    }  # fmt: skip


def ints(values: Sequence[Any]) -> Argument:
    """An int32 tensor."""
    return tensor(torch.tensor(values, dtype=torch.int32))


def strided(x: Tensor, start: int = 3) -> Tensor:
    """The same values as a view with inner stride 1 and awkward outer strides.

    Rows begin at element `start` of 8 more than they have.
    """
    *outer, tokens_or_heads, D = x.shape
    room = x.new_full((tokens_or_heads, *outer, D + 8), math.nan)
    view = room[..., start : D + start].movedim(0, -2)
    view.copy_(x)
    return view


def strided_queries(x: Tensor, compute: str) -> Tensor:
    """`strided`; from multiples of 16 bytes on in mode "half", where kernels load so many."""
    return strided(x, 8 if compute == "half" else 3)

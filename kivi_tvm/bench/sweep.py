"""Workloads of a sweep: the cross product of what varies."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kivi_tvm.errors import UserError
from kivi_tvm.workloads import Workload

MIN_RAGGED_TOKENS = 100


@dataclass(frozen=True, slots=True)
class Axes:
    """Values of everything that a sweep can vary; an empty one leaves what the model has."""

    tokens: Sequence[int] = ()
    batch_size: Sequence[int] = ()
    queries_per_kv: Sequence[int] = ()
    head_dim: Sequence[int] = ()
    bits: Sequence[int] = ()
    group_size: Sequence[int] = ()


def values(w: Workload) -> dict[str, int]:
    """Where `w` lies on each of the axes of `Axes`."""
    return {
        "tokens": w.tokens,
        "batch_size": w.batch_size,
        "queries_per_kv": w.num_heads // w.num_kv_heads,
        "head_dim": w.head_dim,
        "bits": w.key_bits,
        "group_size": w.group_size,
    }


def workloads(base: Workload, axes: Axes, ragged: bool = False) -> list[Workload]:
    """Every combination, tokens the fastest to change.

    Parameters
    ----------
    base : Workload
    axes : Axes
        `queries_per_kv` keeps the query heads and changes the key/value heads.
    ragged : bool
        Rows of different lengths, see `lengths`.

    Raises
    ------
    UserError
        A combination is not possible.
    """
    order = [name for name in Axes.__slots__ if name != "tokens"] + ["tokens"]
    own = values(base)
    chosen = [getattr(axes, name) or [own[name]] for name in order]
    return [
        _workload(base, dict(zip(order, point, strict=True)), ragged)
        for point in itertools.product(*chosen)
    ]


def _workload(base: Workload, point: dict[str, int], ragged: bool) -> Workload:
    M, B, T = point["queries_per_kv"], point["batch_size"], point["tokens"]
    if M < 1 or base.num_heads % M:
        raise UserError(f"`queries_per_kv` must divide num_heads={base.num_heads}, got {M}")
    if T < 1:
        raise UserError(f"`tokens` must be at least 1, got {T}")
    try:
        made = replace(
            base,
            num_kv_heads=base.num_heads // M,
            key_bits=point["bits"],
            value_bits=point["bits"],
            tokens=T,
            batch_size=B,
            head_dim=point["head_dim"],
            group_size=point["group_size"],
            lengths=lengths(B, T, base.seed) if ragged else None,
        )
        _ = made.cfg
    except ValueError as error:
        raise UserError(str(error)) from error
    return made


def lengths(batch_size: int, tokens: int, seed: int = 0) -> tuple[int, ...]:
    """Row lengths drawn evenly between 100 and `tokens`, both of which occur; always the same.

    Raises
    ------
    UserError
        There is no room for two different rows.
    """
    if batch_size < 2:
        raise UserError(f"`batch_size` must be at least 2 for ragged rows, got {batch_size}")
    if tokens <= MIN_RAGGED_TOKENS:
        rule = f"must be above {MIN_RAGGED_TOKENS} for ragged rows"
        raise UserError(f"`tokens` {rule}, got {tokens}")
    draw = random.Random(seed)
    between = [draw.randint(MIN_RAGGED_TOKENS, tokens) for _ in range(batch_size - 2)]
    return (tokens, *between, MIN_RAGGED_TOKENS)

"""The configurations that tests compile: at most 24 that cover the grid pair by pair."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import pytest

from kivi_tvm.config import (
    BITS,
    DTYPES,
    GROUP_SIZES,
    HEAD_DIMS,
    MIN_PAGE_SIZE,
    KiviConfig,
)

PAGE_UNITS = (1, 2, 3)  # page size over the smallest one that the key group allows
QUERIES_PER_KV = (1, 4, 7, 8, 71)


class Point(NamedTuple):
    """One point of the grid of kernel keys."""

    head_dim: int
    queries_per_kv: int
    key_bits: int
    value_bits: int
    key_group_size: int
    value_group_size: int
    page_units: int
    dtype: str

    @property
    def is_valid(self) -> bool:
        return self.head_dim % self.value_group_size == 0


AXES = dict(
    zip(
        Point._fields,
        (HEAD_DIMS, QUERIES_PER_KV, BITS, BITS, GROUP_SIZES, GROUP_SIZES, PAGE_UNITS, DTYPES),
        strict=True,
    )
)
PAIRS = list(itertools.combinations(AXES, 2))
# Pairs of axes that 24 configurations cannot cover in full: 7 x 5 and 7 x 4 values are more than
# 24, and group size 128 exists for two head dims alone, which would need 11 rows for themselves
# (one for each number of heads or key group size, and one for each smaller group) beside 3 for
# each of the other five head dims. The slow tests compile what is missing here.
WAIVED = {
    ("head_dim", "queries_per_kv"),
    ("head_dim", "key_group_size"),
    ("queries_per_kv", "value_group_size"),
    ("key_group_size", "value_group_size"),
}

# Found by simulated annealing on the number of uncovered pairs; `test_configurations` checks it.
POINTS = [
    Point(64, 1, 4, 8, 64, 16, 1, "float32"),
    Point(64, 4, 8, 4, 128, 32, 2, "bfloat16"),
    Point(64, 8, 2, 2, 32, 64, 3, "float16"),
    Point(80, 1, 2, 4, 16, 16, 1, "float16"),
    Point(80, 7, 4, 8, 64, 16, 2, "bfloat16"),
    Point(80, 71, 8, 2, 32, 16, 3, "float32"),
    Point(96, 7, 4, 4, 128, 16, 3, "float32"),
    Point(96, 8, 8, 2, 16, 32, 2, "bfloat16"),
    Point(96, 71, 2, 8, 32, 32, 1, "float16"),
    Point(112, 4, 4, 2, 64, 16, 3, "float16"),
    Point(112, 8, 2, 8, 128, 16, 1, "float32"),
    Point(112, 71, 8, 4, 16, 16, 2, "bfloat16"),
    Point(128, 1, 8, 2, 128, 64, 2, "float32"),
    Point(128, 4, 2, 8, 32, 16, 2, "float16"),
    Point(128, 7, 2, 4, 64, 32, 1, "bfloat16"),
    Point(128, 8, 4, 8, 16, 128, 3, "float32"),
    Point(192, 1, 2, 8, 128, 32, 3, "float32"),
    Point(192, 7, 8, 2, 16, 16, 1, "float16"),
    Point(192, 71, 4, 4, 64, 64, 2, "bfloat16"),
    Point(256, 1, 8, 2, 32, 128, 1, "bfloat16"),
    Point(256, 4, 8, 8, 16, 64, 1, "float32"),
    Point(256, 7, 4, 4, 32, 32, 3, "bfloat16"),
    Point(256, 8, 8, 4, 64, 16, 3, "float32"),
    Point(256, 71, 2, 4, 128, 128, 2, "float16"),
]


def grid() -> list[Point]:
    """Every valid point."""
    return [p for p in itertools.starmap(Point, itertools.product(*AXES.values())) if p.is_valid]


def pairs_of(point: Point) -> set[tuple[str, str, object, object]]:
    """The pairs (axis, axis, value, value) of one point."""
    return {(a, b, getattr(point, a), getattr(point, b)) for a, b in PAIRS}


def pairs_of_all(points: list[Point]) -> set[tuple[str, str, object, object]]:
    return set().union(*map(pairs_of, points))


def config(point: Point) -> KiviConfig:
    """A configuration of the point; heads and window differ between points, too.

    In the exact compute mode: what an integer mode rounds would hide a wrong token.
    """
    heads = 1 if point.queries_per_kv == 71 else 1 + point.page_units % 2
    group = point.key_group_size
    return KiviConfig(
        head_dim=point.head_dim,
        num_heads=heads * point.queries_per_kv,
        num_kv_heads=heads,
        key_bits=point.key_bits,
        value_bits=point.value_bits,
        key_group_size=group,
        value_group_size=point.value_group_size,
        residual_length=group * (3 if group <= 32 else 1),
        page_size=point.page_units * max(MIN_PAGE_SIZE, group),
        dtype=point.dtype,
        compute="float",
    )


CONFIGS = [config(point) for point in POINTS]
# What properties of the cache, not of the kernels, are tested on: one of each dtype.
FEW = [config(POINTS[i]) for i in (2, 4, 15)]

# The same in mode "half": for GPUs with tensor cores.
HALF = [replace(cfg, compute="half") for cfg in CONFIGS if cfg.dtype != "float32"]


def config_id(cfg: KiviConfig) -> str:
    """A name that can be read aloud."""
    slug = cfg.kernel_key().slug.removesuffix("-plain-float").replace("-fragment", "")
    return f"Hkv{cfg.H_kv}-{slug}-R{cfg.residual_length}"


def slow_but(fast, cfgs):
    """Configurations as parameters; the fast tests run those in `fast`."""
    assert fast and all(cfg in cfgs for cfg in fast)
    return [
        pytest.param(cfg, id=config_id(cfg), marks=[] if cfg in fast else [pytest.mark.slow])
        for cfg in cfgs
    ]


def spread(values, each=3):
    """Every configuration with every value; the fast tests run `each` values per configuration."""
    params = []
    for i, cfg in enumerate(CONFIGS):
        share = {(i + 3 * j) % len(values) for j in range(each)} if each < len(values) else None
        for j, value in enumerate(values):
            marks = [] if share is None or j in share else [pytest.mark.slow]
            params.append(pytest.param(cfg, value, id=f"{config_id(cfg)}-{value}", marks=marks))
    return params


@cache
def library(cfg: KiviConfig):
    """The kernels of `cfg`, compiled once per kernel key."""
    return module(cfg).library


@cache
def module(cfg: KiviConfig):
    """The module of `cfg`; configurations with equal kernel keys share the library on disk."""
    from kivi_tvm import build

    return build(cfg)


def with_window(cfg: KiviConfig, residual_length: int) -> KiviConfig:
    """The same kernels with another window."""
    return replace(cfg, residual_length=residual_length)

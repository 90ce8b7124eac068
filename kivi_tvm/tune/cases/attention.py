"""Cases of attention: partial results, against float64 softmax over the same tokens."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from kivi_tvm import layout, reference
from kivi_tvm.config import KernelKey, KiviConfig
from kivi_tvm.ops import ALL_FUNCTIONS
from kivi_tvm.tune.candidate import Task
from kivi_tvm.tune.cases.case import (
    Argument,
    Call,
    Case,
    Rule,
    ints,
    scalar,
    strided,
    strided_queries,
    tensor,
)
from kivi_tvm.tune.cases.inputs import (
    KEYS,
    RINGS,
    TABLES,
    VALUES,
    Lengths,
    Timed,
    draw,
    held,
    nbytes,
    page_nbytes,
    token_nbytes,
)
from kivi_tvm.tune.cases.tolerance import limit
from kivi_tvm.tune.measure import ANY, UNTOUCHED, poisoned
from kivi_tvm.tune.pools import Pool

PAGES = (*KEYS, *VALUES)
LOWEST = torch.finfo(torch.float32).min


class Partials:
    """Poisoned partial results and what a call must write into them.

    Parameters
    ----------
    B, H, X, D : int
        Rows, heads times queries, entries, channels.
    compute : str
        How the results are computed.
    """

    def __init__(self, B: int, H: int, X: int, D: int, compute: str = "float") -> None:
        self._compute = compute
        self.acc, self.stat = (poisoned((B, H, X, n), torch.float32) for n in (D, 2))
        self.after = self.acc.clone(), self.stat.clone()
        self._group = torch.full((B, H, X), UNTOUCHED)
        self._out = torch.zeros(B, H, X, D, dtype=torch.float64)
        self._lse = torch.zeros(B, H, X, dtype=torch.float64)
        self._limits: list[float] = []

    def expect(
        self, at: tuple[int, slice, int], q: Tensor, k: Tensor, v: Tensor, scale: float
    ) -> None:
        """Row, heads and entry hold attention of `q [heads, D]` over `k, v [H_kv, t, D]`."""
        q, k, v = q.double(), k.double(), v.double()
        self._out[at], self._lse[at] = reference.attention(q, k, v, scale)
        score = q.reshape(k.shape[0], -1, k.shape[-1]) @ k.mT * scale
        self._group[at] = len(self._limits)
        self._limits.append(limit(torch.float32, score.abs().max().item(), self._compute))

    def expect_nothing(self, row: int, entry: int) -> None:
        """The row has no token: weight 0 at the lowest maximum."""
        acc, stat = self.after
        acc[row, :, entry] = 0
        stat[row, :, entry] = torch.tensor([LOWEST, 0])

    def allow(self, at: tuple[int, slice, int]) -> None:
        """Whatever is written there."""
        self._group[at] = ANY

    def arguments(self) -> list[Argument]:
        """What the kernel takes."""
        return [tensor(self.acc, self.after[0]), tensor(self.stat, self.after[1])]

    def rule(self, number: int) -> Rule:
        """How `acc`, argument `number`, and `stat` behind it are compared."""
        return {
            "of": [number, number + 1],
            "group": self._group,
            "limits": self._limits,
            "expected": [self._out, self._lse],
        }


def _rows(task: Task) -> int:
    """Tokens whose queries the task's function takes."""
    return task.key.extend_rows if ALL_FUNCTIONS[task.function][1] else 1


def _key(task: Task) -> KernelKey:
    """Of the task's function."""
    return replace(task.key, rows_per_query=_rows(task))


def _split(task: Task, packed: int) -> int:
    """Packed tokens of one work item of the task's function, of a row that has `packed`."""
    key = _key(task)
    split: int = layout.split_tokens(key, packed, key.split_tokens)
    return split


def _queries(q: Tensor) -> Tensor:
    """`q [n, B, H, D]` of `n` tokens as kernels take them, `[B, H n, D]`."""
    return q.permute(1, 2, 0, 3).flatten(1, 2)


def splits_of(task: Task, cfg: KiviConfig, lengths: Lengths) -> list[int]:
    """Work items of every row."""
    packed = [layout.packed_values(cfg, n or 0) for n in lengths]
    return [-(-n // _split(task, n)) for n in packed]


def attend(task: Task) -> Case:
    """`attend` and `extend_attend`: one result per split of the packed tokens."""
    R, split, tail = task.workload.cfg.R, _key(task).split_tokens, 1 + (_rows(task) > 1)
    found = Timed(task)
    splits = splits_of(task, found.cfg, found.lengths)
    if not max(splits):
        raise ValueError(
            f"`tokens` must exceed residual_length={R} for {task.function} to have work, "
            f"got {task.workload.tokens}"
        )
    work = [(row, i) for row, count in enumerate(splits) for i in range(count)]
    q, parts = found.queries(_rows(task)), found.parts(_rows(task), max(splits) + tail)
    scale = scalar(found.cfg.D**-0.5)
    arguments = [*found.pages(PAGES), *found.tables(), ints(work), q, scale, *parts]
    packed = [layout.packed_values(found.cfg, n) for n in found.lengths]
    moved = page_nbytes(found.cfg, packed, PAGES) + nbytes(q)
    moved += sum(splits) * nbytes(*parts) // (found.B * (max(splits) + tail))
    checks = [
        _check_attend(task, [R + 500, None, R + 1, R + 31, 0, R, R + split + 63], "normal"),
        _check_attend(task, [R + 33, R + 200], "outlier"),
        _check_attend(task, [R + 200], "peaked"),
    ]
    return Case(task.id, task.function, checks, [Call(arguments)], moved)


def _check_attend(task: Task, lengths: Lengths, data: str) -> Call:
    cfg, inputs = draw(task, lengths, data, steps=_rows(task))
    q, scale = _queries(inputs.q), cfg.D**-0.5
    pool = Pool(cfg, lengths)
    pool.store_keys(inputs.k)
    pool.store_values(inputs.v)
    entries = max(splits_of(task, cfg, lengths)) + 2
    parts = Partials(len(lengths), q.shape[1], entries, cfg.D, cfg.compute_mode())
    work = []
    for row, _, _ in pool.active():
        k, v = pool.dense_keys(inputs.k, row), pool.dense_values(inputs.v, row)
        split = _split(task, v.shape[1])
        for index, first in enumerate(range(0, v.shape[1], split)):
            part = slice(first, min(first + split, v.shape[1]))
            at = row, slice(None), index
            parts.expect(at, q[row], k[:, part], v[:, part], scale)
            work.append((row, index))
    idle = [(-1, 0)]
    items = ints(idle + work[::-1] + idle)
    queries = strided_queries(q, _key(task).compute)
    start = [*held(pool, (*PAGES, *TABLES)), items, tensor(queries), scalar(scale)]
    return Call([*start, *parts.arguments()], [parts.rule(len(start))])


def attend_window(task: Task) -> Case:
    """`attend_window` and `extend_window`: one result per row."""
    R, rows = task.workload.cfg.R, _rows(task)
    found, tail = Timed(task), 1 + (rows > 1)
    splits = max(splits_of(task, found.cfg, found.lengths))
    q, parts, rings = found.queries(rows), found.parts(rows, splits + tail), found.rings()
    scale = scalar(found.cfg.D**-0.5)
    arguments = [*rings, *found.state(), q, scale, scalar(1), *parts]
    tokens = sum(min(n, R) for n in found.lengths)
    moved = 2 * token_nbytes(found.cfg, tokens) + nbytes(q) + nbytes(*parts) // (splits + tail)
    ragged = [500, None, 1, R - 1, R, 0, R + 1, 2 * R + 31]
    checks = [
        _check_window(task, ragged, "normal", 1),
        _check_window(task, [R + 5, None, 3], "outlier", 2),
        _check_window(task, [2 * R], "peaked", 3),
    ]
    return Case(task.id, task.function, checks, [Call(arguments)], moved)


def _check_window(task: Task, lengths: Lengths, data: str, entry: int) -> Call:
    cfg, inputs = draw(task, lengths, data, steps=_rows(task))
    q, scale = _queries(inputs.q), cfg.D**-0.5
    pool = Pool(cfg, lengths, rollback=entry - 1)
    pool.store_rings(inputs.k, inputs.v, write_back=False)
    parts = Partials(len(lengths), q.shape[1], 3, cfg.D)
    for row, _, length in pool.active():
        k, v = (x[row, :, max(0, length - cfg.R) : length] for x in (inputs.k, inputs.v))
        if length:
            parts.expect((row, slice(None), 3 - entry), q[row], k, v, scale)
        else:
            parts.expect_nothing(row, 3 - entry)
    start = [
        *held(pool, (*RINGS, "state", "slots")), tensor(strided(q)), scalar(scale), scalar(entry),
    ]  # fmt: skip
    return Call([*start, *parts.arguments()], [parts.rule(len(start))])


def extend_new(task: Task) -> Case:
    """`extend_new`: causal attention of new tokens to new tokens, one result per row."""
    rows = _rows(task)
    found = Timed(task)
    splits = max(splits_of(task, found.cfg, found.lengths))
    k, v = found.tokens(rows, cold=False)
    q, parts = found.queries(rows), found.parts(rows, splits + 2)
    scale, added = scalar(found.cfg.D**-0.5), ints([rows] * found.B)
    arguments = [found.state()[1], added, k, v, q, scalar(0), scale, *parts]
    moved = nbytes(k, v, q) + nbytes(*parts) // (splits + 2)
    checks = [
        _check_new(task, [rows, None, 1, max(1, rows - 1)], 0, "normal"),
        _check_new(task, [5 * rows, 2 * rows + 1], 2 * rows, "outlier"),
    ]
    return Case(task.id, task.function, checks, [Call(arguments)], moved)


def _check_new(task: Task, added: Lengths, first: int, data: str) -> Call:
    """Queries `first ..` of one pass; hidden tokens and those beyond a row's count are poison."""
    rows = _rows(task)
    cfg, inputs = draw(task, added, data, steps=rows)
    q, scale = _queries(inputs.q), cfg.D**-0.5
    k, v = (poisoned(x.shape, x.dtype) for x in (inputs.k, inputs.v))
    parts = Partials(len(added), q.shape[1], 3, cfg.D)
    for row, count in enumerate(added):
        if count is None:
            continue
        seen = min(count, first + rows)
        k[row, :, :seen], v[row, :, :seen] = inputs.k[row, :, :seen], inputs.v[row, :, :seen]
        for i in range(rows):
            at, upto = (row, slice(i, None, rows), 1), first + i + 1
            if upto > count:
                parts.allow(at)
            else:
                parts.expect(at, q[row, i::rows], k[row, :, :upto], v[row, :, :upto], scale)
    slots = ints([-1 if n is None else row for row, n in enumerate(added)])
    start = [
        slots, ints([n or 0 for n in added]), tensor(strided(k)), tensor(strided(v)),
        tensor(strided(q)), scalar(first), scalar(scale),
    ]  # fmt: skip
    return Call([*start, *parts.arguments()], [parts.rule(len(start))])

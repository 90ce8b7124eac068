"""Cases of what ends a step: partial results merged, or all at once, against float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kivi_tvm import layout, reference
from kivi_tvm.config import KiviConfig
from kivi_tvm.ops.combine_few import has_few
from kivi_tvm.tune.candidate import Task
from kivi_tvm.tune.cases.attention import PAGES, splits_of
from kivi_tvm.tune.cases.case import (
    Argument,
    Call,
    Case,
    scalar,
    strided,
    strided_queries,
    tensor,
)
from kivi_tvm.tune.cases.inputs import (
    BATCH_HEADS,
    RINGS,
    Lengths,
    Timed,
    draw,
    held,
    nbytes,
    page_nbytes,
    repeated,
    token_nbytes,
)
from kivi_tvm.tune.cases.tolerance import limit
from kivi_tvm.tune.measure import UNTOUCHED, poisoned
from kivi_tvm.tune.pools import Pool

MIDDLE_HEADS = 256  # of all rows; an H100 calls neither `combine_few` nor `combine_batch` for them
WAVES = 4  # so many times a batch, so that it matters less how full a GPU is at the end
BATCH_NAMES = (*PAGES, "table", *RINGS, "state", "slots")
Parts = tuple[Tensor, Tensor]  # `acc [H, X, D]` and `stat [H, X, 2]`


def combine(task: Task) -> Case:
    """`combine`: partial results merged by log-sum-exp."""
    found = Timed(task)
    splits = splits_of(task, found.cfg, found.lengths)
    parts, results = found.parts(1, max(splits) + 1), _results(found)
    scalars = scalar(task.key.split_tokens), scalar(1)
    moved = (sum(splits) + found.B) * nbytes(*parts) // (found.B * (max(splits) + 1))
    checks = [_check(task, spread, tail) for spread, tail in ((1, 1), (60, 2))]
    arguments = [*found.state(), *scalars, *parts, *results]
    return Case(task.id, task.function, checks, [Call(arguments)], moved + nbytes(*results))


def combine_batch(task: Task) -> Case:
    """`combine_batch`: the same, timed on so many rows that it is called for them."""
    return _combine_window(task, BATCH_HEADS)


def attend_batch(task: Task) -> Case:
    """`attend_batch`: attention to packed tokens and the window, timed on a batch of short rows."""
    cfg, longest = task.workload.cfg, layout.one_part_tokens(task.key)
    lengths = [min(n, cfg.R + longest // 2) for n in task.workload.row_lengths]
    found = Timed(task, repeated(task, lengths, WAVES * BATCH_HEADS))
    table, *state = found.tables()
    q, results = found.queries(1), _results(found)
    packed = [layout.packed_values(cfg, n) for n in found.lengths]
    moved = page_nbytes(cfg, packed, PAGES) + nbytes(q, *results)
    moved += 2 * token_nbytes(cfg, sum(found.lengths) - sum(packed))
    start = [*found.pages(PAGES), table, *found.rings(), *state, q, scalar(cfg.D**-0.5)]
    R = cfg.R
    checks = [
        _check_batch(task, [R + longest, None, R + 1, R + 31, 0, R, R + 450], "normal"),
        _check_batch(task, [R + 33, R - 1, R + 200], "outlier"),
    ]
    return Case(task.id, task.function, checks, [Call([*start, *results])], moved)


def combine_few(task: Task) -> Case:
    """`combine_few`: the same, on the workload's rows."""
    return _combine_window(task)


def combine_window(task: Task) -> Case:
    """`combine_window`: attention to the window, and partial results merged with it."""
    return _combine_window(task, MIDDLE_HEADS if has_few(task.key) else 1)


def _combine_window(task: Task, heads: int = 1) -> Case:
    """The case of one of them, timed on the workload's rows or as many more as have `heads`."""
    found = Timed(task, repeated(task, task.workload.row_lengths, heads))
    splits = splits_of(task, found.cfg, found.lengths)
    q, parts, results = found.queries(1), found.parts(1, max(splits) + 1), _results(found)
    scalars = scalar(found.cfg.D**-0.5), scalar(task.key.split_tokens)
    window = sum(min(n, found.cfg.R) for n in found.lengths)
    moved = 2 * token_nbytes(found.cfg, window) + nbytes(q, *results)
    moved += sum(splits) * nbytes(*parts) // (found.B * (max(splits) + 1))
    checks = [_check_window(task, *way) for way in ((1, "normal"), (60, "outlier"))]
    arguments = [*found.rings(), *found.state(), q, *scalars, *parts, *results]
    return Case(task.id, task.function, checks, [Call(arguments)], moved)


def _results(found: Timed) -> list[Argument]:
    """Output and log-sum-exp."""
    lse = tensor(torch.zeros(found.B, found.cfg.H))
    return [{**found.queries(1), "fill": "zeros"}, lse]


def _lengths(task: Task) -> list[int | None]:
    R, split = task.workload.cfg.R, task.key.split_tokens
    return [R + 3 * split, None, R + split + 1, 5, R + 1]


def _check(task: Task, spread: float, tail: int) -> Call:
    cfg, _ = draw(task, _lengths(task))
    pool = Pool(cfg, _lengths(task))
    merged = Merged(task, pool, spread, tail)
    for row, _, _ in pool.active():
        merged.expect(row)
    scalars = scalar(task.key.split_tokens), scalar(tail)
    return merged.call([*held(pool, ("state", "slots")), *scalars])


def _check_batch(task: Task, lengths: Lengths, data: str) -> Call:
    cfg, inputs = draw(task, lengths, data)
    pool, q, scale = Pool(cfg, lengths), inputs.q[0], cfg.D**-0.5
    pool.store_keys(inputs.k)
    pool.store_values(inputs.v)
    pool.store_rings(inputs.k, inputs.v, write_back=False)
    outputs = Outputs(cfg, len(lengths))
    for row, _, length in pool.active():
        n = layout.packed_values(cfg, length)
        k, v = pool.dense_keys(inputs.k, row)[:, :n], pool.dense_values(inputs.v, row)
        near = (x[row, :, n:length].double() for x in (inputs.k, inputs.v))
        k, v = (torch.cat(each, 1) for each in zip((k.double(), v.double()), near))
        if length:
            out, lse = reference.attention(q[row].double(), k, v, scale)
            worst = (q[row].double().reshape(cfg.H_kv, -1, cfg.D) @ k.mT * scale).abs().max()
            outputs.expect_output(row, out, lse, worst.item(), cfg.compute_mode())
    queries = tensor(strided_queries(q, task.key.compute))
    return outputs.call([*held(pool, BATCH_NAMES), queries, scalar(scale)])


def _check_window(task: Task, spread: float, data: str) -> Call:
    cfg, inputs = draw(task, _lengths(task), data)
    pool, q, scale = Pool(cfg, _lengths(task)), inputs.q[0], cfg.D**-0.5
    pool.store_rings(inputs.k, inputs.v, write_back=False)
    merged = Merged(task, pool, spread)
    for row, _, length in pool.active():
        k, v = (x[row, :, max(0, length - cfg.R) : length] for x in (inputs.k, inputs.v))
        out, lse = reference.attention(q[row].double(), k.double(), v.double(), scale)
        stat = torch.stack([lse / math.log(2), torch.ones_like(lse)], -1)
        merged.expect(row, (out[:, None], stat[:, None]), lse.abs().max().item())
    queries = tensor(strided_queries(q, task.key.compute))
    start = [*held(pool, (*RINGS, "state", "slots")), queries, scalar(scale)]
    return merged.call([*start, scalar(task.key.split_tokens)])


class Outputs:
    """What a function must give for `B` rows; those that nothing is expected of, 0 and -inf."""

    def __init__(self, cfg: KiviConfig, B: int) -> None:
        self._dtype = getattr(torch, cfg.dtype)
        self._group = torch.full((B, cfg.H), UNTOUCHED)
        self._out = torch.zeros(B, cfg.H, cfg.D, dtype=torch.float64)
        self._lse = torch.zeros(B, cfg.H, dtype=torch.float64)
        self._limits: list[tuple[float, float]] = []

    def expect_output(
        self, row: int, out: Tensor, lse: Tensor, max_score: float, compute: str = "float"
    ) -> None:
        """The row's output `[H, D]` and log-sum-exp `[H]`, computed in a mode."""
        self._out[row], self._lse[row] = out, lse
        self._group[row] = len(self._limits)
        of_lse = limit(torch.float32, max_score, compute)
        self._limits.append((limit(self._dtype, compute=compute), of_lse))

    def call(self, start: list[Argument]) -> Call:
        """The call with `start`."""
        out, lse = poisoned(self._out.shape, self._dtype), poisoned(self._lse.shape, torch.float32)
        results = [
            tensor(strided(out), torch.zeros_like(out)),
            tensor(lse, torch.full_like(lse, -math.inf)),
        ]
        n = len(start)
        rules = [
            {"of": [n + i], "group": self._group, "limits": list(limits), "expected": [expected]}
            for i, (limits, expected) in enumerate(zip(zip(*self._limits), (self._out, self._lse)))
        ]
        return Call([*start, *results], rules)


class Merged(Outputs):
    """Partial results of the splits of a pool's rows, and what their merging must give.

    Parameters
    ----------
    task : Task
    pool : Pool
    spread : float
        Standard deviation of their maxima.
    tail : int
        Further ones of every row, at the end.
    """

    def __init__(self, task: Task, pool: Pool, spread: float, tail: int = 0) -> None:
        cfg, B = pool.cfg, len(pool.lengths)
        H, D = cfg.H, cfg.D
        super().__init__(cfg, B)
        self._counts = splits_of(task, cfg, pool.lengths)
        self._entries, self._tail = max(self._counts) + 1 + tail, tail
        self._drawn = _drawn((B, H, self._entries), D, spread)
        self._given = tuple(torch.full_like(x, math.nan) for x in self._drawn)

    def expect(self, row: int, further: Parts | None = None, max_score: float = 0.0) -> None:
        """The row has its own partial results, and `further` ones."""
        X = self._entries
        entries = [*range(self._counts[row]), *range(X - self._tail, X)]
        for given, drawn in zip(self._given, self._drawn):
            given[row, :, entries] = drawn[row, :, entries]
        acc, stat = (x[row, :, entries].double() for x in self._drawn)
        if further is not None:
            acc, stat = (torch.cat(each, 1) for each in zip((acc, stat), further))
        self.expect_output(row, *_merged(acc, stat), max_score)

    def call(self, start: list[Argument]) -> Call:
        """The call with `start` and the partial results."""
        return super().call([*start, *map(tensor, self._given)])


def _drawn(shape: tuple[int, ...], D: int, spread: float) -> Parts:
    generator = torch.Generator().manual_seed(0)
    acc = torch.randn(*shape, D, generator=generator)
    top = spread * torch.randn(shape, generator=generator)
    return acc, torch.stack([top, 1 + 100 * torch.rand(shape, generator=generator)], -1)


def _merged(acc: Tensor, stat: Tensor) -> Parts:
    """Output and log-sum-exp of partial results in float64."""
    top = stat[..., 0].amax(-1)
    weight = torch.exp2(stat[..., 0] - top[:, None])
    total = (weight * stat[..., 1]).sum(-1)
    out = (weight[..., None] * acc).sum(1) / total[:, None]
    return out, (top + total.log2()) * math.log(2)

"""Cases of what fills and reads pages and rings: everything equals the reference bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor

from kivi_tvm import layout
from kivi_tvm.config import KiviConfig
from kivi_tvm.layout import Buffer
from kivi_tvm.tune.candidate import Task
from kivi_tvm.tune.cases.case import Call, Case, fill, ints, scalar, strided, tensor
from kivi_tvm.tune.cases.inputs import (
    BATCH_HEADS,
    KEYS,
    RINGS,
    TABLES,
    VALUES,
    Lengths,
    Timed,
    draw,
    held,
    page_nbytes,
    repeated,
    small,
    token_nbytes,
)
from kivi_tvm.tune.measure import ANY, poisoned
from kivi_tvm.tune.pools import Pool

# Where quantization can go wrong, as far as `workloads` has it.
DATA = ("normal", "constant", "huge", "tiny", "nonfinite")


def _ragged(cfg: KiviConfig) -> list[int | None]:
    """Lengths at the edges of the window: None is an inactive row."""
    R = cfg.R
    return [500, None, 1, R - 1, R, 0, R + 1, 2 * R + 31]


def quantize_key(task: Task) -> Case:
    """`quantize_key`: a prompt's keys into pages."""
    found = Timed(task)
    k, _ = found.tokens(max(found.lengths))
    arguments = [*found.pages(KEYS), *found.tables(), k]
    packed = [layout.packed_keys(found.cfg, n) for n in found.lengths]
    moved = token_nbytes(found.cfg, sum(packed)) + page_nbytes(found.cfg, packed, KEYS)
    checks = [_check_quantize(task, "key", data) for data in DATA]
    return Case(task.id, task.function, checks, [Call(arguments)], moved)


def quantize_value(task: Task) -> Case:
    """`quantize_value`: a prompt's values into pages."""
    found = Timed(task)
    v, _ = found.tokens(max(found.lengths))
    arguments = [*found.pages(VALUES), *found.tables(), v]
    packed = [layout.packed_values(found.cfg, n) for n in found.lengths]
    moved = token_nbytes(found.cfg, sum(packed)) + page_nbytes(found.cfg, packed, VALUES)
    checks = [_check_quantize(task, "value", data) for data in DATA]
    return Case(task.id, task.function, checks, [Call(arguments)], moved)


def _check_quantize(task: Task, kind: str, data: str) -> Call:
    lengths = (
        _ragged(task.workload.cfg) if data == "normal" else [None, 2 * task.workload.cfg.R + 63]
    )
    cfg, inputs = draw(task, lengths, data)
    pool, after = Pool(cfg, lengths), Pool(cfg, lengths)
    if kind == "key":
        after.store_keys(inputs.k)
    else:
        after.store_values(inputs.v)
    x = inputs.k if kind == "key" else inputs.v
    names = (*(KEYS if kind == "key" else VALUES), *TABLES)
    return Call([*held(pool, names, after), tensor(strided(x))])


def dequantize_key(task: Task) -> Case:
    """`dequantize_key`: packed keys, dense."""
    return _dequantize(task, "key")


def dequantize_value(task: Task) -> Case:
    """`dequantize_value`: packed values, dense."""
    return _dequantize(task, "value")


def _dequantize(task: Task, kind: str) -> Case:
    found, names = Timed(task), KEYS if kind == "key" else VALUES
    cfg = found.cfg
    out = Buffer((found.B, cfg.H_kv, max(found.lengths), cfg.D), cfg.dtype)
    arguments = [*found.pages(names), *found.tables(), fill(out, "zeros")]
    count = layout.packed_keys if kind == "key" else layout.packed_values
    packed = [count(cfg, n) for n in found.lengths]
    checks = [_check_dequantize(task, kind, data) for data in ("normal", "nonfinite")]
    moved = page_nbytes(cfg, packed, names) + out.nbytes
    return Case(task.id, task.function, checks, [Call(arguments)], moved)


def _check_dequantize(task: Task, kind: str, data: str) -> Call:
    lengths = _ragged(task.workload.cfg)
    cfg, inputs = draw(task, lengths, data)
    pool = Pool(cfg, lengths)
    if kind == "key":
        pool.store_keys(inputs.k)
    else:
        pool.store_values(inputs.v)
    shape = (len(lengths), cfg.H_kv, max(n or 0 for n in lengths) + 3, cfg.D)
    out = poisoned(shape, getattr(torch, cfg.dtype))
    after = out.clone()
    for row, _, _ in pool.active():
        of_keys = kind == "key"
        dense = pool.dense_keys(inputs.k, row) if of_keys else pool.dense_values(inputs.v, row)
        after[row] = 0
        after[row, :, : dense.shape[1]] = dense.to(out.dtype)
    names = (*(KEYS if kind == "key" else VALUES), *TABLES)
    return Call([*held(pool, names), tensor(out, after)])


def fill_window(task: Task) -> Case:
    """`fill_window`: the rings after a prompt."""
    found = Timed(task)
    cfg = found.cfg
    k, v = found.tokens(max(found.lengths))
    arguments = [*found.pages(KEYS), *found.rings(), *found.tables(), k, v, scalar(1)]
    # the ring is written from tokens in the model dtype, or as many codes
    moved = 4 * token_nbytes(cfg, sum(min(n, layout.ring_size(cfg)) for n in found.lengths))
    ragged = _ragged(cfg)
    checks = [
        _check_fill(task, ragged, "normal", True, 0),
        _check_fill(task, ragged, "normal", False, 5),
        _check_fill(task, [2 * cfg.R + 31, None, 63], "nonfinite", True, 5),
    ]
    return Case(task.id, task.function, checks, [Call(arguments)], moved)


def _check_fill(task: Task, lengths: Lengths, data: str, write_back: bool, rollback: int) -> Call:
    cfg, inputs = draw(task, lengths, data)
    pool, after = Pool(cfg, lengths, rollback), Pool(cfg, lengths, rollback)
    pool.store_keys(inputs.k)
    after.store_keys(inputs.k)
    after.store_rings(inputs.k, inputs.v, write_back)
    tokens = [tensor(strided(x)) for x in (inputs.k, inputs.v)]
    return Call([*held(pool, (*KEYS, *RINGS, *TABLES), after), *tokens, scalar(int(write_back))])


def append(task: Task) -> Case:
    """`append`: one token per row; every `R`-th step also quantizes a block of keys.

    Timed on the workload's rows; on tensor cores on a batch, as the way that is fastest there is as
    fast as any for few rows, and not the other way round.
    """
    cfg = task.workload.cfg
    R, T, half = cfg.R, task.workload.tokens, task.key.compute == "half"
    T = min(T, 4 * R) if half else T  # only a row's last page is written, and memory is limited
    quiet = T + 1 if (T + 1) % R else T + 2
    steps = [(quiet, (R - 1) / R), (T - T % R + R, 1 / R)]
    heads = BATCH_HEADS if half else 1
    B, e = len(repeated(task, task.workload.row_lengths, heads)), layout.DTYPE_BYTES[cfg.dtype]
    # tokens read and written, the value that leaves, its words, scales; a block's keys and codes
    per_head = cfg.D * e * 5 + 8 * cfg.D + 4 * (cfg.D // cfg.G_v) + 2 * cfg.D * e
    moved = B * cfg.H_kv * per_head + page_nbytes(cfg, [R] * B, KEYS) // R
    checks = [
        *(_check_append(task, data, write_back=True, rollback=0) for data in DATA),
        _check_append(task, "normal", write_back=False, rollback=5),
        _check_many(task),
    ]
    timed = [_timed_append(task, [length] * B, weight) for length, weight in steps]
    return Case(task.id, task.function, checks, timed, moved)


def _timed_append(task: Task, lengths: list[int], weight: float) -> Call:
    found = Timed(task, lengths)
    cfg = found.cfg
    shape = (found.B, cfg.H_kv, 0, cfg.D)
    none = tensor(torch.empty(shape, dtype=getattr(torch, cfg.dtype)))
    arguments = [
        *found.pages((*KEYS, *VALUES)), *found.rings(), none, *found.tables(),
        ints([1] * found.B), *found.tokens(1, cold=False), scalar(cfg.R), scalar(1),
    ]  # fmt: skip
    return Call(arguments, weight=weight)


def _exact_keys(pool: Pool, size: int) -> Tensor:
    """A poisoned ring of `size` keys for every slot."""
    slots, H_kv, _, D = pool.buffers["k_ring"].shape
    return poisoned((slots, H_kv, size, D), pool.buffers["k_ring"].dtype)


def _check_append(task: Task, data: str, write_back: bool, rollback: int) -> Call:
    """Nothing due, a value leaves, a block is flushed, both; on the first and a later page."""
    R = task.workload.cfg.R
    before = [0, R - 1, None, R, 2 * R - 1, 2 * R, 499, 3 * R - 2, R + 1, R + 33]
    after = [None if n is None else n + 1 for n in before]
    cfg, inputs = draw(task, after, data)
    pool, expected = Pool(cfg, after, rollback), Pool(cfg, after, rollback)
    expected.store(inputs.k, inputs.v, write_back)
    pool.lengths = before
    pool.store(inputs.k, inputs.v, write_back)
    row, last = torch.arange(len(after)), torch.tensor([n or 0 for n in before])
    k, v = (x[row, :, last][:, :, None] for x in (inputs.k, inputs.v))
    size = 7 if rollback else 0
    exact, kept = _exact_keys(pool, size), _exact_keys(pool, size)
    for number, slot, _ in expected.active():
        if size:
            kept[slot, :, last[number] % size] = k[number, :, 0]
    arguments = [
        *held(pool, (*KEYS, *VALUES, *RINGS), expected), tensor(exact, kept),
        *held(pool, TABLES), ints([1] * len(after)), tensor(strided(k)), tensor(strided(v)),
        scalar(R), scalar(int(write_back)),
    ]  # fmt: skip
    return Call(arguments)


def _check_many(task: Task) -> Call:
    """Several tokens of a row at once; the rings keep old tokens that a pool does not know."""
    R = task.workload.cfg.R
    lengths, counts = [2 * R, R + 9, 2 * R + 5], [R + 3, 9, 0]
    cfg, inputs = draw(task, lengths)
    pool, expected = Pool(cfg, lengths), Pool(cfg, lengths)
    expected.store(inputs.k, inputs.v)
    pool.lengths = [n - added for n, added in zip(lengths, counts)]
    pool.store(inputs.k, inputs.v)
    k, v = (poisoned(x.shape, x.dtype) for x in (inputs.k, inputs.v))
    for row, _, length in expected.active():
        new = slice(length - counts[row], length)
        k[row, :, : counts[row]] = inputs.k[row, :, new]
        v[row, :, : counts[row]] = inputs.v[row, :, new]
    names = (*KEYS, *VALUES, *RINGS)
    arguments = [
        *held(pool, names, expected), tensor(_exact_keys(pool, 0)), *held(pool, TABLES),
        ints(counts), tensor(strided(k)), tensor(strided(v)), scalar(R), scalar(1),
    ]  # fmt: skip
    group = torch.full(pool.buffers["k_ring"].shape, ANY)
    rings = [
        {"of": [names.index(name)], "group": group, "limits": [], "expected": []} for name in RINGS
    ]
    return Call(arguments, rings)


def advance(task: Task) -> Case:
    """`advance`: the state of every slot."""
    found = Timed(task)
    cfg, B = found.cfg, found.B
    arguments = [*found.state(), ints([1] * B), scalar(cfg.R)]
    before = [0, None, cfg.R, 700, cfg.R - 1]
    added = [0, 3, 1, 299, 1]
    rows = small(task, before).cfg
    pool = Pool(rows, before)
    expected = Pool(rows, [None if n is None else n + m for n, m in zip(before, added)])
    state = tensor(pool.state, expected.state)
    check = Call([state, *held(pool, ("slots",)), ints(added), scalar(cfg.R)])
    return Case(task.id, task.function, [check], [Call(arguments)], 40 * B)

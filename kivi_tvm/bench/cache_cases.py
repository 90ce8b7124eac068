"""The operations that `bench cache` measures, and how each result is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor

from kivi_tvm.bench.cache import OURS, Case, bytes_in_use
from kivi_tvm.bench.cache_setup import EXTEND, Pair, Setup
from kivi_tvm.bench.provider import exact_attention, relative_l2
from kivi_tvm.reference import ReferenceCache
from kivi_tvm.runtime import Cache
from kivi_tvm.runtime.rollback import Cropped
from kivi_tvm.tune.cases.tolerance import RELATIVE_L2
from kivi_tvm.workloads import Inputs

COPIES = 4  # of `repeat`


def crops(setup: Setup) -> dict[str, int]:
    """Tokens that the crops take: fewer than are unpacked, more than those, more than rollback."""
    window = setup.base.cfg.R
    across = window // 2 + EXTEND
    found = {f"crop({EXTEND}), one window": EXTEND}
    if across <= setup.rollback:
        found[f"crop({across}), across a flush"] = across
    beyond = setup.rollback + window
    return found | {f"crop({beyond}), beyond rollback": beyond}


def arrangements(setup: Setup) -> dict[str, tuple[str, list[int]]]:
    """The operations that pick rows: the method and its index."""
    B = setup.base.batch_size
    return {
        "reorder, permuted": ("reorder", [*range(1, B), 0]),
        "reorder, half duplicated": ("reorder", [i // 2 for i in range(B)]),
        f"select, {B // 2} of {B} rows": ("select", list(range(0, B - B % 2, 2))),
    }


def ours(setup: Setup) -> Iterator[Case]:
    """Every operation on our cache."""
    yield from _with_tokens(setup)
    for name, count in crops(setup).items():
        right = partial(_is_cropped, setup, count)
        yield _case(setup.base.copy, name, methodcaller("crop", count), right)
    for name, (method, index) in arrangements(setup).items():
        right = partial(_has_rows, setup, index)
        yield _case(setup.roomy, name, methodcaller(method, index), right)
    yield from _with_copies(setup)


def _case(
    prepare: Callable[[], Cache],
    operation: str,
    call: Callable[[Cache], Any],
    right: Callable[[Cache, Any], bool],
) -> Case:
    """An operation that changes the cache it is called on."""
    before = bytes_in_use(prepare())
    return Case(
        operation, OURS, prepare, call, right, lambda cache, _: bytes_in_use(cache) - before
    )


def _with_tokens(setup: Setup) -> Iterator[Case]:
    """Tokens come in; attention is part of it."""
    inputs, new = setup.inputs, setup.queries
    token = inputs.q[0], inputs.k_new[0], inputs.v_new[0]
    yield _case(
        setup.empty,
        "prefill",
        methodcaller("prefill", inputs.k, inputs.v),
        lambda cache, _: _is_reference(cache, inputs),
    )
    yield _case(
        setup.warm,
        "decode",
        methodcaller("decode", *token),
        lambda cache, out: _attends(out, token[0], cache.dequantize()),
    )
    yield _case(
        setup.warm,
        f"extend({EXTEND})",
        methodcaller("extend", new, *setup.new),
        lambda _, out: all(
            _attends(out[:, :, i], new[:, :, i], setup.dense_and(i + 1)) for i in (0, EXTEND - 1)
        ),
    )


def _with_copies(setup: Setup) -> Iterator[Case]:
    """Rows copied or freed, and the whole cache in memory and on disk."""
    base, B = setup.base, setup.base.batch_size
    one = base.copy()
    one.select([0])
    right = partial(_has_rows, setup, [0] * COPIES)
    yield _case(one.copy, f"repeat({COPIES})", methodcaller("repeat", COPIES), right)
    right = partial(_has_rows, setup, [*range(B), 0])
    yield _case(setup.roomy, "fork", methodcaller("fork", 0), right)
    yield _case(base.copy, "fork, full pool", methodcaller("fork", 0), right)
    others = list(range(1, B))
    yield _case(
        base.copy,
        "free",
        methodcaller("free", 0),
        lambda c, _: same([x[others] for x in c.dequantize()], [x[others] for x in setup.dense]),
    )
    yield from _of_wholes(setup)


def _of_wholes(setup: Setup) -> Iterator[Case]:
    """Copies in memory and on disk: the result is another cache."""
    saved, written = setup.scratch / "base.safetensors", setup.scratch / "written.safetensors"

    def right(cache: Cache) -> bool:
        return same(cache.dequantize(), setup.dense)

    def made(_: Any, new: Cache) -> int:
        return bytes_in_use(new)

    yield Case("copy", OURS, lambda: setup.base, Cache.copy, lambda _, new: right(new), made)
    yield Case(
        "save",
        OURS,
        lambda: setup.base,
        lambda cache: cache.save(written),
        lambda *_: right(setup.module.load_cache(written)),
        lambda *_: written.stat().st_size,
    )
    yield Case(
        "load", OURS, lambda: saved, setup.module.load_cache, lambda _, new: right(new), made
    )


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether both have the same tensors, element by element."""
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


def _attends(out: Tensor, q: Tensor, dense: Pair) -> bool:
    """Whether `out [B, H, D]` is attention over `dense`; the first and the last row are checked."""
    ends = [0, -1]
    expected = exact_attention(q[ends], dense[0][ends], dense[1][ends])
    return relative_l2(out[ends], expected) <= RELATIVE_L2[out.dtype]


def _is_reference(cache: Cache, inputs: Inputs) -> bool:
    """Whether the cache shows what the reference does; the first and the last row are checked."""
    ends = [0, -1]
    expected = ReferenceCache(cache.cfg, len(ends))
    expected.prefill(inputs.k[ends], inputs.v[ends])
    visible = [row.visible() for row in expected.rows if row is not None]
    return all(
        torch.equal(found[end], pair[part].to(cache.dtype))
        for part, found in enumerate(cache.dequantize())
        for end, pair in zip(ends, visible, strict=True)
    )


def _has_rows(setup: Setup, index: list[int], cache: Cache, _: Any) -> bool:
    """Whether row `i` shows what row `index[i]` of the base does."""
    return same(cache.dequantize(), [x[index] for x in setup.dense])


def _is_cropped(setup: Setup, count: int, cache: Cache, done: Cropped) -> bool:
    """Within rollback, the cache of a shorter prefill; beyond it, what the codes had shown."""
    left = setup.tokens - count
    k, v = (x[:, :, :left] for x in setup.dense)
    if count <= setup.rollback:
        fresh = setup.empty()
        fresh.prefill(setup.inputs.k[:, :, :left], setup.inputs.v[:, :, :left])
        k, v = fresh.dequantize()
    return done.exact == (count <= setup.rollback) and same(cache.dequantize(), (k, v))

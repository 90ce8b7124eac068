"""The operations that `bench cache` measures, and how each result is checked."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kivi_tvm.bench.cache import OURS, Case, bytes_in_use
from kivi_tvm.bench.provider import TOLERANCES, exact_attention, relative_l2
from kivi_tvm.errors import UserError
from kivi_tvm.reference import ReferenceCache
from kivi_tvm.runtime import Cache, Module
from kivi_tvm.runtime.rollback import Cropped
from kivi_tvm.workloads import Inputs, Workload, make_inputs

EXTEND = 8  # tokens of `extend`, and of the crop that undoes it
COPIES = 4  # of `repeat`
Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Setup:
    """A filled cache, what it was filled with, and what it shows: `dense` is its `dequantize`."""

    module: Module
    inputs: Inputs
    rollback: int
    base: Cache
    dense: Pair
    scratch: Path

    @classmethod
    def make(cls, w: Workload, rollback: int, target: str, scratch: Path) -> Setup:
        """Fill a cache with the tokens of `w` and half a window more.

        Raises
        ------
        UserError
            The operations need more rows or tokens, or rows of equal length.
        """
        import kivi_tvm

        shortest = w.residual_length + rollback
        if w.batch_size < 2 or w.lengths is not None or w.tokens < shortest:
            raise UserError(
                f"`tokens` must be at least {shortest} (window and rollback), `batch_size` at "
                f"least 2 and `lengths` None, got {w.tokens}, {w.batch_size} and {w.lengths}"
            )
        inputs = make_inputs(replace(w, tokens=w.tokens + w.residual_length // 2), EXTEND)
        module = kivi_tvm.build(w.cfg, target=target)
        base = module.new_cache(batch_size=w.batch_size, rollback=rollback)
        base.prefill(inputs.k, inputs.v)
        base.save(scratch / "base.safetensors")
        return cls(module, inputs, rollback, base, base.dequantize(), scratch)

    @property
    def tokens(self) -> int:
        return self.inputs.k.shape[2]

    @property
    def new(self) -> Pair:
        """The tokens of `extend`, `[B, H_kv, 8, D]`."""
        k, v = (x.movedim(0, 2) for x in (self.inputs.k_new, self.inputs.v_new))
        return k.contiguous(), v.contiguous()

    def dense_and(self, n: int) -> Pair:
        """What the cache shows, then the first `n` tokens of `extend`."""
        pairs = zip(self.dense, self.new, strict=True)
        k, v = (torch.cat([x, new[:, :, :n]], 2) for x, new in pairs)
        return k, v

    def empty(self) -> Cache:
        return self.module.new_cache(batch_size=self.base.batch_size, rollback=self.rollback)


def crops(setup: Setup) -> dict[str, int]:
    """Tokens that the crops take: fewer than are unpacked, more than those, more than rollback."""
    window = setup.base.cfg.R
    across = window // 2 + EXTEND
    found = {f"crop({EXTEND}), within the window": EXTEND}
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
    base, inputs = setup.base, setup.inputs
    k, v = setup.new
    q = inputs.q.movedim(0, 2).contiguous()

    def case(
        operation: str,
        call: Callable[[Cache], Any],
        check: Callable[[Cache, Any], bool],
        prepare: Callable[[], Cache] = base.copy,
    ) -> Case:
        before = bytes_in_use(prepare())
        return Case(
            operation, OURS, prepare, call, check, lambda cache, _: bytes_in_use(cache) - before
        )

    def shows(expected: Callable[[], Pair]) -> Callable[[Cache, Any], bool]:
        return lambda cache, _: same(cache.dequantize(), expected())

    def rows(index: list[int]) -> Callable[[Cache, Any], bool]:
        return shows(lambda: (setup.dense[0][index], setup.dense[1][index]))

    yield case(
        "prefill",
        lambda c: c.prefill(inputs.k, inputs.v),
        lambda c, _: _is_reference(c, inputs),
        setup.empty,
    )
    yield case(
        "decode",
        lambda c: c.decode(inputs.q[0], inputs.k_new[0], inputs.v_new[0]),
        lambda c, out: _attends(out, inputs.q[0], c.dequantize()),
    )
    yield case(
        f"extend({EXTEND})",
        lambda c: c.extend(q, k, v),
        lambda c, out: all(
            _attends(out[:, :, i], q[:, :, i], setup.dense_and(i + 1)) for i in (0, EXTEND - 1)
        ),
    )
    for name, count in crops(setup).items():
        yield case(
            name, lambda c, n=count: c.crop(n), lambda c, done, n=count: _cropped(setup, c, done, n)
        )
    for name, (method, index) in arrangements(setup).items():
        yield case(name, lambda c, m=method, i=index: getattr(c, m)(i), rows(index))
    first = base.copy()
    first.select([0])
    yield case(f"repeat({COPIES})", lambda c: c.repeat(COPIES), rows([0] * COPIES), first.copy)
    yield case("fork", lambda c: c.fork(0), rows([*range(base.batch_size), 0]))
    others = list(range(1, base.batch_size))
    yield case(
        "free",
        lambda c: c.free(0),
        lambda c, _: same([x[others] for x in c.dequantize()], [x[others] for x in setup.dense]),
    )
    yield from _ours_copied(setup)


def _ours_copied(setup: Setup) -> Iterator[Case]:
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
    return all(map(torch.equal, one, other))


def _attends(out: Tensor, q: Tensor, dense: Pair) -> bool:
    """Whether `out [B, H, D]` is attention over `dense`; the first and the last row are checked."""
    ends = [0, -1]
    expected = exact_attention(q[ends], dense[0][ends], dense[1][ends])
    return relative_l2(out[ends], expected) <= TOLERANCES[out.dtype]


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


def _cropped(setup: Setup, cache: Cache, done: Cropped, count: int) -> bool:
    """Within rollback, the cache of a shorter prefill; beyond it, what the codes had shown."""
    left = setup.tokens - count
    k, v = (x[:, :, :left] for x in setup.dense)
    if count <= setup.rollback:
        fresh = setup.empty()
        fresh.prefill(setup.inputs.k[:, :, :left], setup.inputs.v[:, :, :left])
        k, v = fresh.dequantize()
    return done.exact == (count <= setup.rollback) and same(cache.dequantize(), (k, v))

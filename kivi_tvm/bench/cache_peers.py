"""The same operations by torch on keys and values held in full.

They are what transformers' `DynamicCache` calls for the same purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from kivi_tvm.bench.cache import Case
from kivi_tvm.bench.cache_cases import COPIES, arrangements, crops, same
from kivi_tvm.bench.cache_setup import EXTEND, Pair, Setup

Edit = Callable[[Tensor], Tensor]


def peers(setup: Setup) -> Iterator[Case]:
    """Every operation that has an equal on plain tensors."""
    k, v = setup.inputs.k, setup.inputs.v
    B, T = k.shape[0], setup.tokens
    case = partial(_case, (k, v))
    yield case("prefill", "clone", torch.clone, _pick(0, range(B)))
    for operation, n in (("decode", 1), (f"extend({EXTEND})", EXTEND)):
        # Some of the old tokens stand for the new ones.
        yield case(operation, "cat", partial(_appended, n), _pick(2, [*range(T), *range(n)]))
    for name, count in crops(setup).items():
        cut = partial(torch.narrow, dim=2, start=0, length=T - count)
        yield case(name, "narrow (a view)", cut, _pick(2, range(T - count)))
    picked = {name: index for name, (_, index) in arrangements(setup).items()}
    for name, index in {**picked, "free": range(1, B)}.items():
        select = partial(torch.index_select, dim=0, index=torch.tensor(index))
        yield case(name, "index_select", select, _pick(0, index))
    one = k[:1], v[:1]
    repeat = partial(torch.repeat_interleave, repeats=COPIES, dim=0)
    yield _case(one, f"repeat({COPIES})", "repeat_interleave", repeat, _pick(0, [0] * COPIES))
    yield _case(one, "fork", "clone of a row", torch.clone, _pick(0, [0]))
    yield case("copy", "clone", torch.clone, _pick(0, range(B)))
    yield from _on_disk(setup)


def _case(held: Pair, operation: str, name: str, call: Edit, expected: Edit) -> Case:
    """`call` is done to keys and values, and `expected` says otherwise what must come out."""
    return Case(
        operation,
        f"torch {name}",
        lambda: held,
        lambda pair: tuple(map(call, pair)),
        lambda pair, made: same(made, tuple(map(expected, pair))),
        _new_bytes,
    )


def _pick(dim: int, index: Sequence[int]) -> Edit:
    """A function that puts together slices of `dim` by hand."""
    return lambda x: torch.stack([x.select(dim, i) for i in index], dim)


def _appended(n: int, x: Tensor) -> Tensor:
    return torch.cat([x, x[:, :, :n]], 2)


def _on_disk(setup: Setup) -> Iterator[Case]:
    from safetensors.torch import load_file, save_file

    held = {"k": setup.inputs.k, "v": setup.inputs.v}
    saved, written = setup.scratch / "torch.safetensors", setup.scratch / "torch-2.safetensors"
    save_file(held, saved)

    def right(found: dict[str, Tensor]) -> bool:
        return all(torch.equal(found[name], x) for name, x in held.items())

    yield Case(
        "save",
        "safetensors",
        lambda: held,
        lambda tensors: save_file(tensors, written),
        lambda *_: right(load_file(written)),
        lambda *_: written.stat().st_size,
    )
    yield Case(
        "load",
        "safetensors, clone",
        lambda: saved,
        # what is loaded is a view of the file until something touches it
        lambda path: {name: x.clone() for name, x in load_file(path).items()},
        lambda _, found: right(found),
        lambda _, found: sum(x.nbytes for x in found.values()),
    )


def _new_bytes(held: Pair, made: Sequence[Tensor]) -> int:
    """Bytes of the tensors that share no memory with those there were."""
    known = {x.untyped_storage().data_ptr() for x in held}
    return sum(x.nbytes for x in made if x.untyped_storage().data_ptr() not in known)

"""The same operations by torch on keys and values held in full.

They are what transformers' `DynamicCache` calls for the same purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from kivi_tvm.bench.cache import Case
from kivi_tvm.bench.cache_cases import COPIES, EXTEND, Pair, Setup, arrangements, crops, same

Edit = Callable[[Tensor], Tensor]


def peers(setup: Setup) -> Iterator[Case]:
    """Every operation that has an equal on plain tensors."""
    k, v = setup.inputs.k, setup.inputs.v
    one = k[:1], v[:1]

    def case(
        operation: str, name: str, call: Edit, expected: Edit = lambda x: x, held: Pair = (k, v)
    ) -> Case:
        """`call` is done to keys and values, and `expected` says otherwise what must come out."""
        return Case(
            operation,
            f"torch {name}",
            lambda: held,
            lambda pair: tuple(map(call, pair)),
            lambda pair, made: same(made, tuple(map(expected, pair))),
            lambda pair, made: _new_bytes(pair, made),
        )

    yield case("prefill", "clone", torch.clone)
    for operation, n in (("decode", 1), (f"extend({EXTEND})", EXTEND)):
        # Some of the old tokens stand for the new ones.
        yield case(
            operation,
            "cat, no attention",
            lambda x, n=n: torch.cat([x, x[:, :, :n]], 2),
            lambda x, n=n: x[:, :, [*range(x.shape[2]), *range(n)]],
        )
    for name, count in crops(setup).items():
        stop = setup.tokens - count
        yield case(
            name,
            "narrow, a view",
            lambda x, stop=stop: x.narrow(2, 0, stop),
            lambda x, stop=stop: x[:, :, :stop],
        )
    picked = {name: index for name, (_, index) in arrangements(setup).items()}
    picked["free"] = list(range(1, k.shape[0]))
    for name, index in picked.items():
        yield case(
            name,
            "index_select",
            partial(torch.index_select, dim=0, index=torch.tensor(index)),
            lambda x, index=index: torch.stack([x[i] for i in index]),
        )
    yield case(
        f"repeat({COPIES})",
        "repeat_interleave",
        lambda x: x.repeat_interleave(COPIES, 0),
        lambda x: torch.cat([x] * COPIES),
        one,
    )
    yield case("fork", "clone of a row", torch.clone, held=one)
    yield case("copy", "clone", torch.clone)
    yield from _on_disk(setup)


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

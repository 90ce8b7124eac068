"""Operators parsed once per process instead of once per candidate."""

from __future__ import annotations

from functools import cache
from typing import Any

from kivi_tvm import ops
from kivi_tvm.config import KernelKey


def keep_parsed() -> None:
    """Make `ops.OPS` parse each operator once per kernel key in this process, the tuner's own.

    Parsing takes 0.3 s, reading the text below 0.04 s. The parsed function itself cannot be kept:
    TVM 0.27 schedules parts of it in place, so that every schedule made from one function changes
    that function and the results of those before.
    """
    for name, factory in ops.OPS.items():
        if not isinstance(factory, _Parsed):
            ops.OPS[name] = _Parsed(factory)


class _Parsed:
    """A factory that gives an equal, new function for a key that it has seen."""

    def __init__(self, factory: ops.Operator) -> None:
        self._text = cache(lambda key: _saved(factory(key)))

    def __call__(self, key: KernelKey) -> Any:
        import tvm

        return tvm.ir.load_json(self._text(key))


def _saved(function: Any) -> str:
    import tvm

    text: str = tvm.ir.save_json(function)
    return text

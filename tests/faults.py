"""Exceptions in the middle of an operation, at every place in turn."""

from __future__ import annotations

import itertools

from caches import contents
from pools import assert_same_bits
from torch.utils._python_dispatch import TorchDispatchMode


class Interrupted(KeyboardInterrupt):
    """What a user's Ctrl-C raises: not an `Exception`, so that only full care undoes it."""


class Broken(RuntimeError):
    """What torch or a kernel raises."""


class Fault(TorchDispatchMode):
    """Raises once, at event `at` of the code within.

    An event is an operation of torch (allocations among them), or the moment before or after a
    kernel of the cache.
    """

    def __init__(self, cache, at, error):
        super().__init__()
        self._cache, self._kernels = cache, cache.kernels
        self.left, self._error = at, error

    @property
    def is_spent(self):
        return self.left < 0

    def __enter__(self):
        self._cache.kernels = self
        return super().__enter__()

    def __exit__(self, *exception):
        self._cache.kernels = self._kernels
        return super().__exit__(*exception)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self._tick(function)
        return function(*args, **(kwargs or {}))

    def __getitem__(self, name):
        def call(*args):
            self._tick(f"before {name}")
            self._kernels[name](*args)
            self._tick(f"after {name}")

        return call

    def _tick(self, what):
        self.left -= 1
        if self.left == -1:
            raise self._error(f"injected at {what}")


def fail_everywhere(cache, call, check, errors=(Interrupted,)):
    """Call with a fault at every event in turn, `check(what)` after each; at last without.

    Returns
    -------
    result, int
        Of the call that nothing disturbed, and how many failed before it.
    """
    for at in itertools.count():
        for error in errors:
            fault = Fault(cache, at, error)
            try:
                with fault:
                    result = call()
            except errors as raised:
                check(f"event {at}: {raised}")
            else:
                assert not fault.is_spent, f"event {at}: {error} was swallowed"
                return result, at


def observe(cache):
    """All that can be seen of a cache between two steps."""
    report = cache.report()
    found = {
        "lengths": cache.lengths,
        "active": cache.active,
        "batch_size": cache.batch_size,
        "rollback": cache.rollback,
        "refilled": report["refilled"],
        "used": report["pages"]["used"],
        "shared": report["pages"]["shared"],
    }
    for i in range(cache.num_layers):
        found[f"layer {i} k"], found[f"layer {i} v"] = cache.layer(i).dequantize()
        for row, is_active in enumerate(cache.active):
            if is_active:
                held = contents(cache, row, i)
                found |= {f"layer {i} row {row} {name}": x.clone() for name, x in held.items()}
    return found


def assert_same_sight(found, expected, what=""):
    """Fail unless `observe` saw the same twice."""
    assert found.keys() == expected.keys(), what
    for name, value in expected.items():
        if hasattr(value, "shape"):
            assert_same_bits(found[name], value, f"{what}: {name}")
        else:
            assert found[name] == value, f"{what}: {name}"

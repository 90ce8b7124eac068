"""Exceptions in the middle of an operation, at every place in turn."""

from __future__ import annotations

import itertools

import torch
from books import assert_pages_add_up
from caches import contents, new_cache
from inputs import draw
from pools import assert_same_bits
from torch.utils._python_dispatch import TorchDispatchMode
from twins import SMALL

R, P, E = SMALL.R, SMALL.P, 9
MODES = {
    "kivi": {},
    "rollback": {"rollback": E},
    "all": {"rollback": E, "window": "exact", "sink_tokens": 5},
}
# What the next token of a row does, at the numbers of sinks above: nothing special; quantize a
# block; quantize a block into a new page; end the sinks.
LENGTHS = {0: [2 * R + 3, 2 * R - 1, 3 * R - 1, 4], 5: [2 * R + 3, 2 * R + 4, 3 * R + 4, 4]}


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
    """What can be seen of a cache between two steps, without the codes behind it."""
    report = cache.report()
    found = {
        "lengths": cache.lengths,
        "active": cache.active,
        "rollback": cache.rollback,
        "refilled": report["refilled"],
        "used": report["pages"]["used"],
        "shared": report["pages"]["shared"],
        "slots": cache.rows.slots.clone(),
        "state": cache.rows.state[: cache.batch_size].clone(),
    }
    for i in range(cache.num_layers):
        found[f"layer {i} k"], found[f"layer {i} v"] = cache.layer(i).dequantize()
    return found


def observe_all(cache):
    """Everything that rows have stored, too."""
    found = observe(cache)
    del found["slots"], found["state"]  # where a row lies may depend on what failed
    for i in range(cache.num_layers):
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


class Run:
    """A cache, and one that is never disturbed, with the same rows and the same steps."""

    def __init__(self, mode, layers, lengths=None):
        options = MODES[mode]
        self.lengths = lengths or LENGTHS[options.get("sink_tokens", 0)]
        self.layers = layers
        self.cache, self.other = (
            new_cache(SMALL, len(self.lengths), num_layers=layers, **options) for _ in range(2)
        )
        self._seed = 0
        prompts = self.inputs(self.lengths)
        for cache in (self.cache, self.other):
            for i, x in enumerate(prompts):
                cache.layer(i).prefill(x.k, x.v, self.lengths)

    def inputs(self, lengths, steps=1):
        """New inputs for every layer."""
        self._seed += 1
        tokens = max(lengths, default=0)
        return [
            draw(SMALL, tokens, lengths, steps=steps, seed=100 * self._seed + i)
            for i in range(self.layers)
        ]

    def fail(self, call, errors=(Interrupted,)):
        """`call(cache)` with every fault, then undisturbed on both; returns the faults."""
        before = observe(self.cache)

        def check(what):
            assert_same_sight(observe(self.cache), before, what)
            assert_pages_add_up(self.cache)

        result, faults = fail_everywhere(self.cache, lambda: call(self.cache), check, errors)
        assert_equal(result, call(self.other))
        return faults

    def fail_step(self, call, is_begun=None, meant=lambda out: out):
        """`call(layer, i)` of every layer with every fault.

        `is_begun(cache)` begins the step; `meant(result)` is what of a result means something.
        """
        before = observe(self.cache)
        faults = self.fail_begin(is_begun, before) if is_begun else 0
        after = None

        def check(what):
            if after is None and not is_begun:
                assert_same_sight(observe(self.cache), before, what)
                assert_pages_add_up(self.cache)
            else:
                assert self.cache.lengths == (after or during), what

        during = self.cache.lengths
        for i in range(self.layers):
            layer, other = self.cache.layer(i), self.other.layer(i)
            result, count = fail_everywhere(self.cache, lambda: call(layer, i), check)  # noqa: B023
            assert_equal(meant(result), meant(call(other, i)))
            after, faults = self.cache.lengths, faults + count
        assert faults > 2 * self.layers
        return faults

    def fail_begin(self, begin, before):
        def check(what):
            assert_same_sight(observe(self.cache), before, what)

        _, faults = fail_everywhere(self.cache, lambda: begin(self.cache), check)
        begin(self.other)
        return faults

    def go_on(self):
        """Fail unless both are the same, now and over the next blocks and back."""
        assert_same_sight(observe_all(self.cache), observe_all(self.other), "after the operation")
        rows = [1] * self.cache.batch_size
        inputs = self.inputs(rows, steps=R + 1)
        for step in range(R + 1):
            for i, x in enumerate(inputs):
                args = x.q[step], x.k_new[step], x.v_new[step]
                assert_equal(*(c.layer(i).decode(*args) for c in (self.cache, self.other)))
        for cache in (self.cache, self.other):
            assert cache.crop(cache.rollback).exact
        assert_same_sight(observe_all(self.cache), observe_all(self.other), "later")
        assert_pages_add_up(self.cache)


def assert_equal(found, expected):
    if isinstance(expected, torch.Tensor):
        assert_same_bits(found, expected, "output")
    elif isinstance(expected, (tuple, list)) and any(isinstance(x, torch.Tensor) for x in expected):
        for one, other in zip(found, expected, strict=True):
            assert_same_bits(one, other, "output")
    else:
        assert found == expected

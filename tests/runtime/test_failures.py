"""An exception anywhere in an operation: the cache is as before, and goes on as if nothing was."""

import pytest
import torch
from books import assert_pages_add_up
from caches import new_cache
from faults import Broken, Fault, Interrupted, assert_same_sight, fail_everywhere, observe
from inputs import draw
from pools import assert_same_bits
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

    def fail_step(self, call, is_begun=None):
        """`call(layer, i)` of every layer with every fault; `is_begun(cache)` begins the step."""
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
            assert_equal(result, call(other, i))
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
        assert_same_sight(observe(self.cache), observe(self.other), "after the operation")
        rows = [1] * self.cache.batch_size
        inputs = self.inputs(rows, steps=R + 1)
        for step in range(R + 1):
            for i, x in enumerate(inputs):
                args = x.q[step], x.k_new[step], x.v_new[step]
                assert_equal(*(c.layer(i).decode(*args) for c in (self.cache, self.other)))
        for cache in (self.cache, self.other):
            assert cache.crop(cache.rollback).exact
        assert_same_sight(observe(self.cache), observe(self.other), "later")
        assert_pages_add_up(self.cache)


def assert_equal(found, expected):
    if isinstance(expected, torch.Tensor):
        assert_same_bits(found, expected, "output")
    elif isinstance(expected, tuple) and expected and isinstance(expected[0], torch.Tensor):
        for one, other in zip(found, expected, strict=True):
            assert_same_bits(one, other, "output")
    else:
        assert found == expected


def every_mode(test):
    """One layer in the fast tests; three and their open steps in the slow ones, but for a few."""
    params = [
        pytest.param(mode, layers, marks=[pytest.mark.slow] if slow else [], id=f"{mode}-{layers}")
        for mode, layers, slow in [
            ("kivi", 1, False),
            ("rollback", 1, False),
            ("all", 1, False),
            ("all", 3, False),
            ("kivi", 3, True),
            ("rollback", 3, True),
        ]
    ]
    return pytest.mark.parametrize(("mode", "layers"), params)(test)


@every_mode
def test_decode(mode, layers):
    """Blocks and pages that come due are put back, whatever was written already."""
    run = Run(mode, layers)
    for _ in range(2):  # the second one is a step without host work
        inputs = run.inputs([1] * 4)

        def step(layer, i, inputs=inputs):
            x = inputs[i]
            return layer.decode(x.q[0], x.k_new[0], x.v_new[0], return_lse=True)

        run.fail_step(step)
        assert_same_sight(observe(run.cache), observe(run.other))
    run.go_on()


@every_mode
def test_extend(mode, layers):
    run, counts = Run(mode, layers), [20, 1, 2 * P, 0]
    inputs = run.inputs(counts)
    q = torch.randn(4, SMALL.H, 2 * P, SMALL.D).to(run.cache.dtype)
    run.fail_step(lambda layer, i: layer.extend(q, inputs[i].k, inputs[i].v, lengths=counts))
    run.go_on()


@every_mode
def test_prefill(mode, layers):
    """Into rows that were freed, while others hold sequences."""
    run = Run(mode, layers)
    for cache in (run.cache, run.other):
        cache.free(1)
        cache.free(3)
    inputs = run.inputs([3 * P + 5, 30])

    def step(layer, i):
        layer.prefill(inputs[i].k, inputs[i].v, [3 * P + 5, 30], rows=[3, 1])

    run.fail_step(step)
    run.go_on()


@every_mode
def test_a_step_that_was_begun_stays_open(mode, layers):
    run = Run(mode, layers)
    inputs = run.inputs([1] * 4)

    def step(layer, i):
        return layer.decode(inputs[i].q[0], inputs[i].k_new[0], inputs[i].v_new[0])

    run.fail_step(step, is_begun=lambda cache: cache.begin(1))
    run.go_on()


OPERATIONS = {
    "crop": lambda c: c.crop([5, 2, 9, 4]),
    "crop beyond": lambda c: c.crop([R + 3, 2 * R - 2, 20, 0]),
    "fork into a new slot": lambda c: c.fork(2),
    "free": lambda c: c.free(2),
    "reorder": lambda c: c.reorder([2, 2, 0, 1]),
    "select fewer": lambda c: c.select([3, 1]),
    "select more": lambda c: c.select([2, 2, 0, 1, 3, 2]),
    "repeat": lambda c: c.repeat(2),
    "enable_rollback": lambda c: c.enable_rollback(E + 4),
    "reserve": lambda c: c.reserve(20 * P),
    "reset": lambda c: c.reset(),
    "dequantize": lambda c: c.layer(c.num_layers - 1).dequantize(),
}


@every_mode
@pytest.mark.parametrize("what", OPERATIONS)
def test_operations(what, mode, layers):
    run = Run(mode, layers)
    assert run.fail(OPERATIONS[what]) > 0
    run.go_on()


@pytest.mark.parametrize("mode", MODES)
def test_fork_into_an_inactive_row(mode):
    run = Run(mode, 2)
    for cache in (run.cache, run.other):
        cache.free(0)
    run.fail(lambda cache: cache.fork(2))
    run.go_on()


@pytest.mark.parametrize("mode", MODES)
def test_copies_of_shared_pages(mode):
    """A crop into pages that two rows share, and what is then written to them."""
    run = Run(mode, 1, [4 * P + 3])
    for cache in (run.cache, run.other):
        cache.fork(0)
    run.fail(lambda cache: cache.crop([2 * P + 3, 0]))
    inputs = run.inputs([1, 1])
    run.fail_step(
        lambda layer, i: layer.decode(inputs[i].q[0], inputs[i].k_new[0], inputs[i].v_new[0])
    )
    run.go_on()


def test_errors_are_undone_like_interrupts():
    run = Run("rollback", 1)
    inputs = run.inputs([1] * 4)[0]
    args = inputs.q[0], inputs.k_new[0], inputs.v_new[0]
    run.fail(lambda cache: cache.decode(*args), errors=(Broken, Interrupted))
    run.fail(lambda cache: cache.fork(1), errors=(Broken, Interrupted))
    run.go_on()


def test_reset_after_a_failure_in_an_open_step():
    run = Run("all", 3)
    inputs = run.inputs([1] * 4)
    run.cache.layer(0).decode(inputs[0].q[0], inputs[0].k_new[0], inputs[0].v_new[0])
    with pytest.raises(Interrupted), Fault(run.cache, 3, Interrupted):
        run.cache.layer(1).decode(inputs[1].q[0], inputs[1].k_new[0], inputs[1].v_new[0])
    for cache in (run.cache, run.other):
        cache.reset()
    run.go_on()

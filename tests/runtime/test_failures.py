"""An exception anywhere in an operation: the cache is as before, and goes on as if nothing was."""

import pytest
import torch
from faults import (
    MODES,
    Broken,
    E,
    Fault,
    Interrupted,
    P,
    R,
    Run,
    assert_same_sight,
    fail_everywhere,
    observe_all,
)
from twins import SMALL


def modes(*fast):
    """Parametrize by mode and layers; those that are not named are slow."""
    params = [
        pytest.param(
            mode,
            layers,
            marks=[] if (mode, layers) in fast else [pytest.mark.slow],
            id=f"{mode}-{layers}",
        )
        for mode in MODES
        for layers in (1, 3)
    ]
    return pytest.mark.parametrize(("mode", "layers"), params)


@modes(("kivi", 1), ("all", 3))
def test_decode(mode, layers):
    """Blocks and pages that come due are put back, whatever was written already."""
    run = Run(mode, layers)
    for _ in range(2):  # the second one is a step without host work
        inputs = run.inputs([1] * 4)

        def step(layer, i, inputs=inputs):
            x = inputs[i]
            return layer.decode(x.q[0], x.k_new[0], x.v_new[0], return_lse=True)

        run.fail_step(step)
        assert_same_sight(observe_all(run.cache), observe_all(run.other))
    run.go_on()


@pytest.mark.parametrize("mode", MODES)
def test_quiet_steps(mode):
    """Steps without host work, each failing at one event: a failure makes the next one thorough."""
    run = Run(mode, 1, [2 * R + 6, R + 6])
    x = run.inputs([1, 1])[0]
    for at in range(12):
        for cache in (run.cache, run.other):
            cache.decode(x.q[0], x.k_new[0], x.v_new[0])
            cache.crop(1)
            cache.decode(x.q[0], x.k_new[0], x.v_new[0])
        before = observe_all(run.cache)
        with pytest.raises(Interrupted), Fault(run.cache, at, Interrupted):
            run.cache.decode(x.q[0], x.k_new[0], x.v_new[0])
        assert_same_sight(observe_all(run.cache), before, f"event {at}")
        for cache in (run.cache, run.other):
            cache.crop(1)
    run.go_on()


@modes(("kivi", 1), ("all", 3))
def test_extend(mode, layers):
    run, counts = Run(mode, layers), [20, 1, 2 * P, 0]
    inputs = run.inputs(counts)
    q = torch.randn(4, SMALL.H, 2 * P, SMALL.D).to(run.cache.dtype)

    def step(layer, i):
        return layer.extend(q, inputs[i].k, inputs[i].v, lengths=counts)

    run.fail_step(step, meant=lambda out: [out[row, :, :n] for row, n in enumerate(counts)])
    run.go_on()


@modes(("kivi", 1), ("all", 3))
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


@modes(("kivi", 1), ("all", 3))
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


@modes(("rollback", 1))
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


@pytest.mark.parametrize("mode", ["rollback", "all"])
@pytest.mark.parametrize("tokens", [2, E])
def test_tokens_to_take_back_survive_a_failure(tokens, mode):
    """What an `extend` that came to nothing wrote does not reach what `crop` needs."""
    run, probe, counts = Run(mode, 1), Run(mode, 1).cache, [tokens, 1, 0, tokens]
    x = run.inputs(counts)[0]
    q = torch.zeros(4, SMALL.H, tokens, SMALL.D, dtype=probe.dtype)

    def extend(cache):
        return cache.extend(q, x.k, x.v, lengths=counts)

    _, events = fail_everywhere(probe, lambda: extend(probe), lambda what: None)
    for at in range(events):
        with pytest.raises(Interrupted), Fault(run.cache, at, Interrupted):
            extend(run.cache)
    for cache in (run.cache, run.other):
        assert cache.crop([E, E - 1, E, 4]).exact
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

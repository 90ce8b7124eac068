"""An exception anywhere in an operation: the cache is as before, and goes on as if nothing was."""

import pytest
import torch
from caches import assert_same_contents, contents, new_cache
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
from inputs import draw
from pools import assert_same_bits
from twins import SMALL

from kivi_tvm.runtime.memory import LayerMemory


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


@pytest.mark.parametrize("operation", ["fork", "crop"])
def test_steps_after_a_failed_growth_use_what_grew(operation, monkeypatch):
    """Quiet steps must not write to buffers that the next growth leaves behind."""
    caches = []
    for fails in (True, False):
        inputs = draw(SMALL, 2 * P + 1, steps=R // 2, seed=1)
        cache = new_cache(SMALL, 2)
        cache.free(1)
        cache.prefill(inputs.k, inputs.v, rows=[0])
        if operation == "crop":
            cache.fork(0)
        steps = [
            x.repeat(1, 2, *[1] * (x.ndim - 2)) for x in (inputs.q, inputs.k_new, inputs.v_new)
        ]
        for i in range(2):
            cache.decode(*(x[i] for x in steps))
        if fails:
            plain = LayerMemory._grown

            def grown(memory, old, buffer, plain=plain, cache=cache):
                if memory.pages["v_code"].shape[0] > cache.pages.capacity:
                    raise Broken
                return plain(memory, old, buffer)

            monkeypatch.setattr(LayerMemory, "_grown", grown)
            with pytest.raises(Broken):
                cache.fork(0) if operation == "fork" else cache.crop(R + 9)
            monkeypatch.undo()
        for i in range(2, len(inputs.q)):
            cache.decode(*(x[i] for x in steps))
        cache.bind()
        caches.append(cache)
    for row in range(1 + (operation == "crop")):
        assert_same_contents(caches[0], row, caches[1], row)


def test_a_failed_crop_of_many_owners_writes_to_no_page_of_theirs(monkeypatch):
    cache = new_cache(SMALL, 2, num_layers=2)
    inputs = draw(SMALL, 5 * P + 1, [5 * P + 1, 5 * P])
    cache.begin(5 * P + 1, inputs.lengths)
    for i in range(2):
        cache.layer(i).prefill(inputs.k, inputs.v, inputs.lengths)
    cache.repeat(2)
    before = [[contents(cache, row, i) for row in range(4)] for i in range(2)]
    plain, last = LayerMemory.copy_pages, cache.layer(1).memory

    def copy_pages(memory, pairs):
        targets = [target for _, target in pairs]
        assert not set(targets) & {source for source, _ in pairs}
        if memory is last:
            raise Broken
        plain(memory, pairs)

    monkeypatch.setattr(LayerMemory, "copy_pages", copy_pages)
    with pytest.raises(Broken):
        cache.crop(2 * P)
    for i, rows in enumerate(before):
        for row, expected in enumerate(rows):
            found = contents(cache, row, i)
            for name, tensor in expected.items():
                assert_same_bits(found[name], tensor, f"layer {i} row {row} {name}")

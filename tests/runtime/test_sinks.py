"""Sink tokens: the first tokens of a row in full precision, the rest a KIVI sequence of its own."""

import pytest
import torch
from caches import (
    assert_same_contents,
    assert_same_outputs,
    assert_unchanged,
    feed,
    new_cache,
    snapshot,
)
from configurations import FEW, config_id, with_window
from inputs import draw
from pools import assert_same_bits
from twins import SMALL, Twins

R, P = SMALL.R, SMALL.P
COUNTS = [1, 4, 5, R, 2 * P + 3]


def run(cfg, sinks, lengths, steps, **options):
    """A cache with prompts and steps, its inputs and outputs."""
    inputs = draw(cfg, max(lengths), lengths, steps=steps)
    cache = new_cache(cfg, len(lengths), sink_tokens=sinks, **options)
    cache.prefill(inputs.k, inputs.v, lengths)
    return cache, inputs, feed(cache, inputs, steps)


@pytest.mark.parametrize("window", ["kivi", "exact"])
@pytest.mark.parametrize("sinks", COUNTS)
def test_against_the_reference(sinks, window):
    """Rows shorter than, as long as and longer than their sinks."""
    twins = Twins(SMALL, 5, sink_tokens=sinks, window=window)
    twins.prefill([0, 1, 2, 3], [sinks - 1, sinks, sinks + 1, sinks + 3 * R])
    twins.check()
    for _ in range(4):
        twins.decode(R // 4 + 1)
        twins.check()
    twins.extend([3 * R, 0, 1, sinks, 2 * sinks + R])
    twins.check()
    twins.decode(R)
    twins.check()


@pytest.mark.parametrize("cfg", FEW, ids=config_id)
def test_every_kind_of_kernel(cfg):
    twins = Twins(with_window(cfg, cfg.G_k), 3, layers=1, sink_tokens=4)
    twins.prefill([0, 1], [300, 3])
    twins.check()
    twins.decode(cfg.G_k + 2)
    twins.extend([20, 1, 3])
    twins.check()
    twins.decode(3)
    twins.check()


@pytest.mark.parametrize("sinks", COUNTS)
def test_the_first_tokens_stay_exact(sinks):
    lengths = [200, sinks, sinks // 2]
    cache, inputs, _ = run(SMALL, sinks, lengths, steps=3 * R)
    for found, prompt, later in zip(
        cache.dequantize(), (inputs.k, inputs.v), (inputs.k_new, inputs.v_new), strict=True
    ):
        for row, length in enumerate(lengths):
            told = torch.cat([prompt[row, :, :length], later[:, row].movedim(0, 1)], 1)
            assert_same_bits(found[row, :, :sinks], told[:, :sinks], f"row {row}")


@pytest.mark.parametrize("sinks", COUNTS)
def test_the_rest_is_a_sequence_of_its_own(sinks):
    """Codes, rings and bounds of the body are those of a cache that was told the body alone."""
    lengths = [sinks, sinks + 1, sinks + R - 1, sinks + 150]
    cache, inputs, _ = run(SMALL, sinks, lengths, steps=R + 3)
    body = new_cache(SMALL, len(lengths))
    body.prefill(inputs.k[:, :, sinks:], inputs.v[:, :, sinks:], [n - sinks for n in lengths])
    feed(body, inputs, R + 3)
    for found, expected in zip(cache.dequantize(), body.dequantize(), strict=True):
        assert_same_bits(found[:, :, sinks:], expected, "body")
    assert cache.report()["pages"]["used"] == body.report()["pages"]["used"]


@pytest.mark.parametrize("sinks", COUNTS)
def test_streamed_equals_at_once(sinks):
    """One by one, in chunks across the end of the sinks, and as a prompt."""
    total = sinks + 2 * P + 5
    inputs = draw(SMALL, total)
    q = torch.zeros(1, SMALL.H, total, SMALL.D, dtype=inputs.k.dtype)
    whole, chunks, single = (new_cache(SMALL, sink_tokens=sinks) for _ in range(3))
    whole.prefill(inputs.k, inputs.v)
    for first in range(0, total, 7):
        part = slice(first, first + 7)
        chunks.extend(q[:, :, part], inputs.k[:, :, part], inputs.v[:, :, part])
    for t in range(total):
        single.decode(q[:, :, t], inputs.k[:, :, t], inputs.v[:, :, t])
    assert_same_contents(chunks, 0, whole, 0)
    assert_same_contents(single, 0, whole, 0)
    steps = draw(SMALL, 1, steps=R)
    expected = feed(whole, steps, R)
    assert_same_outputs(feed(chunks, steps, R), expected)
    assert_same_outputs(feed(single, steps, R), expected)


@pytest.mark.parametrize("sinks", [4, 2 * P + 3])
def test_a_row_alone_gives_the_bits_of_the_batch(sinks):
    lengths = [150, 2, sinks, 70]
    batch, inputs, outputs = run(SMALL, sinks, lengths, steps=R)
    for row, length in enumerate(lengths):
        alone = new_cache(SMALL, sink_tokens=sinks)
        alone.prefill(inputs.k[row : row + 1, :, :length], inputs.v[row : row + 1, :, :length])
        rows = slice(row, row + 1)
        assert_same_outputs(outputs, feed(alone, inputs, R, rows), rows)
        assert_same_contents(batch, row, alone, 0)


@pytest.mark.parametrize("window", ["kivi", "exact"])
@pytest.mark.parametrize("sinks", [5, 2 * P + 3])
def test_crop_into_the_sinks(sinks, window):
    twins = Twins(SMALL, 4, sink_tokens=sinks, window=window, rollback=9)
    twins.prefill([0, 1, 2, 3], [sinks + 7, sinks + 90, sinks, 3])
    twins.crop([9, 92, 2, 3])
    twins.check()
    assert twins.cache.lengths == [sinks - 2, sinks - 2, sinks - 2, 0]
    twins.extend([1, 5, R + 4, 100])
    twins.check()
    twins.decode(R + 1)
    twins.check()


def test_copies_have_their_own_sinks():
    twins = Twins(SMALL, 2, sink_tokens=5)
    twins.prefill([0, 1], [3, 60])
    twins.fork(0)
    twins.fork(1)
    twins.extend([40, 1, 1, 1])
    twins.crop([43, 57, 0, 0])
    twins.extend([9, 9, 9, 9])
    twins.check()
    twins.select([3, 3, 0, 2])
    twins.decode(R)
    twins.check()


def test_no_sinks_are_the_default():
    inputs = draw(SMALL, 70)
    none, default = new_cache(SMALL, sink_tokens=0), new_cache(SMALL)
    for cache in (none, default):
        cache.prefill(inputs.k, inputs.v)
    assert none.sink_tokens == default.sink_tokens == 0
    assert none.nbytes == default.nbytes
    assert_same_contents(none, 0, default, 0)


def test_bytes_are_counted():
    none, some = new_cache(SMALL, 3), new_cache(SMALL, 3, sink_tokens=4)
    more = some.nbytes["window"] - none.nbytes["window"]
    assert more == 2 * 3 * SMALL.H_kv * 4 * SMALL.D * 2  # keys and values of 3 rows, float16
    assert set(some.layer(0).windows) >= {"k_ring", "v_ring", "k_sink", "v_sink"}


@pytest.mark.parametrize("sinks", [-1, True, 1.0, "4", None])
def test_refused_counts(sinks):
    with pytest.raises((TypeError, ValueError)) as error:
        new_cache(SMALL, sink_tokens=sinks)
    assert "`sink_tokens`" in str(error.value) and repr(sinks) in str(error.value)


def test_a_refused_prompt_changes_nothing():
    cache, inputs, _ = run(SMALL, 4, [30, 2], steps=1)
    before = snapshot(cache)
    with pytest.raises((ValueError, RuntimeError)):
        cache.prefill(inputs.k, inputs.v, [30, 2])
    assert_unchanged(cache, before, [31, 3])

"""A cache filled at once and one filled token by token hold, and answer, the same bits."""

import pytest
import torch
from caches import assert_same_contents, assert_same_outputs, feed, new_cache
from configurations import CONFIGS, FEW, config_id, with_window
from hypothesis import given, settings
from hypothesis import strategies as st
from inputs import QUANTIZED_DATA, draw

AFTER = 2  # steps whose outputs are compared


def check(cfg, lengths, streamed, window="kivi", data="normal"):
    """Prefill all but `streamed` tokens of every row and decode those, or prefill all."""
    B = len(lengths)
    inputs = draw(cfg, max(lengths) - streamed, [n - streamed for n in lengths], data=data,
                  steps=streamed + AFTER)  # fmt: skip
    one, other = (new_cache(cfg, B, window=window) for _ in range(2))
    one.prefill(inputs.k, inputs.v, inputs.lengths)
    k, v = (
        whole(inputs.k, inputs.k_new, lengths, streamed),
        whole(inputs.v, inputs.v_new, lengths, streamed),
    )
    other.prefill(k, v, lengths)
    feed(one, inputs, streamed)
    for row in range(B):
        assert_same_contents(one, row, other, row)
    found, expected = (feed(cache, inputs, AFTER, first=streamed) for cache in (one, other))
    assert_same_outputs(found, expected)


def whole(prompt, new, lengths, streamed):
    """`[B, H_kv, T, D]` with the new tokens right behind each row's prompt."""
    B, H_kv, _, D = prompt.shape
    joined = prompt.new_full((B, H_kv, max(lengths), D), float("nan"))
    for row, length in enumerate(lengths):
        start = length - streamed
        joined[row, :, :start] = prompt[row, :, :start]
        joined[row, :, start:length] = new[:streamed, row].movedim(0, 1)
    return joined


@pytest.mark.parametrize("cfg", CONFIGS, ids=config_id)
def test_every_kernel_across_a_flush(cfg):
    cfg = with_window(cfg, cfg.G_k)
    check(cfg, [3 * cfg.R + 31, cfg.R + 41], cfg.R + 10)


@pytest.mark.parametrize("window", ["kivi", "exact"])
@pytest.mark.parametrize("data", QUANTIZED_DATA)
def test_data(data, window):
    cfg = with_window(FEW[2], 32)
    check(cfg, [180, 71], 70, window, data)


@pytest.mark.parametrize("window", ["kivi", "exact"])
@pytest.mark.parametrize("cfg", FEW, ids=config_id)
def test_from_empty(cfg, window):
    cfg = with_window(cfg, cfg.G_k)
    check(cfg, [2 * cfg.R + 2] * 2, 2 * cfg.R + 2, window)


@settings(max_examples=12)
@given(
    st.sampled_from(FEW),
    st.lists(st.integers(0, 330), min_size=1, max_size=4),
    st.integers(0, 70),
    st.sampled_from([1, 2, 3]),
    st.sampled_from(["kivi", "exact"]),
)
def test_any_lengths(cfg, prompts, streamed, blocks, window):
    cfg = with_window(cfg, blocks * cfg.G_k)
    check(cfg, [n + streamed for n in prompts], streamed, window)


def test_reset_and_the_next_sequence():
    """A cache used before holds and answers what a fresh one does."""
    cfg = FEW[0]
    first, second = draw(cfg, 400, batch_size=2, seed=1), draw(cfg, 301, batch_size=2, steps=3)
    used, fresh = new_cache(cfg, 2), new_cache(cfg, 2)
    used.prefill(first.k, first.v)
    feed(used, first, 1)
    used.reset()
    assert used.lengths == [0, 0] and (used.rows.state == 0).all()
    for cache in (used, fresh):
        cache.prefill(second.k, second.v)
    assert_same_outputs(*(feed(cache, second, 3) for cache in (used, fresh)))
    for row in range(2):
        assert_same_contents(used, row, fresh, row)


def test_runs_repeat_exactly():
    inputs = draw(FEW[1], 700, batch_size=2, steps=4)
    runs = []
    for _ in range(3):
        cache = new_cache(FEW[1], 2)
        cache.prefill(inputs.k, inputs.v)
        runs.append(feed(cache, inputs, 4))
    for run in runs[1:]:
        assert_same_outputs(run, runs[0])
    assert all(torch.isfinite(out).all() for out, _ in runs[0])

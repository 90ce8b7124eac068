"""Rows of a filled `KiviCache` shortened, permuted, repeated, selected and copied."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from hf.tiny import tiny_hybrid, tiny_linear, tiny_llama
from hf.turns import after, feed, new_cache, ragged, turn
from transformers import DynamicCache

from kivi_tvm.hf.reference_cache import ReferenceKiviCache
from kivi_tvm.hf.rows import CANDIDATES
from kivi_tvm.hf.support import CROPS_NEGATIVE_ONLY, _version
from kivi_tvm.reference import ReferenceCache

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # as in test_cache.py


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "removed",
    [turn(7, 7, seed=1), turn(7, 3, seed=1), turn(7, 3, seed=1, side="right"), ragged(1)],
    ids=["whole", "left", "right", "interior"],
)
@pytest.mark.parametrize("window", ["kivi", "exact"])
@pytest.mark.parametrize("first", [(90, 61), (62, 63), (5, 9)], ids=str)
def test_crop_within_rollback_leaves_no_trace(llama, window, first, removed):
    want, got = (new_cache(llama, rollback=9, window=window) for _ in range(2))
    _, mask = feed(llama, want, [turn(*first)])
    feed(llama, got, [turn(*first), removed])
    got.crop(-removed["attention_mask"].shape[1])
    assert (got.lengths, got.get_seq_length()) == (list(first), max(first))
    assert torch.equal(after(llama, got, mask), after(llama, want, mask))
    assert got.report()["refilled"] == [0, 0]


def test_crop_of_columns_of_several_turns(llama):
    want, got = (new_cache(llama, rollback=16) for _ in range(2))
    _, mask = feed(llama, want, [turn(40, 38)])
    feed(llama, got, [turn(40, 38), ragged(1), turn(1, 0), turn(2, 3)])
    got.crop(-13)
    assert got.lengths == [40, 38]
    assert torch.equal(after(llama, got, mask), after(llama, want, mask))


def test_crop_equals_transformers_within_the_window(llama):
    first, removed, last = turn(5, 9), ragged(1), turn(6, 4, seed=2)
    logits = []
    for cache in (DynamicCache(config=llama.config), ReferenceKiviCache(llama.config)):
        _, mask = feed(llama, cache, [first, removed])
        cache.crop(-4)
        assert cache.get_seq_length() == 14
        logits.append(feed(llama, cache, [last], mask[:, :-4])[0])
    torch.testing.assert_close(*logits, **CLOSE)


def test_crop_beyond_rollback_says_so_once(llama):
    cache = new_cache(llama, rollback=2)
    _, mask = feed(llama, cache, [turn(90, 20), turn(8, 8, seed=1)])
    message = "took back 8 tokens of a row, more than rollback=2 holds .* pass `rollback=8`"
    with pytest.warns(RuntimeWarning, match=message):
        cache.crop(-8)
    assert cache.report()["refilled"] == [6, 0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        feed(llama, cache, [turn(3, 3, seed=1)], mask[:, :-8])
        cache.crop(-5)
    assert cache.report()["refilled"][0] > 6
    assert cache.lengths == [88, 18]


def test_crop_all_starts_over(llama):
    cache, fresh = new_cache(llama), new_cache(llama)
    feed(llama, cache, [ragged()])
    cache.crop(-100)
    assert (cache.get_seq_length(), cache.lengths) == (0, [0, 0])
    assert torch.equal(feed(llama, cache, [turn(70, 3)])[0], feed(llama, fresh, [turn(70, 3)])[0])
    cache.reset()
    cache.crop(-3)
    assert cache.get_seq_length() == 0


def test_crop_of_a_positive_number_is_as_in_transformers(llama):
    cache = new_cache(llama)
    feed(llama, cache, [turn(9, 9)])
    if _version() >= CROPS_NEGATIVE_ONLY:
        with pytest.raises(ValueError, match=r"must be minus the number of tokens .* got 4"):
            cache.crop(4)
        assert cache.lengths == [9, 9]
    else:
        cache.crop(12)
        assert cache.lengths == [9, 9]
        cache.crop(4)
        assert cache.lengths == [4, 4]


def test_recording_sets_rollback_before_and_after_the_first_forward(llama):
    for late in (False, True):
        want, got = new_cache(llama), new_cache(llama)
        _, mask = feed(llama, want, [turn(90, 61)])
        if not late:
            got.activate_past_recording()
        feed(llama, got, [turn(90, 61)])
        got.activate_past_recording()
        assert got.rollback == got.report()["rollback"] == CANDIDATES
        feed(llama, got, [turn(20, 20, seed=1)], mask)
        got.crop(-20)
        assert got.report()["refilled"] == [0, 0]
        assert torch.equal(after(llama, got, mask), after(llama, want, mask))


def test_recording_keeps_the_rollback_that_was_given(llama):
    cache = new_cache(llama, rollback=3)
    cache.activate_past_recording()
    feed(llama, cache, [turn(9)])
    cache.activate_past_recording()
    assert cache.rollback == 3


def test_rounds_of_many_candidates_raise_rollback(llama):
    """As the "heuristic" schedule adds them: the next round can be taken back before it comes."""
    cache = new_cache(llama)
    cache.activate_past_recording()
    _, mask = feed(llama, cache, [turn(90)])
    cache.crop(0)
    for candidates, rollback in [(30, 1), (32, 2), (34, 2)]:
        _, longer = feed(llama, cache, [turn(1 + candidates, seed=candidates)], mask)
        cache.crop(-candidates)
        mask = longer[:, : longer.shape[1] - candidates]
        assert cache.rollback == rollback * CANDIDATES
        assert cache.report()["refilled"] == [0]


def test_the_next_turn_of_a_chat_is_no_round_of_candidates(llama):
    cache = new_cache(llama)
    cache.activate_past_recording()
    _, mask = feed(llama, cache, [turn(90)])
    cache.crop(-1)
    _, mask = feed(llama, cache, [turn(50, seed=1)], mask[:, :-1])
    _, mask = feed(llama, cache, [turn(1, seed=2)], mask)
    cache.crop(0)
    assert cache.rollback == CANDIDATES


def rearranged(cache, index):
    """`cache` with rows `index`, by whichever method of transformers does that."""
    if index == [0, 0, 1, 1]:
        cache.batch_repeat_interleave(2)
    elif len(index) == 2:
        cache.reorder_cache(torch.tensor(index))
    else:
        cache.batch_select_indices(torch.tensor(index))
    return cache


@pytest.mark.parametrize("index", [[1, 0], [1, 1], [0, 0, 1, 1], [1], [1, 0, 1]], ids=str)
@pytest.mark.parametrize("first", [turn(70, 33), ragged()], ids=["left", "interior"])
def test_rearranged_rows_go_on_as_before(llama, index, first):
    cache = new_cache(llama)
    _, mask = feed(llama, cache, [first])
    got = after(llama, rearranged(cache, index), mask[index], len(index))
    chosen = {name: x[index] for name, x in first.items()}
    fresh = new_cache(llama)
    _, mask = feed(llama, fresh, [chosen])
    torch.testing.assert_close(got, after(llama, fresh, mask, len(index)), **CLOSE)
    assert cache.batch_size == len(index)
    assert cache.lengths == fresh.lengths
    cache.reset()
    feed(llama, cache, [turn(3)])
    assert cache.lengths == [3]


def test_select_by_a_mask(llama):
    cache = new_cache(llama)
    feed(llama, cache, [turn(9, 5, 7)])
    cache.batch_select_indices(torch.tensor([True, False, True]))
    assert (cache.lengths, cache.batch_size) == ([9, 7], 2)


def test_empty_cache_has_no_rows_to_rearrange(llama):
    cache = new_cache(llama)
    cache.batch_repeat_interleave(3)
    cache.batch_select_indices(torch.tensor([], dtype=torch.long))
    cache.reorder_cache(torch.tensor([0, 0]))
    cache.crop(-1)
    feed(llama, cache, [turn(4, 5)])
    assert cache.lengths == [4, 5]


@pytest.mark.parametrize("first", [turn(70, 33), ragged()], ids=["left", "interior"])
def test_deepcopy_is_independent(llama, first):
    cache = new_cache(llama)
    _, mask = feed(llama, cache, [first])
    held = cache.lengths
    one, two = copy.deepcopy(cache), copy.deepcopy(cache)
    want = after(llama, one, mask)
    assert (cache.lengths, two.lengths) == (held, held)
    two.crop(0)
    assert torch.equal(after(llama, two, mask), want)
    del one, two
    assert torch.equal(after(llama, cache, mask), want)


def test_deepcopy_of_an_empty_cache(llama):
    cache = copy.deepcopy(new_cache(llama))
    feed(llama, cache, [turn(4, 5)])
    assert cache.lengths == [4, 5]


@pytest.mark.parametrize("first", [(9, 5), (40, 21)], ids=str)
def test_hybrid_model(first):
    model = tiny_hybrid()
    logits = []
    for cache in (DynamicCache(config=model.config), ReferenceKiviCache(model.config)):
        cache.activate_past_recording()
        _, mask = feed(model, cache, [turn(*first)])
        cache.crop(0)  # 5.17 needs it after each forward
        _, mask = feed(model, cache, [turn(6, 6, seed=1)], mask)
        cache.crop(-4)
        mask = mask[:, :-4]
        for change in ([1, 0], [0, 0, 1, 1], [3, 1]):
            cache, mask = rearranged(cache, change), mask[change]
            found, mask = feed(model, cache, [turn(*[2] * len(change), seed=2)], mask)
            cache.crop(0)
            logits.append(found)
        cache = copy.deepcopy(cache)
        logits.append(feed(model, cache, [turn(2, 2, seed=3)], mask)[0])
    for want, got in zip(logits[:4], logits[4:]):
        torch.testing.assert_close(got, want, **CLOSE)


def test_sliding_layer_that_forgot_is_noticed_before_anything_changed():
    model = tiny_hybrid()
    cache, other = (ReferenceKiviCache(model.config) for _ in range(2))
    for x in (cache, other):
        _, mask = feed(model, x, [turn(40, 21)])
    with pytest.raises(RuntimeError, match=r"layer 0 \(DynamicSliding.* cannot take back 4"):
        cache.crop(-4)
    assert cache.lengths == [40, 21]
    steps = [turn(1, 1, seed=1)]
    assert torch.equal(feed(model, cache, steps, mask)[0], feed(model, other, steps, mask)[0])


def test_reset_goes_on_recording():
    model = tiny_hybrid()
    cache = ReferenceKiviCache(model.config)
    cache.activate_past_recording()
    feed(model, cache, [turn(40, 21)])
    cache.reset()
    feed(model, cache, [turn(40, 21)])
    cache.crop(-4)
    assert cache.lengths == [36, 17]


def test_linear_layers():
    model = tiny_linear()
    cache = ReferenceKiviCache(model.config)
    cache.crop(0)
    feed(model, cache, [turn(9)])
    with pytest.raises(RuntimeError, match=r"layer 0 \(LinearAttentionLayer\) cannot take back 1"):
        cache.crop(-1)
    with pytest.raises(NotImplementedError, match=r"`batch_repeat_interleave` .* layer 0"):
        cache.batch_repeat_interleave(2)
    cache.reset()
    logits = []
    for each in (DynamicCache(config=model.config), cache):
        each.activate_past_recording()
        _, mask = feed(model, each, [turn(9), turn(4, seed=1)])
        each.crop(-3)
        logits.append(feed(model, each, [turn(1, seed=2)], mask[:, :-3])[0])
    torch.testing.assert_close(*logits, **CLOSE)


@pytest.mark.parametrize("where", ["mask", "store"])
def test_linear_layers_are_ahead_of_a_refused_forward(where, monkeypatch):
    model = tiny_linear()
    steps = [turn(9), turn(1, seed=1)]
    expected, _ = feed(model, ReferenceKiviCache(model.config), steps)
    cache = ReferenceKiviCache(model.config)
    _, mask = feed(model, cache, steps[:1])
    if where == "mask":
        custom = torch.zeros(1, 1, 1, 10)
        with pytest.raises(NotImplementedError, match="attention_mask"):
            model(steps[1]["input_ids"], attention_mask=custom, past_key_values=cache)
    else:
        with monkeypatch.context() as patch:
            patch.setattr(ReferenceCache, "decode", fail)
            with pytest.raises(MemoryError):
                feed(model, cache, steps[1:], mask)
    for call in (lambda: feed(model, cache, steps[1:], mask), lambda: cache.crop(-1)):
        with pytest.raises(RuntimeError, match=r"linear layers \[0\] .*`reset\(\)`"):
            call()
    cache.reset()
    assert torch.equal(feed(model, cache, steps)[0], expected)


def fail(*args, **kwargs):
    raise MemoryError


@pytest.mark.parametrize(
    "kinds", list(itertools.permutations(["sliding_attention", "full_attention"]))
)
def test_sliding_layers_are_ahead_or_behind(kinds):
    """A forward that stopped between the layers is noticed, whichever comes first."""
    model = tiny_hybrid(kinds)
    cache = ReferenceKiviCache(model.config)
    _, mask = feed(model, cache, [turn(9)])
    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        feed(model, cache, [turn(1)], mask)
    hook.remove()
    for call in (
        lambda: feed(model, cache, [turn(1)], mask),
        lambda: cache.crop(-1),
        lambda: copy.deepcopy(cache),
    ):
        with pytest.raises(RuntimeError, match="stopped half-way"):
            call()


def test_the_wrong_attention_is_named_again():
    model = tiny_linear(["conv", "full_attention", "full_attention"])
    cache = ReferenceKiviCache(model.config)
    model.set_attn_implementation("sdpa")
    for _ in range(3):
        with pytest.raises(RuntimeError, match="set_attn_implementation"):
            feed(model, cache, [turn(9)])


CALLS = {
    "crop": lambda c: c.crop(-1),
    "activate_past_recording": lambda c: c.activate_past_recording(),
    "reorder_cache": lambda c: c.reorder_cache(torch.tensor([1, 0])),
    "batch_repeat_interleave": lambda c: c.batch_repeat_interleave(2),
    "batch_select_indices": lambda c: c.batch_select_indices(torch.tensor([0])),
    "copy.deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("name", CALLS)
def test_amid_a_forward(name):
    model = tiny_llama()
    cache = new_cache(model)
    model.model.layers[1].register_forward_pre_hook(lambda *_: CALLS[name](cache))
    with pytest.raises(RuntimeError, match=rf"`{name}` must come between .* layers \[1\]"):
        feed(model, cache, [turn(5, 4)])

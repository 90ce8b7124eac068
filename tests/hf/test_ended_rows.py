"""Rows that ended before the others: what they stored since is hidden, and taken back, later."""

from __future__ import annotations

import pytest
import torch
from hf.tiny import pad, prompt, tiny_hybrid, tiny_llama
from hf.turns import after, feed, new_cache, turn
from transformers import DynamicCache

from kivi_tvm.hf.reference_cache import ReferenceKiviCache


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


def hide(mask, tokens):
    """`mask` without the last `tokens[i]` columns of row `i`."""
    mask = mask.clone()
    for row, n in zip(mask, tokens):
        row[len(row) - n :] = 0
    return mask


def chat(model, cache, turns=3):
    """Turns of a batch of which rows end early; the ids after each."""
    inputs = pad([prompt(n, seed=n)[0] for n in (5, 33, 9)])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    greedy = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
    end, found = int(greedy[0, 36]), []
    for i in range(turns):
        past = ids.shape[1]
        ids = model.generate(
            ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=0,
        )
        found.append(ids)
        ends = (ids[:, past:] == end).long()
        mask = torch.cat([mask, (ends.cumsum(1) - ends == 0).long()], 1)
        new = pad([prompt(n, seed=n + i)[0] for n in (4, 2, 6)])
        ids = torch.cat([ids, new["input_ids"]], 1)
        mask = torch.cat([mask, new["attention_mask"]], 1)
    return found, mask


@pytest.mark.parametrize("make", [tiny_llama, tiny_hybrid], ids=["llama", "hybrid"])
def test_chat_of_rows_that_end_early_equals_transformers(make):
    model = make()
    cache = ReferenceKiviCache(model.config)
    want, mask = chat(model, DynamicCache(config=model.config))
    got, _ = chat(model, cache)
    assert all(map(torch.equal, want, got))
    assert 0 in mask[0, 33:], "no row ended early"
    # The last new turn and the last generated token are not stored.
    assert cache.lengths != [cache.get_seq_length()] * 3


@pytest.mark.parametrize("first", [(90, 61), (62, 63)], ids=str)
@pytest.mark.parametrize("tokens", [(6, 0), (3, 8)], ids=str)
def test_hidden_tokens_leave_no_trace(llama, first, tokens):
    want, got = (new_cache(llama, rollback=8) for _ in range(2))
    _, mask = feed(llama, want, [turn(*first)])
    side = turn(*[8 - n for n in tokens], seed=1, side="right")
    # The same tokens, but none stored for those that are hidden later.
    feed(llama, want, [pad_to(side, 8)], mask)
    _, mask = feed(llama, got, [turn(*first), {**pad_to(side, 8), "attention_mask": ones(8)}])
    mask = hide(mask, tokens)
    torch.testing.assert_close(after(llama, got, mask), after(llama, want, mask))
    assert got.lengths == want.lengths
    assert got.report()["refilled"] == [0, 0]


def ones(columns):
    return torch.ones(2, columns, dtype=torch.long)


def pad_to(inputs, columns):
    """`inputs` with padding columns on the right."""
    missing = columns - inputs["input_ids"].shape[1]
    return {name: torch.nn.functional.pad(x, (0, missing)) for name, x in inputs.items()}


def test_hiding_goes_on_over_turns(llama):
    want, got = (new_cache(llama, rollback=8) for _ in range(2))
    _, mask = feed(llama, got, [turn(9, 9)])
    mask = hide(mask, (2, 0))
    _, mask = feed(llama, got, [turn(1, 1, seed=1)], mask)
    mask = hide(mask, (0, 1))
    mask[0, -1] = 0
    got_logits, mask = feed(llama, got, [turn(2, 2, seed=2)], mask)
    first = {**turn(9, 9), "attention_mask": hide(ones(9), (2, 0))}
    second = {**turn(1, 1, seed=1), "attention_mask": ones(1) * 0}
    want_logits, _ = feed(llama, want, [first, second, turn(2, 2, seed=2)])
    torch.testing.assert_close(got_logits, want_logits[-4:])
    assert got.lengths == [9, 11]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m[0, 3:5].zero_(), "row 0, column 3 newly hidden in front of visible"),
        (lambda m: (m[0, 3:9].zero_(), m[1, 0].fill_(1)), "row 1, column 0 newly visible"),
    ],
)
def test_other_changes_are_refused(llama, change, message):
    cache, other = new_cache(llama), new_cache(llama)
    for x in (cache, other):
        _, mask = feed(llama, x, [turn(9, 6)])
    changed = mask.clone()
    change(changed)
    with pytest.raises(NotImplementedError, match=message):
        feed(llama, cache, [turn(1, 1)], changed)
    assert torch.equal(after(llama, cache, mask), after(llama, other, mask))


@pytest.mark.parametrize("width", [1, 7])
@pytest.mark.parametrize("rollback", [0, 64])
def test_a_mask_without_the_new_tokens_takes_nothing_back(llama, rollback, width):
    cache, other = (new_cache(llama, rollback=rollback) for _ in range(2))
    for x in (cache, other):
        _, mask = feed(llama, x, [turn(9, 9)])
    token = turn(1, 1)["input_ids"]
    with pytest.raises(ValueError, match=rf"last \[{9 - width}, {9 - width}\] .* column 9: has it"):
        llama(token, attention_mask=ones(width), past_key_values=cache)
    assert cache.lengths == other.lengths == [9, 9]
    llama(turn(4, 4)["input_ids"], attention_mask=ones(width), past_key_values=cache)
    assert cache.lengths == other.lengths and cache.get_seq_length() == 13
    cache.crop(-4)
    assert torch.equal(after(llama, cache, mask), after(llama, other, mask))


@pytest.mark.parametrize("first", [(9, 6), (26, 1)], ids=str)
def test_chunks_of_padding_come_before_the_next_turn(llama, first):
    want, got = (new_cache(llama, rollback=8) for _ in range(2))
    for x in (want, got):
        _, mask = feed(llama, x, [turn(*first)])
    mask = hide(mask, (2, 1))
    whole = turn(16, 16, seed=1)
    whole["attention_mask"][:, :11] = 0
    whole["attention_mask"][1, 11:13] = 0
    chunks = [{name: x[:, i : i + 4] for name, x in whole.items()} for i in range(0, 16, 4)]
    expected, end = feed(llama, want, [whole], mask)
    feed(llama, got, chunks[:2], mask)
    assert got.lengths == [first[0], first[1]]
    found, _ = feed(llama, got, chunks[2:], end[:, :-8])
    torch.testing.assert_close(found, expected)  # one token of the first row, then 4 and 3
    assert got.lengths == want.lengths
    torch.testing.assert_close(after(llama, got, end), after(llama, want, end))


def test_room_is_checked_before_rows_are_taken_back(llama):
    cache = new_cache(llama, max_tokens=11)
    _, mask = feed(llama, cache, [turn(9, 6)])
    with pytest.raises(ValueError, match="`max_tokens` must be at least 12, got 11"):
        feed(llama, cache, [turn(5, 6)], hide(mask, (2, 0)))
    assert cache.lengths == [9, 6]
    feed(llama, cache, [turn(2, 2)], mask)
    assert cache.lengths == [11, 8]


def test_another_mask_may_not_hide_more_in_a_later_layer():
    model = tiny_llama()
    cache = new_cache(model)
    _, mask = feed(model, cache, [turn(9, 6)])

    def hide_more(module, args, kwargs):
        kwargs["attention_mask"] = kwargs["attention_mask"].clone()
        kwargs["attention_mask"][0, ..., 7:9] = False
        return args, kwargs

    layer = model.model.layers[1].self_attn
    layer.register_forward_pre_hook(hide_more, with_kwargs=True)
    with pytest.raises(NotImplementedError, match=r"same columns in all layers, got .* layer 1"):
        feed(model, cache, [turn(1, 1)], mask)

"""Bad calls: each raises in words that name argument, rule and value, and changes nothing."""

from __future__ import annotations

import pickle

import pytest
import torch
from hf.compare import run
from hf.tiny import pad, prompt, tiny_llama

from kivi_tvm.hf.reference_cache import ReferenceKiviCache


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


@pytest.fixture
def inputs():
    return pad([prompt(n, seed=n)[0] for n in (9, 6)])


def unchanged(llama, cache, inputs):
    """Whether `cache` goes on as one that only ever saw `inputs`."""
    other = ReferenceKiviCache(llama.config)
    run(llama, other, inputs, 0)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    step = {"input_ids": prompt(1, 2), "attention_mask": mask}
    with torch.no_grad():
        return torch.equal(
            llama(**step, past_key_values=cache).logits, llama(**step, past_key_values=other).logits
        )


def filled(llama, inputs, **options):
    cache = ReferenceKiviCache(llama.config, **options)
    run(llama, cache, inputs, 0)
    return cache


def mask_after(inputs, tokens=1, **hidden):
    """The mask of more tokens; `hidden` says row and column: h0=4 hides, s0=4 shows."""
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, tokens, dtype=torch.long)], 1)
    for name, column in hidden.items():
        mask[int(name[1]), column] = int(name[0] == "s")
    return mask


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.layers[0].reorder_cache(torch.tensor([1, 0])), "of one layer"),
        (lambda c: c.offload(0), "offload"),
        (pickle.dumps, "pickle"),
    ],
)
def test_unsupported_methods(llama, inputs, call, message):
    cache = filled(llama, inputs)
    with pytest.raises(NotImplementedError, match=message):
        call(cache)
    assert unchanged(llama, cache, inputs)


def test_several_tokens_with_a_bidirectional_mask(llama, inputs):
    cache = filled(llama, inputs)
    mask = mask_after(inputs, tokens=3).bool()[:, None, None].expand(2, 1, 3, 12)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="row 0 is not causal"):
        llama(prompt(3, 2), attention_mask=mask, past_key_values=cache)
    assert unchanged(llama, cache, inputs)


def test_several_tokens_beyond_max_tokens(llama, inputs):
    cache = filled(llama, inputs, max_tokens=11)
    mask = mask_after(inputs, tokens=3)
    with torch.no_grad(), pytest.raises(ValueError, match="max_tokens"):
        llama(prompt(3, 2), attention_mask=mask, past_key_values=cache)
    assert unchanged(llama, cache, inputs)


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        ({"h0": 4}, "row 0, column 4 newly hidden in front"),
        ({"s1": 1}, "row 1, column 1 newly visible"),
    ],
)
@pytest.mark.parametrize("tokens", [1, 3])
def test_columns_that_change(llama, inputs, hidden, message, tokens):
    cache = filled(llama, inputs)
    mask = mask_after(inputs, tokens, **hidden)
    with torch.no_grad(), pytest.raises(NotImplementedError, match=message):
        llama(prompt(tokens, 2), attention_mask=mask, past_key_values=cache)
    assert unchanged(llama, cache, inputs)


@pytest.mark.parametrize("tokens", [1, 3])
def test_forgotten_mask_of_a_padded_batch(llama, inputs, tokens):
    cache = filled(llama, inputs)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="newly visible"):
        llama(prompt(tokens, 2), past_key_values=cache)
    assert unchanged(llama, cache, inputs)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(2, 1, 9, 9), r"custom 4-D masks are not supported\), got dtype torch.float32"),
        (torch.ones(2, 1, 9, 9, dtype=torch.bool), "row 0 is not causal"),
        (torch.ones(2, 4, 9, 9, dtype=torch.bool), r"shape \[2, 4, 9, 9\]"),
    ],
    ids=["float", "bidirectional", "per-head"],
)
def test_custom_masks(llama, mask, message):
    cache = ReferenceKiviCache(llama.config)
    with torch.no_grad(), pytest.raises(NotImplementedError, match=message):
        llama(prompt(9, 2), attention_mask=mask, past_key_values=cache)
    assert (cache.get_seq_length(), cache.lengths) == (0, [])


def test_another_batch_size_in_the_middle(llama, inputs):
    cache = filled(llama, inputs)
    message = "must have the cache's batch size 2, got 1"
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        llama(prompt(1), past_key_values=cache)
    assert unchanged(llama, cache, inputs)


def test_max_tokens(llama, inputs):
    cache = filled(llama, inputs, max_tokens=9)
    with torch.no_grad(), pytest.raises(ValueError, match="max_tokens"):
        llama(prompt(1, 2), attention_mask=mask_after(inputs), past_key_values=cache)
    assert cache.lengths == [9, 6]
    assert cache.get_seq_length() == 9


@pytest.mark.parametrize("by", ["argument", "config"])
def test_output_attentions(llama, inputs, by):
    model, cache = tiny_llama(), filled(llama, inputs)
    step = {"attention_mask": mask_after(inputs), "past_key_values": cache}
    if by == "argument":
        step["output_attentions"] = True
    else:  # transformers refuses it for any other implementation than this
        model.set_attn_implementation("eager")
        model.config.output_attentions = True
        model.set_attn_implementation("kivi_tvm")
    with torch.no_grad(), pytest.raises(NotImplementedError, match="`output_attentions`"):
        model(prompt(1, 2), **step)
    assert unchanged(llama, cache, inputs)


def test_gradients(llama, inputs):
    model, cache = tiny_llama(), filled(llama, inputs)
    model.requires_grad_(True)
    step = {"attention_mask": mask_after(inputs), "past_key_values": cache}
    with pytest.raises(NotImplementedError, match="gradients must be off"):
        model(prompt(1, 2), **step)
    assert unchanged(llama, cache, inputs)


def test_dropout(inputs):
    model = tiny_llama(attention_dropout=0.1)
    cache = filled(model, inputs)
    step = {"attention_mask": mask_after(inputs), "past_key_values": cache}
    model.train()
    with torch.no_grad(), pytest.raises(NotImplementedError, match=r"`dropout` must be 0 .* 0.1"):
        model(prompt(1, 2), **step)
    assert unchanged(model.eval(), cache, inputs)


def test_forward_that_stopped_half_way(llama, inputs):
    model, cache = tiny_llama(), ReferenceKiviCache(llama.config)

    def fail(*args):
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with torch.no_grad():
        with pytest.raises(KeyboardInterrupt):
            model(**inputs, past_key_values=cache)
        hook.remove()
        with pytest.raises(RuntimeError, match=r"before layers \[1\] had attended"):
            model(prompt(1, 2), attention_mask=mask_after(inputs), past_key_values=cache)
        cache.reset()
    run(model, cache, inputs, 0)
    assert unchanged(model, cache, inputs)

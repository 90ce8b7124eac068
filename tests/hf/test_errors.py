"""Bad input: each raises in words that name argument, rule and value, and changes nothing."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from hf.compare import run
from hf.tiny import TINY, pad, prepare, prompt, tiny_llama
from hf.torch_kivi import TorchKiviCache
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
)

from kivi_tvm.hf.attention import kivi_attention_forward
from kivi_tvm.hf.support import CALL_RULES

SMALL = {"vocab_size": 96, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


@pytest.fixture
def inputs():
    return pad([prompt(n, seed=n)[0] for n in (9, 6)])


def unchanged(llama, cache, inputs):
    """Whether `cache` goes on as one that only ever saw `inputs`."""
    other = TorchKiviCache(llama.config)
    _, tokens = run(llama, other, inputs, 0)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    step = {"input_ids": prompt(1, 2), "attention_mask": mask}
    with torch.no_grad():
        return torch.equal(
            llama(**step, past_key_values=cache).logits, llama(**step, past_key_values=other).logits
        )


def filled(llama, inputs, **options):
    cache = TorchKiviCache(llama.config, **options)
    run(llama, cache, inputs, 0)
    return cache


def mask_after(inputs, **hidden):
    """The mask of one more token; `hidden={"row": column}` as r0=..., `shown` likewise."""
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1, dtype=torch.long)], 1)
    for name, column in hidden.items():
        mask[int(name[1]), column] = int(name[0] == "s")
    return mask


# Models ------------------------------------------------------------------------------------------

REFUSED_MODELS = {
    "sliding only": (
        lambda: AutoConfig.for_model("mistral", **SMALL, sliding_window=16),
        r"must have a full-attention layer, got only \['DynamicSlidingWindowLayer'\]",
    ),
    "DeepSeek-V3": (
        lambda: AutoConfig.for_model("deepseek_v3", **SMALL, kv_lora_rank=32),
        r"`config.kv_lora_rank` must be None, got 32 \('deepseek_v3'\)",
    ),
    "T5": (lambda: AutoConfig.for_model("t5"), "decoder-only model, got encoder-decoder 't5'"),
    "shared keys and values": (
        lambda: AutoConfig.for_model("gemma3n_text", num_kv_shared_layers=15),
        "`config.num_kv_shared_layers` must be 0, got 15",
    ),
    "hybrid layers": (
        lambda: AutoConfig.for_model("falcon_h1", **SMALL, num_key_value_heads=2),
        "got LinearAttentionAndFullAttentionLayer",
    ),
    "no attention": (
        lambda: AutoConfig.for_model("mamba", vocab_size=96, hidden_size=64, num_hidden_layers=2),
        r"must have a full-attention layer, got only \['LinearAttentionLayer'\]",
    ),
}


@pytest.mark.parametrize("name", REFUSED_MODELS)
def test_constructor_refuses_model(name):
    make, message = REFUSED_MODELS[name]
    with pytest.raises(ValueError, match=message):
        TorchKiviCache(make())


def test_falcon_has_no_replaceable_attention():
    model = prepare(FalconForCausalLM(FalconConfig(**SMALL, num_kv_heads=2)))
    cache = TorchKiviCache(model.config)
    with pytest.raises(RuntimeError, match=r"layer 0 did not go through kivi_tvm attention"):
        model.generate(prompt(5), past_key_values=cache, max_new_tokens=3)
    assert cache.lengths == []


def test_attention_sinks_of_gpt_oss():
    config = AutoConfig.for_model(
        "gpt_oss", **{**TINY, "num_local_experts": 2, "num_experts_per_tok": 1}
    )
    model = AutoModelForCausalLM.from_config(config)
    model.config._attn_implementation = "kivi_tvm"
    cache = TorchKiviCache(config)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="`s_aux` must be None"):
        model(prompt(5), past_key_values=cache)
    assert cache.lengths == []


def test_attention_not_set_is_noticed_in_the_first_forward(llama):
    model = tiny_llama()
    model.set_attn_implementation("sdpa")
    cache = TorchKiviCache(model.config)
    for _ in range(2):  # the second try is not mistaken for a prompt
        with torch.no_grad(), pytest.raises(RuntimeError, match="set_attn_implementation"):
            model(prompt(5), past_key_values=cache)
    model.set_attn_implementation("kivi_tvm")
    cache.reset()
    want = llama.generate(prompt(5), max_new_tokens=4, do_sample=False)
    got = model.generate(prompt(5), past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert torch.equal(got, want)


def test_attention_not_set_with_one_layer_is_noticed_before_decoding():
    model = tiny_llama(num_hidden_layers=1)
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="layer 0 did not go through"):
        model.generate(prompt(5), past_key_values=TorchKiviCache(model.config), max_new_tokens=3)


# Options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_bits": 3}, r"`key_bits` must be one of \[2, 4, 8\], got 3"),
        ({"group_size": 48}, r"`group_size` must be one of .* got 48"),
        ({"residual_length": 100}, "`residual_length` must be a positive multiple .* got 100"),
        ({"window": "half"}, r"`window` must be one of \['kivi', 'exact'\], got 'half'"),
        ({"max_tokens": 0}, "`max_tokens` must be None or a positive int, got 0"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        TorchKiviCache(LlamaConfig(**TINY), **options)


def test_head_dim_without_kernels():
    model = tiny_llama(head_dim=48)
    cache = TorchKiviCache(model.config)
    with torch.no_grad(), pytest.raises(ValueError, match="`head_dim` must be one of .* got 48"):
        model(prompt(5), past_key_values=cache)
    assert (cache.get_seq_length(), cache.lengths) == (0, [])


# Calls -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.crop(-1), r"`crop\(-1\)` \(rollback"),
        (lambda c: c.activate_past_recording(), "assisted decoding"),
        (lambda c: c.reorder_cache(torch.tensor([1, 0])), "beam search"),
        (lambda c: c.batch_repeat_interleave(2), "copying rows"),
        (lambda c: c.batch_select_indices(torch.tensor([0])), "selecting rows"),
        (lambda c: c.offload(0), "offload"),
        (copy.deepcopy, "deepcopy"),
        (pickle.dumps, "pickle"),
    ],
)
def test_unsupported_methods(llama, inputs, call, message):
    cache = filled(llama, inputs)
    with pytest.raises(NotImplementedError, match=message):
        call(cache)
    assert unchanged(llama, cache, inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"prompt_lookup_num_tokens": 2}, "assisted decoding"),
        ({"prefill_chunk_size": 4}, "one token at a time after the prompt.*got 4 tokens on top"),
    ],
)
def test_unsupported_generate(llama, options, message):
    with pytest.raises(NotImplementedError, match=message):
        llama.generate(
            prompt(9),
            past_key_values=TorchKiviCache(llama.config),
            max_new_tokens=4,
            do_sample=False,
            **options,
        )


def test_several_tokens_on_a_filled_cache(llama, inputs):
    cache = filled(llama, inputs)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="got 3 tokens on top of 9"):
        llama(prompt(3, 2), past_key_values=cache)
    assert unchanged(llama, cache, inputs)


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        ({"h0": 4}, "row 0, column 4 newly hidden"),
        ({"s1": 1}, "row 1, column 1 newly visible"),
        ({"h1": 9}, "row 1, column 9 newly hidden"),
    ],
)
def test_columns_that_change(llama, inputs, hidden, message):
    cache = filled(llama, inputs)
    mask = mask_after(inputs, **hidden)
    with torch.no_grad(), pytest.raises(NotImplementedError, match=message):
        llama(prompt(1, 2), attention_mask=mask, past_key_values=cache)
    assert unchanged(llama, cache, inputs)


def test_forgotten_mask_of_a_padded_batch(llama, inputs):
    cache = filled(llama, inputs)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="newly visible"):
        llama(prompt(1, 2), past_key_values=cache)
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
    cache = TorchKiviCache(llama.config)
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


# The attention function --------------------------------------------------------------------------


def states(tokens=1, H=4, H_kv=2, D=64):
    return torch.randn(1, H, tokens, D), *torch.randn(2, 1, H_kv, tokens, D)


def attend(q, k, v, **kwargs):
    module = SimpleNamespace(num_key_value_groups=2)
    return kivi_attention_forward(module, q, k, v, None, **kwargs)


@pytest.fixture
def cache(llama):
    return TorchKiviCache(llama.config)


@pytest.mark.parametrize("name", CALL_RULES)
def test_arguments_that_change_attention(cache, name):
    q, k, v = states()
    k, v = cache.update(k, v, 0)
    with pytest.raises(NotImplementedError, match=f"`{name}` must be None with KiviCache, got 30"):
        attend(q, k, v, **{name: 30.0})
    assert cache.get_seq_length() == 0
    cache.update(*states()[1:], 0)  # nothing is pending


def test_keys_and_values_of_different_shape(cache):
    k, v = torch.zeros(1, 2, 3, 64), torch.zeros(1, 2, 3, 32)
    with pytest.raises(ValueError, match=r"one shape .* got \[1, 2, 3, 64\] and \[1, 2, 3, 32\]"):
        cache.update(k, v, 0)
    assert not cache.is_initialized


def test_query_that_does_not_fit(cache):
    q, k, v = states(H=3)
    k, v = cache.update(k, v, 0)
    with pytest.raises(ValueError, match="with H a multiple of 2"):
        attend(q, k, v)


def test_value_that_is_not_the_cache_s(cache):
    q, k, v = states()
    k, _ = cache.update(k, v, 0)
    with pytest.raises(RuntimeError, match="layer 0 must attend once"):
        attend(q, k, v)


def test_key_attended_twice(cache):
    q, k, v = states()
    k, v = cache.update(k, v, 0)
    attend(q, k, v)
    with pytest.raises(RuntimeError, match="layer 0 must attend once"):
        attend(q, k, v)


def test_key_of_another_cache_is_not_mixed_up(llama, cache):
    other = TorchKiviCache(llama.config)
    q, k, v = states()
    k, v = other.update(k, v, 0)
    attend(q, k, v)
    assert (cache.get_seq_length(), other.get_seq_length()) == (0, 1)


def test_forward_that_stopped_half_way(llama, inputs):
    model, cache = tiny_llama(), TorchKiviCache(llama.config)

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


def test_old_transformers(monkeypatch):
    import transformers

    from kivi_tvm.hf.support import require_transformers

    monkeypatch.setattr(transformers, "__version__", "5.16.2")
    with pytest.raises(ImportError, match=r"transformers>=5.17, got 5.16.2"):
        require_transformers()

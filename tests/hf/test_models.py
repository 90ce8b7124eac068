"""Models and options that `KiviCache` cannot serve raise, at the latest in the first forward."""

from __future__ import annotations

import pytest
import torch
from hf.tiny import TINY, prepare, prompt, tiny_llama
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
)

from kivi_tvm.hf.reference_cache import ReferenceKiviCache
from kivi_tvm.hf.support import require_transformers

SMALL = {"vocab_size": 96, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}

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
        ReferenceKiviCache(make())


def test_falcon_has_no_replaceable_attention():
    model = prepare(FalconForCausalLM(FalconConfig(**SMALL, num_kv_heads=2)))
    cache = ReferenceKiviCache(model.config)
    with pytest.raises(RuntimeError, match=r"layer 0 did not go through kivi_tvm attention"):
        model.generate(prompt(5), past_key_values=cache, max_new_tokens=3)
    assert cache.lengths == []


def test_attention_sinks_of_gpt_oss():
    config = AutoConfig.for_model(
        "gpt_oss", **{**TINY, "num_local_experts": 2, "num_experts_per_tok": 1}
    )
    model = AutoModelForCausalLM.from_config(config)
    model.config._attn_implementation = "kivi_tvm"
    cache = ReferenceKiviCache(config)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="`s_aux` must be None"):
        model(prompt(5), past_key_values=cache)
    assert cache.lengths == []


def test_attention_not_set_is_noticed_in_the_first_forward():
    model = tiny_llama()
    model.set_attn_implementation("sdpa")
    cache = ReferenceKiviCache(model.config)
    for _ in range(2):  # the second try is not mistaken for a prompt
        with torch.no_grad(), pytest.raises(RuntimeError, match="set_attn_implementation"):
            model(prompt(5), past_key_values=cache)
    model.set_attn_implementation("kivi_tvm")
    cache.reset()
    want = tiny_llama().generate(prompt(5), max_new_tokens=4, do_sample=False)
    got = model.generate(prompt(5), past_key_values=cache, max_new_tokens=4, do_sample=False)
    assert torch.equal(got, want)


def test_attention_not_set_with_one_layer_is_noticed_before_decoding():
    model = tiny_llama(num_hidden_layers=1)
    model.set_attn_implementation("eager")
    with pytest.raises(RuntimeError, match="layer 0 did not go through"):
        model.generate(
            prompt(5), past_key_values=ReferenceKiviCache(model.config), max_new_tokens=3
        )


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
        ReferenceKiviCache(LlamaConfig(**TINY), **options)


def test_head_dim_without_kernels():
    model = tiny_llama(head_dim=48)
    cache = ReferenceKiviCache(model.config)
    with torch.no_grad(), pytest.raises(ValueError, match=r"`head_dim` must be one of .* got 48"):
        model(prompt(5), past_key_values=cache)
    assert (cache.get_seq_length(), cache.lengths) == (0, [])


def test_old_transformers(monkeypatch):
    monkeypatch.setattr("kivi_tvm.hf.support.transformers.__version__", "5.16.2")
    with pytest.raises(ImportError, match=r"transformers>=5.17, got 5.16.2"):
        require_transformers()

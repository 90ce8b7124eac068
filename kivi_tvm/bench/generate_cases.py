"""What `bench generate` compares: caches of one model, each fed the same tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kivi_tvm.demo.prompt import story
from kivi_tvm.errors import UserError
from kivi_tvm.hf import KiviCache, models, peer_caches
from kivi_tvm.hf.support import ATTENTION_NAME

DYNAMIC, EAGER, KIVI = "dynamic", "dynamic-eager", "kivi"
FAMILIES = (DYNAMIC, EAGER, KIVI, "quanto", "hqq")
LABELS = {DYNAMIC: "DynamicCache", EAGER: "DynamicCache eager", KIVI: "kivi-tvm"}
CHECKED_STEPS = 8  # before the clock starts, compared with full precision
WARM_TOKENS = 128  # a multiple of every group size


@dataclass(frozen=True, slots=True)
class Setting:
    """One cache: a member of `FAMILIES`, its bits (None: full precision), the model's dtype."""

    family: str
    bits: int | None
    dtype: str

    @property
    def name(self) -> str:
        label = LABELS.get(self.family, self.family)
        return label if self.bits is None else f"{label} {self.bits}-bit"


FULL_PRECISION = Setting(DYNAMIC, None, "float32")


@dataclass(frozen=True, slots=True)
class Options:
    """What a run measures; `new_tokens` timed steps of each cache in `rounds` turns."""

    context: tuple[int, ...] = (512, 2048, 8192)
    new_tokens: int = 64
    rounds: int = 16
    caches: tuple[str, ...] = FAMILIES
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    bits: tuple[int, ...] = (2, 4)
    group_size: int = 32
    residual_length: int = 128
    compute: str = "auto"

    @property
    def burst(self) -> int:
        """Timed steps of one turn."""
        return math.ceil(self.new_tokens / self.rounds)

    @property
    def steps(self) -> int:
        """All steps after the prompt: checked, the harness's first, and one untimed a turn."""
        return CHECKED_STEPS + 1 + self.rounds * (self.burst + 1)

    @property
    def settings(self) -> list[Setting]:
        """Every cache in every dtype."""
        full = (DYNAMIC, EAGER)
        return [
            Setting(family, bits, dtype)
            for dtype in self.dtypes
            for family in self.caches
            for bits in ((None,) if family in full else self.bits)
        ]


class Text:
    """A model in the dtypes that were asked for, and tokens `[1, T]` to feed it.

    Parameters
    ----------
    folder : Path
        Of a local model.
    options : Options

    Raises
    ------
    UserError
        The model is not supported, or the longest prompt does not fit its context.
    """

    def __init__(self, folder: Path, options: Options) -> None:
        self.folder, self.options = folder, options
        self.config = models.read_config(folder)
        text = self.config.get_text_config(decoder=True)
        longest = max(options.context)
        context = getattr(text, "max_position_embeddings", None)
        if context is not None and longest > context:
            raise UserError(
                f"`--context` must be at most the model's context of {context} tokens, "
                f"got {longest}"
            )
        self.tokens = _tokens(models.load_tokenizer(folder), longest + options.steps)
        self._models: dict[tuple[str, str], Any] = {}

    def model(self, dtype: str, attention: str) -> Any:
        """The model; one copy of the weights for all kinds of attention."""
        kivi = (dtype, ATTENTION_NAME)
        if kivi not in self._models:
            self._models[kivi] = models.load_model(self.folder, self.config, dtype)
        if (dtype, attention) not in self._models:
            self._models[dtype, attention] = peer_caches.with_attention(
                self._models[kivi], attention
            )
        return self._models[dtype, attention]


def _tokens(tokenizer: Any, count: int) -> Tensor:
    """The bundled story as often as `count` tokens take."""
    tokens: Tensor = tokenizer(story(), return_tensors="pt").input_ids
    return tokens.repeat(1, math.ceil(count / tokens.shape[1]))[:, :count]


class Subject:
    """One cache with the model that fills it; every step feeds the text's next token.

    Parameters
    ----------
    text : Text
    setting : Setting
    context : int
        Tokens of the prompt.

    Raises
    ------
    ImportError, ValueError
        The cache's own, where packages or model do not fit.
    """

    def __init__(self, text: Text, setting: Setting, context: int) -> None:
        self.text, self.setting, self.context = text, setting, context
        ours = setting.family == KIVI
        self.model = text.model(setting.dtype, ATTENTION_NAME if ours else "sdpa")
        # Scores of a whole prompt would need memory in its length squared: eager only decodes.
        eager = setting.family == EAGER
        self.decoder = text.model(setting.dtype, "eager") if eager else self.model
        self.detail = self._detail()
        self.cache = self.new_cache()
        self.position = 0

    def _grouping(self) -> peer_caches.Grouping:
        options = self.text.options
        sizes = options.group_size, options.residual_length
        return peer_caches.grouping(self.setting.family, self.text.config, self.context, *sizes)

    def _detail(self) -> str:
        options = self.text.options
        if self.setting.bits is None:
            return "eager decode" if self.setting.family == EAGER else "sdpa"
        if self.setting.family == KIVI:
            return f"G={options.group_size}, R={options.residual_length}"
        return str(self._grouping())

    def new_cache(self) -> Any:
        """An empty cache."""
        options, setting = self.text.options, self.setting
        if setting.bits is None:
            return peer_caches.dynamic_cache(self.text.config)
        if setting.family != KIVI:
            return peer_caches.quantized_cache(
                setting.family, self.text.config, setting.bits, self._grouping()
            )
        return KiviCache(self.text.config, **kivi_options(options, setting.bits))

    def warm(self) -> None:
        """Compile and load what the first tokens need, so that it is not timed."""
        self._prefill(WARM_TOKENS)
        self.step()
        if isinstance(self.cache, KiviCache):
            self.cache.reset()
        else:
            self.cache = self.new_cache()
        self.position = 0

    def prefill(self) -> None:
        """Read the prompt."""
        self._prefill(self.context)

    def _prefill(self, count: int) -> None:
        with torch.no_grad():
            tokens = self.text.tokens[:, :count]
            self.model(tokens, past_key_values=self.cache, logits_to_keep=1)
        self.position = count

    def step(self) -> Tensor:
        """Read one more token; logits `[1, vocabulary]`."""
        token = self.text.tokens[:, self.position : self.position + 1]
        with torch.no_grad():
            logits: Tensor = self.decoder(token, past_key_values=self.cache).logits[0]
        self.position += 1
        return logits


def kivi_options(options: Options, bits: int) -> dict[str, Any]:
    """Arguments of `KiviCache`."""
    return {
        "key_bits": bits,
        "value_bits": bits,
        "group_size": options.group_size,
        "residual_length": options.residual_length,
        "compute": options.compute,
    }

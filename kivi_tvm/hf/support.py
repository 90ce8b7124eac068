"""What `KiviCache` does not do, in words: checks of the model, of its layers and of a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch
import transformers
from torch import Tensor

from kivi_tvm.config import WINDOWS, KiviConfig

F = TypeVar("F", bound=Callable[..., Any])

ATTENTION_NAME = "kivi_tvm"
MIN_TRANSFORMERS = (5, 17)
CROPS_NEGATIVE_ONLY = (5, 18)

# Arguments of an attention function that change its result and that kivi_tvm does not know.
CALL_RULES = {
    "softcap": "decode attention has no logit soft-capping",
    "s_aux": "decode attention has no sink logits",
    "sinks": "decode attention has no sink logits",
    "position_bias": "decode attention adds no bias to the scores",
    "indices": "decode attention reads every cached token",
    "block_indices": "decode attention reads every cached token",
}


def _version() -> tuple[int, int]:
    major, minor = transformers.__version__.split(".")[:2]
    return int(major), int(minor)


def require_transformers() -> None:
    """Refuse a transformers whose cache interface differs.

    Raises
    ------
    ImportError
        transformers is older than 5.17 (its `Cache.crop` and length methods differ).
    """
    if _version() < MIN_TRANSFORMERS:
        need = ".".join(map(str, MIN_TRANSFORMERS))
        raise ImportError(
            f"kivi_tvm.hf needs transformers>={need}, got {transformers.__version__}; "
            f"pip install 'transformers>={need}'"
        )


def outside_graph(function: F) -> F:
    """`function` as it is, also in a model under `torch.compile`: the graph breaks around it."""
    undisturbed: F = torch.compiler.disable(function)
    return undisturbed


def unsupported(call: str, purpose: str) -> NoReturn:
    """Raise for a method of `Cache` that a KIVI cache cannot do yet."""
    raise NotImplementedError(f"KiviCache does not support `{call}` ({purpose}) yet")


def check_options(
    options: dict[str, Any],
    window: str,
    max_tokens: int | None,
    rollback: int,
    sink_tokens: int,
) -> None:
    """Raise now for what no model could make valid; 256 is divisible by every group size."""
    KiviConfig(head_dim=256, num_heads=1, num_kv_heads=1, **options)
    if window not in WINDOWS:
        raise ValueError(f"`window` must be one of {list(WINDOWS)}, got {window!r}")
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise ValueError(f"`max_tokens` must be None or a positive int, got {max_tokens!r}")
    for name, value in (("rollback", rollback), ("sink_tokens", sink_tokens)):
        if type(value) is not int or value < 0:
            raise ValueError(f"`{name}` must be an int of at least 0, got {value!r}")


def check_config(config: Any) -> None:
    """Refuse a model whose attention the cache would get wrong, from its configuration.

    Raises
    ------
    ValueError
        The model is an encoder-decoder, uses latent attention (MLA) or shares keys and values
        among layers.
    """
    name = getattr(config, "model_type", type(config).__name__)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"`config` must be of a decoder-only model, got encoder-decoder {name!r}")
    text = config.get_text_config(decoder=True)
    if (rank := getattr(text, "kv_lora_rank", None)) is not None:
        raise ValueError(
            f"`config.kv_lora_rank` must be None, got {rank} ({name!r}): multi-head latent "
            "attention has keys and values of different sizes"
        )
    modes = getattr(text, "kv_sharing_modes", None) or []
    shared = getattr(text, "num_kv_shared_layers", None) or sum(m is not None for m in modes)
    if shared:
        raise ValueError(
            f"`config.num_kv_shared_layers` must be 0, got {shared} ({name!r}): layers that reuse "
            "another layer's keys and values are not supported"
        )


def check_states(key: Tensor, value: Tensor) -> None:
    """Refuse new keys and values that cannot be appended."""
    if key.shape != value.shape or key.ndim != 4:
        raise ValueError(
            "`key_states` and `value_states` must have one shape [B, H_kv, T, D], got "
            f"{list(key.shape)} and {list(value.shape)}"
        )
    if key.shape[2] < 1:
        raise ValueError(f"`key_states` must have at least one token, got {list(key.shape)}")


def check_room(stored: list[int], new: list[int], max_tokens: int | None) -> None:
    """Refuse a step that would make a row longer than `max_tokens`, before it rewinds rows."""
    longest = max(a + b for a, b in zip(stored, new, strict=True))
    if max_tokens is not None and longest > max_tokens:
        raise ValueError(f"`max_tokens` must be at least {longest}, got {max_tokens}")


def columns_to_remove(tokens_to_remove: int, columns: int) -> int:
    """How many of `columns` a `crop(tokens_to_remove)` of the installed transformers removes.

    Raises
    ------
    ValueError
        The number is positive and transformers is newer than 5.17.
    """
    if tokens_to_remove <= 0:
        return min(-tokens_to_remove, columns)
    if _version() >= CROPS_NEGATIVE_ONLY:
        raise ValueError(
            "`tokens_to_remove` must be minus the number of tokens to remove, got "
            f"{tokens_to_remove}"
        )
    return max(0, columns - tokens_to_remove)


def check_call(
    module: Any, query: Tensor, key: Tensor, dropout: float, kwargs: dict[str, Any]
) -> None:
    """Refuse an attention call whose result `decode` could not reproduce.

    Raises
    ------
    NotImplementedError
        An argument asks for something else than plain softmax attention, or gradients are on.
    ValueError
        `query` does not fit `key`.
    """
    for name, rule in CALL_RULES.items():
        if (value := kwargs.get(name)) is not None:
            got = f"a {list(value.shape)} tensor" if isinstance(value, Tensor) else value
            raise NotImplementedError(f"`{name}` must be None with KiviCache, got {got}: {rule}")
    config = getattr(module, "config", None)
    if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
        raise NotImplementedError(
            "`output_attentions` must be False with KiviCache, got True: "
            "attention weights are never written"
        )
    if dropout:
        raise NotImplementedError(
            f"`dropout` must be 0 with KiviCache, got {dropout}; call `model.eval()`"
        )
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
        raise NotImplementedError(
            "gradients must be off with KiviCache, got states that require grad: "
            "use `with torch.no_grad():` or `torch.inference_mode()`"
        )
    _check_query(query, key)


def _check_query(query: Tensor, key: Tensor) -> None:
    B, H_kv, T, D = key.shape
    H = query.shape[1] if query.ndim == 4 else 0
    if query.shape != (B, H, T, D) or H == 0 or H % H_kv:
        raise ValueError(
            f"`query` must be [{B}, H, {T}, {D}] with H a multiple of {H_kv} for a key of "
            f"{list(key.shape)}, got {list(query.shape)}"
        )

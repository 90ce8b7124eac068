"""The attention implementation "kivi_tvm"."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from kivi_tvm.hf.layer import layer_of
from kivi_tvm.hf.support import ATTENTION_NAME


def kivi_attention_forward(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over a KIVI cache where `key` came from one, else transformers' sdpa unchanged.

    Parameters
    ----------
    module : nn.Module
        The model's attention module.
    query : Tensor
        `[B, H, T, D]`.
    key, value : Tensor
        `[B, H_kv, T, D]`; from a `KiviCache` the new tokens only.
    attention_mask : Tensor or None
        What `sdpa_mask` makes: bool `[B, 1, T, columns]`.

    Returns
    -------
    out : Tensor
        `[B, T, H, D]`.
    weights : None
    """
    layer = layer_of(key)
    if layer is None:
        out: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0]
        return out, None
    return layer.attend(module, query, key, value, attention_mask, **kwargs), None


def register() -> None:
    """Make "kivi_tvm" a name that `model.set_attn_implementation` knows."""
    AttentionInterface.register(ATTENTION_NAME, kivi_attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)

"""Ways to keep the keys and values of a model, by name, and what each of them holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from kivi_tvm import layout
from kivi_tvm.hf.cache import KiviCache
from kivi_tvm.hf.models import modules
from kivi_tvm.hf.reference_cache import ReferenceKiviCache


@dataclass(frozen=True, slots=True)
class CacheSetting:
    """Bits of a cache, None for full precision, and along what keys are grouped."""

    label: str
    key_bits: int | None = None
    value_bits: int | None = None
    key_axis: str = "channel"

    @property
    def is_simulated(self) -> bool:
        """Whether plain torch stands in for kernels, which only know keys per channel."""
        return self.key_axis != "channel"


FULL = "full"
SETTINGS = {
    FULL: CacheSetting("full precision"),
    "kivi-2": CacheSetting("KIVI-2", 2, 2),
    "kivi-4": CacheSetting("KIVI-4", 4, 4),
    "kivi-8": CacheSetting("KIVI-8", 8, 8),
    "k4v2": CacheSetting("K4V2", 4, 2),
    "k2v4": CacheSetting("K2V4", 2, 4),
    "token-2": CacheSetting("2-bit per token", 2, 2, "token"),
    "token-4": CacheSetting("4-bit per token", 4, 4, "token"),
}
DEFAULT_SETTINGS = (FULL, "kivi-2", "kivi-4", "k4v2", "token-2")


def new_cache(setting: CacheSetting, config: Any, **options: Any) -> Any:
    """An empty cache of one setting for a model's `config`; `options` as in `KiviCache`."""
    if setting.key_bits is None:
        return DynamicCache(config=config)
    options |= {"key_bits": setting.key_bits, "value_bits": setting.value_bits}
    if setting.is_simulated:
        axis = setting.key_axis
        return ReferenceKiviCache(config, key_axis=axis, accumulate=torch.float32, **options)
    return KiviCache(config, **options)


def bytes_per_token(cache: Any) -> float:
    """Bytes that one more token costs a used cache of one row, once it has left the window.

    Layers of full attention only: others do not grow. Full precision is measured; for codes,
    scales and zeros it is the memory layout's share of a page, whatever the keys' axis.
    """
    if isinstance(cache, KiviCache):
        return sum(
            n * _page_bytes(module.cfg) / float(module.cfg.P) for module, n in modules(cache)
        )
    growing = [layer for layer in cache.layers if type(layer) is DynamicLayer]
    shares = [_tensor_bytes(layer) / int(layer.get_seq_length()) for layer in growing]
    return float(sum(shares))


def held_bytes(cache: Any) -> int | None:
    """All bytes of keys and values that a used cache holds now; None where it simulates."""
    if isinstance(cache, ReferenceKiviCache):
        return None
    packed = cache.nbytes["total"] if isinstance(cache, KiviCache) else 0
    return int(packed + sum(_tensor_bytes(layer) for layer in cache.layers))


def _page_bytes(cfg: Any) -> int:
    return sum(buffer.nbytes for buffer in layout.page_buffers(cfg, 1).values())


def _tensor_bytes(layer: Any) -> int:
    """Bytes of one of transformers' own layers; a KIVI layer has no such tensors."""
    tensors = (getattr(layer, name, None) for name in ("keys", "values"))
    return sum(x.nbytes for x in tensors if isinstance(x, Tensor))

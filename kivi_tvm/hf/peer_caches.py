"""transformers' own caches, to measure beside KIVI's: made, counted, and why one is missing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import DynamicCache, QuantizedCache
from transformers.utils import is_hqq_available
from transformers.utils.import_utils import is_optimum_quanto_available

from kivi_tvm.hf.cache import KiviCache
from kivi_tvm.hf.settings import held_bytes

# What makes each backend's groups most like KIVI's: keys along tokens, values along channels.
KIVI_AXES = {"quanto": (-1, 0), "hqq": (0, 1)}
# The backend's defaults. Any number of tokens fits them: groups run along channels.
DEFAULT_AXES = {"quanto": (0, 0), "hqq": (0, 0)}
DISTRIBUTIONS = {"quanto": "optimum-quanto", "hqq": "hqq"}


@dataclass(frozen=True, slots=True)
class Grouping:
    """How a `QuantizedCache` groups keys and values: its own options of these names."""

    axis_key: int
    axis_value: int
    q_group_size: int
    residual_length: int

    def __str__(self) -> str:
        axes = f"axes {self.axis_key}, {self.axis_value}"
        return f"{axes}, G={self.q_group_size}, R={self.residual_length}"


def missing(backend: str) -> str | None:
    """Why transformers cannot use a backend of `QuantizedCache` here, or None."""
    found = {"quanto": is_optimum_quanto_available, "hqq": is_hqq_available}[backend]()
    if found:
        return None
    needed = {"quanto": "optimum and optimum-quanto", "hqq": "hqq"}[backend]
    return f"transformers does not find {needed}"


def grouping(
    backend: str, config: Any, tokens: int, group_size: int, residual_length: int
) -> Grouping:
    """KIVI's axes where the backend takes them for a prompt of `tokens`, else its defaults."""
    text = config.get_text_config(decoder=True)
    columns = (getattr(text, "num_key_value_heads", None) or text.num_attention_heads) * tokens
    # quanto's keys: a channel's values over all heads and tokens, cut into groups.
    fits = backend != "quanto" or columns % group_size == 0
    axes = (KIVI_AXES if fits else DEFAULT_AXES)[backend]
    return Grouping(*axes, q_group_size=group_size, residual_length=residual_length)


def quantized_cache(backend: str, config: Any, bits: int, how: Grouping) -> Any:
    """An empty `QuantizedCache`.

    Raises
    ------
    ImportError, ValueError
        Its own, where the packages, the bits or the model's layers do not fit.
    """
    return QuantizedCache(
        backend,
        config,
        nbits=bits,
        axis_key=how.axis_key,
        axis_value=how.axis_value,
        q_group_size=how.q_group_size,
        residual_length=how.residual_length,
    )


def dynamic_cache(config: Any) -> Any:
    """The default cache of transformers, in the dtype of the model."""
    return DynamicCache(config=config)


def with_attention(model: Any, name: str) -> Any:
    """A model that shares all weights with `model` and has the attention `name`.

    A switch between steps would be timed with them.
    """
    shared = {id(x): x for x in (*model.parameters(), *model.buffers())}
    twin = copy.deepcopy(model, memo=shared)
    twin.set_attn_implementation(name)
    return twin


def storage_bytes(cache: Any) -> int:
    """Bytes that a used cache really holds: of KIVI's by its account, else of tensors' storages.

    Codes of `QuantizedCache` count packed, as stored, with scales, zeros and the residual.
    """
    if isinstance(cache, KiviCache):
        return held_bytes(cache) or 0
    storages = {}
    for layer in cache.layers:
        for tensor in _tensors(vars(layer)):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(value: Any) -> Iterator[Tensor]:
    """The plain tensors in containers, and in the wrappers that quanto puts around them."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
    elif isinstance(value, Tensor):
        if hasattr(value, "__tensor_flatten__"):
            names, _ = value.__tensor_flatten__()
            yield from _tensors([getattr(value, name) for name in names])
        else:
            yield value

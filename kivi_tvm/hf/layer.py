"""One full-attention layer of a `KiviCache`.

transformers gives the cache no attention arguments and the attention function no cache. So
`update` stores nothing: it hands the new keys and values on as fresh views, notes itself on the
key and stays pending until the attention function finds that note and attends.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kivi_tvm.hf.support import check_call, check_states, outside_graph, unsupported

if TYPE_CHECKING:
    from kivi_tvm.hf.cache import KiviCache
    from kivi_tvm.hf.store import LayerStore, Step

_NOTE = "_kivi_layer"


def _sdpa(*args: Any, **kwargs: Any) -> Tensor:
    out: Tensor = sdpa_attention_forward(*args, **kwargs)[0]
    return out


def _append(
    store: LayerStore, step: Step, query: Tensor, key: Tensor, value: Tensor, scale: float | None
) -> Tensor:
    """Attention `[B, T, H, D]` of new tokens on top of stored ones, which are then stored too."""
    if step.tokens == 1 and step.padding is None:
        out = store.decode(query[:, :, 0], key[:, :, 0], value[:, :, 0], scale=scale)
        return out.unsqueeze(1)
    q, k, v = map(step.compact, (query, key, value))
    out = store.extend(q, k, v, lengths=step.lengths, scale=scale)
    if step.padding is not None:
        return step.padding.scatter(out)
    return out.transpose(1, 2).contiguous()


def layer_of(key: Tensor) -> KiviLayer | None:
    """The layer whose `update` returned `key`, if any."""
    layer: KiviLayer | None = getattr(key, _NOTE, None)
    return layer


class KiviLayer(CacheLayerMixin):
    """The part of a `KiviCache` that serves the model's layer `index`."""

    is_compileable = False  # transformers would expect masks of a static size
    is_croppable = True  # exactly, once `activate_past_recording` was called
    is_sliding = False

    def __init__(self, cache: KiviCache, index: int) -> None:
        super().__init__()
        # A strong reference would be a cycle that keeps a dropped cache's memory until a gc run.
        self._cache = cast("KiviCache", weakref.proxy(cache))
        self.index = index
        self.columns = 0
        self._pending: tuple[Tensor, Tensor] | None = None

    def copied(self, cache: KiviCache) -> KiviLayer:
        """The same layer of another cache."""
        new = type(self)(cache, self.index)
        new.columns = self.columns
        if self.is_initialized:
            new.dtype, new.device, new.batch_size = self.dtype, self.device, self.batch_size
            new.is_initialized = True
        return new

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Note what the tensors tell; memory is taken at the first attention."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size = key_states.shape[0]
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand `key_states, value_states [B, H_kv, T, D]` on to the attention function.

        Raises
        ------
        RuntimeError
            The previous step did not go through the attention implementation "kivi_tvm", or was
            refused by a KIVI layer after linear layers had its tokens.
        ValueError
            The new tokens cannot be appended.
        """
        try:
            self._cache.check_sound()
            check_states(key_states, value_states)
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
            if key_states.shape[0] != self.batch_size:
                raise ValueError(
                    f"`key_states` must have the cache's batch size {self.batch_size}, got "
                    f"{key_states.shape[0]}; use a new KiviCache or `reset()`"
                )
            key, value = key_states.view_as(key_states), value_states.view_as(value_states)
            setattr(key, _NOTE, self)
            self._pending = key, value
            self._cache.pending = self.index
            return key, value
        except BaseException:
            self._cache.note_refusal(self.index)
            raise

    @outside_graph
    def attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **kwargs: Any,
    ) -> Tensor:
        """Attend over the stored tokens and the new ones, and store those: `[B, T, H, D]`.

        A prompt's attention is exact, by transformers' sdpa; its keys and values are then
        stored without padding. A single token on top goes through `decode`; several, or one
        that is padding in some rows, go through `extend`, and padding's outputs are zeros.
        """
        try:
            self._take_pending(key, value)
            check_call(module, query, key, dropout, kwargs)
            step = self._cache.enter_step(self.index, self.columns, key, attention_mask)
            if not self.columns:
                out = _sdpa(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
                store = self._cache.begin_step(step, self.index, query, key)
                store.prefill(step.compact(key), step.compact(value), lengths=step.lengths)
            else:
                store = self._cache.begin_step(step, self.index, query, key)
                out = _append(store, step, query, key, value, scaling)
            self.columns += step.tokens
            self._cache.end_layer(step, self.index)
            return out
        except BaseException:
            self._cache.note_refusal(self.index)
            raise

    def _take_pending(self, key: Tensor, value: Tensor) -> None:
        pending, self._pending = self._pending, None
        if self._cache.pending == self.index:
            self._cache.pending = None
        if pending is None or pending[0] is not key or pending[1] is not value:
            raise RuntimeError(
                f"layer {self.index} must attend once to the keys and values that its `update` "
                "returned, got others; this model may not be supported"
            )

    def get_seq_length(self) -> int:
        """Columns seen, padding included: what `generate` slices `input_ids` by."""
        return self.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns and offset of the mask of the next `query_length` tokens."""
        return self.columns + query_length, 0

    def get_max_length(self) -> int:
        """The `max_tokens` given to the cache, or -1."""
        limit: int | None = self._cache.max_tokens
        return -1 if limit is None else limit

    def reset(self) -> None:
        """Forget every token."""
        self.columns, self._pending = 0, None
        if self.is_initialized:
            del self.batch_size
            self.is_initialized = False

    def offload(self) -> None:
        """Not supported: packed pages stay on their device."""
        unsupported("offload", "offloaded caches")

    def prefetch(self) -> None:
        """Not supported: packed pages stay on their device."""
        unsupported("prefetch", "offloaded caches")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Not supported: rows are those of all layers, see `KiviCache.reorder_cache`."""
        unsupported("reorder_cache", "of one layer")

"""The layers of a model: those that KIVI serves, and transformers' own beside them."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
)

# Layers of a hybrid model that transformers' own cache layer serves. Anything that is neither
# here nor exactly a `DynamicLayer` (full attention) is refused: it may hold full attention inside.
HF_LAYER_TYPES = (
    "DynamicSlidingWindowLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "DummyLayer",
)


def is_full_attention(layer: object) -> bool:
    """Whether `layer` of a `DynamicCache` is one that KIVI replaces.

    Raises
    ------
    ValueError
        It is neither plain full attention nor in `HF_LAYER_TYPES`.
    """
    if type(layer) is DynamicLayer:
        return True
    if type(layer).__name__ not in HF_LAYER_TYPES:
        raise ValueError(
            "`config` must have layers of full attention or of one of "
            f"{list(HF_LAYER_TYPES)}, got {type(layer).__name__}"
        )
    return False


def layers_alike(config: Any, layers: list[int], index: int) -> list[int]:
    """Those of `layers` that, by the configuration, have the key shape of layer `index`."""
    configs = config.get_text_config(decoder=True).per_layer_config

    def shape(i: int) -> tuple[Any, ...]:
        return tuple(getattr(configs[i], n, None) for n in ("num_key_value_heads", "head_dim"))

    return [i for i in layers if shape(i) == shape(index)]


def check_in_step(layers: dict[int, Any], index: int, start: int, tokens: int) -> None:
    """Refuse to go on if a sliding layer is ahead or behind: an earlier forward stopped half-way.

    Raises
    ------
    RuntimeError
        One of `layers` has seen other than `start` columns, and `tokens` more before layer `index`.
    """
    for i, layer in layers.items():
        columns = start + tokens * (i < index)
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.get_seq_length() != columns:
            raise RuntimeError(
                f"layer {i} has seen {layer.get_seq_length()} columns instead of {columns}: an "
                "earlier forward stopped half-way; `reset()` the cache and pass the whole prompt"
            )


def linear_layers(layers: dict[int, Any]) -> list[int]:
    """Those of `layers` with a state that has every token, and cannot tell how many those are."""
    return [i for i, x in layers.items() if isinstance(x, LinearAttentionCacheLayerMixin)]


def check_croppable(layers: dict[int, Any], count: int) -> None:
    """Refuse to remove `count` columns before anything changed, if one of `layers` would.

    Raises
    ------
    RuntimeError
        A sliding-window or linear layer no longer has the state of `count` columns ago.
    """
    for i, layer in layers.items() if count else ():
        lost = False
        if isinstance(layer, LinearAttentionCacheLayerMixin):
            lost = not layer.record_past or any(layer.is_recurrent_states_initialized.values())
        if isinstance(layer, DynamicSlidingWindowLayer) and layer.keys is not None:
            need = min(layer.get_seq_length() - count, layer.sliding_window - 1)
            lost |= layer.keys.shape[-2] - count < need
        if lost:
            raise RuntimeError(
                f"layer {i} ({type(layer).__name__}) cannot take back {count} tokens: call "
                "`activate_past_recording()` before the forward; recurrent states never can"
            )


def check_rearrangeable(layers: dict[int, Any], name: str) -> None:
    """Refuse to rearrange rows before anything changed, if one of `layers` has no such method."""
    for i, layer in layers.items():
        if not hasattr(layer, name):
            raise NotImplementedError(
                f"`{name}` is not supported by layer {i} ({type(layer).__name__}) of transformers"
            )

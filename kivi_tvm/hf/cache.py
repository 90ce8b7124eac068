"""`KiviCache`: transformers' cache interface over kivi-tvm's runtime caches."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache

from kivi_tvm.hf.hybrid import is_full_attention
from kivi_tvm.hf.layer import KiviLayer
from kivi_tvm.hf.steps import Steps
from kivi_tvm.hf.store import Step, Store
from kivi_tvm.hf.support import (
    check_config,
    check_options,
    outside_graph,
)


class KiviCache(Steps):
    """A KIVI cache for `model.generate(..., past_key_values=KiviCache(model.config))`.

    Full-attention layers are held in 2-, 4- or 8-bit pages; sliding-window and linear layers of
    hybrid models stay in transformers' own cache layers. The model must use the attention
    implementation "kivi_tvm" (`model.set_attn_implementation("kivi_tvm")`).

    Several tokens may come on top of stored ones: chunked prefill (`prefill_chunk_size`) and
    continued chats (another `generate` with the same cache), with padding anywhere in the new
    columns. They see the history as it was before the step and each other exactly, so results
    depend on the chunks. A later mask may hide the last tokens of a row (the pads that `generate`
    stores for a row that ended before the others): they are taken back as by `crop`.

    Parameters
    ----------
    config : PreTrainedConfig
        The model's configuration: only its layer types are used. Heads, head dim, dtype and
        device come from the tensors of the first forward.
    key_bits, value_bits, group_size, residual_length, compute
        As in `KiviConfig`.
    key_group_size, value_group_size, page_size
        As in `KiviConfig`, where None stands for the default.
    window : str
        "kivi" (Algorithm 1) or "exact" (keys of the window stay exact after a flush).
    max_tokens : int or None
        Tokens per row, padding not counted, beyond which a step raises; None: no limit.
    rollback : int
        Tokens that `crop` takes back exactly; 0 becomes 32 in assisted generation.
    sink_tokens : int
        First tokens of each row that stay in full precision.
    target : str, dict or None
        What to compile for; by default "native" on CPU and "cuda" on a GPU.

    Raises
    ------
    ValueError
        An option breaks a rule, the model is not supported, or no layer of it has full attention.
    """

    def __init__(
        self,
        config: Any,
        *,
        key_bits: int = 2,
        value_bits: int = 2,
        group_size: int = 32,
        residual_length: int = 128,
        window: str = "kivi",
        max_tokens: int | None = None,
        rollback: int = 0,
        sink_tokens: int = 0,
        key_group_size: int | None = None,
        value_group_size: int | None = None,
        page_size: int | None = None,
        compute: str = "auto",
        target: str | dict[str, Any] | None = None,
    ) -> None:
        self._options: dict[str, Any] = {
            "key_bits": key_bits,
            "value_bits": value_bits,
            "group_size": group_size,
            "residual_length": residual_length,
            "key_group_size": key_group_size,
            "value_group_size": value_group_size,
            "page_size": page_size,
            "compute": compute,
        }
        check_options(self._options, window, max_tokens, rollback, sink_tokens)
        check_config(config)
        self.config, self.window, self.max_tokens, self.target = config, window, max_tokens, target
        self.rollback, self.sink_tokens = rollback, sink_tokens
        self._rollback_is_ours = not rollback
        super().__init__(layers=self._new_layers())
        self._kivi = [i for i, layer in enumerate(self.layers) if isinstance(layer, KiviLayer)]
        if not self._kivi:
            kinds = sorted({type(layer).__name__ for layer in self.layers})
            raise ValueError(f"`config` must have a full-attention layer, got only {kinds}")
        self._beside = [i for i in range(len(self.layers)) if i not in self._kivi]
        self.pending: int | None = None
        self._step: Step | None = None
        self._ahead: list[int] = []  # layers that kept the tokens of a forward which was refused
        self._history: Tensor | None = None  # which stored columns are padding
        self._stores: list[Store] = []

    def _new_layers(self) -> list[Any]:
        layers = DynamicCache(config=self.config).layers
        return [KiviLayer(self, i) if is_full_attention(x) else x for i, x in enumerate(layers)]

    # What users read.

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes held by KIVI layers, by part; "total" is their sum."""
        parts: dict[str, int] = {"total": 0}
        for store in self._stores:
            for name, count in store.cache.nbytes.items():
                parts[name] = parts.get(name, 0) + count
        return parts

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, padding not counted; empty before the first forward."""
        return list(self._stores[0].cache.lengths) if self._stores else []

    def report(self) -> dict[str, Any]:
        """What was applied: options, layers by kind, tokens, bytes, and where kernels came from."""
        others = [type(x).__name__ for x in self._others.values()]
        return {
            **self._options,
            "window": self.window,
            "rollback": self.rollback,
            "sink_tokens": self.sink_tokens,
            "max_tokens": self.max_tokens,
            "layers": {"kivi": len(self._kivi), **Counter(others)},
            "columns": self.layers[self._kivi[0]].columns,
            "lengths": self.lengths,
            "refilled": list(self._stores[0].cache.report()["refilled"]) if self._stores else [],
            "bytes": self.nbytes,
            "kernels": [store.describe() for store in self._stores],
        }

    # transformers' cache interface.

    @outside_graph
    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Hand new keys and values on to the attention function, see `KiviLayer.update`."""
        keys: Tensor
        keys, values = self.layers[layer_idx].update(key_states, value_states, *args, **kwargs)
        return keys, values

    def reset(self) -> None:
        """Forget every token and keep the memory; also ends a forward that failed half-way."""
        fresh = self._new_layers()
        for i, layer in enumerate(self.layers):
            if isinstance(layer, KiviLayer):
                layer.reset()
            else:
                # Not its own reset: transformers 5.17 leaves zeros that would be attended to.
                self.layers[i] = fresh[i]
                if getattr(layer, "record_past", False):
                    fresh[i].activate_past_recording()
        for store in self._stores:
            store.cache.reset()
            store.step = None
        self.pending = self._step = self._history = None
        self._ahead = []
        self._in_rounds, self._round_tokens = False, 0

"""The forwards of a model over a `KiviCache`, and the runtime caches that they fill."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kivi_tvm.config import KiviConfig
from kivi_tvm.hf.hybrid import check_in_step, layers_alike, linear_layers
from kivi_tvm.hf.padding import Padding, Rewind, extend_history, same_padding, step_padding
from kivi_tvm.hf.rows import RowOperations
from kivi_tvm.hf.store import Geometry, LayerStore, Step, Store


class Steps(RowOperations):
    """What one forward does, called by the layers."""

    config: Any
    window: str
    sink_tokens: int
    target: str | dict[str, Any] | None
    _options: dict[str, Any]

    def note_refusal(self, index: int) -> None:
        """Layer `index` raised: linear layers before it may be ahead of all KIVI layers.

        After a KIVI layer has attended, the step that is not over says that one stopped half-way.
        """
        if self._none_attended:
            self._ahead = [i for i in linear_layers(self._others) if i < index]

    @property
    def _none_attended(self) -> bool:
        """Whether no KIVI layer has the tokens of a forward that is not over."""
        return self._step is None or len(self._step.waiting) == len(self._kivi)

    def enter_step(self, index: int, start: int, key: Tensor, mask: Tensor | None) -> Step:
        """The forward that layer `index` is in, checked; nothing is changed."""
        step, tokens = self._step, key.shape[2]
        if self._none_attended:
            check_in_step(self._others, index, start, tokens)
        if step is None:
            padding, rewind = self._check_mask(mask, key.shape[0], start, tokens)
            return Step(start, tokens, padding, mask, set(self._kivi), rewind)
        if index not in step.waiting or (start, tokens) != (step.start, step.tokens):
            raise RuntimeError(
                f"a forward stopped before layers {sorted(step.waiting)} had attended, so layer "
                f"{index} cannot go on; `reset()` the cache and pass the whole prompt"
            )
        if mask is not step.mask:
            padding, rewind = self._check_mask(mask, key.shape[0], start, tokens)
            if rewind is not None or not same_padding(padding, step.padding):
                raise NotImplementedError(
                    f"`attention_mask` must hide the same columns in all layers, got another "
                    f"padding in layer {index}"
                )
        return step

    def begin_step(self, step: Step, index: int, query: Tensor, key: Tensor) -> LayerStore:
        """Make room for `step` and give layer `index`'s part of the runtime cache."""
        store = self._store(index, Geometry.of(query, key))
        if self._step is not step:
            self._before_step(step)
        store.begin(step)
        if self._step is not step:
            self._history = extend_history(self._history, step.start, step.padding)
            self._step = step
        return store.layer(index)

    def end_layer(self, step: Step, index: int) -> None:
        """Note that layer `index` has attended; the last one ends the step."""
        step.waiting.discard(index)
        if not step.waiting:
            self._step = None

    def _check_mask(
        self, mask: Tensor | None, B: int, start: int, tokens: int
    ) -> tuple[Padding | None, Rewind | None]:
        history = None if self._history is None else self._history[:, :start]
        return step_padding(mask, history, B, start, tokens)

    # The runtime caches.

    def _store(self, index: int, geometry: Geometry) -> Store:
        store = next((s for s in self._stores if index in s.members), None)
        if store is not None and store.geometry == geometry:
            return store
        if store is not None and self._step is None and not self.layers[index].columns:
            self._stores.clear()  # another batch after `reset`
        elif store is not None:
            raise NotImplementedError(
                f"query and key of layers {store.members} must be alike, got {geometry} in layer "
                f"{index} after {store.geometry}"
            )
        return self._new_store(index, geometry)

    def _new_store(self, index: int, geometry: Geometry) -> Store:
        """A runtime cache for layer `index` and those like it that have none yet."""
        taken = {i for store in self._stores for i in store.members}
        alike = layers_alike(self.config, self._kivi, index)
        members = [i for i in alike if i >= index and i not in taken]
        cfg = KiviConfig(
            head_dim=geometry.head_dim,
            num_heads=geometry.num_heads,
            num_kv_heads=geometry.num_kv_heads,
            dtype=geometry.dtype_name,
            **self._options,
        )
        module = self._build(cfg, geometry.device)
        cache = module.new_cache(
            num_layers=len(members),
            batch_size=geometry.batch_size,
            max_tokens=self.max_tokens,
            device=geometry.device,
            rollback=self.rollback,
            window=self.window,
            sink_tokens=self.sink_tokens,
        )
        self._stores.append(Store(geometry, module, cache, members))
        return self._stores[-1]

    def _build(self, cfg: KiviConfig, device: torch.device) -> Any:
        """The module that makes a runtime cache of `cfg`; tests put their own here."""
        from kivi_tvm import build  # here, because importing TVM takes seconds

        target = self.target
        if target is None:
            target = "native" if device.type == "cpu" else device.type
        return build(cfg, target=target)

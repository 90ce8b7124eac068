"""What a `KiviCache` does to stored rows: shorten, permute, repeat, select and copy them."""

from __future__ import annotations

import copy
import warnings
from operator import index
from typing import Any, NoReturn, Self

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from kivi_tvm.hf.hybrid import check_croppable, check_in_step, check_rearrangeable
from kivi_tvm.hf.layer import KiviLayer
from kivi_tvm.hf.padding import tokens_of_last
from kivi_tvm.hf.store import Step, Store
from kivi_tvm.hf.support import ATTENTION_NAME, check_room, columns_to_remove, unsupported

# Rollback where `activate_past_recording` asks for one and the user gave none. A round of assisted
# generation takes back at most its candidates: 20 of a draft model (transformers' default
# `num_assistant_tokens`), 10 of prompt lookup in its documentation.
CANDIDATES = 32
# The "heuristic" schedule adds 2 candidates after each round that accepted all, without a bound.
CANDIDATE_STEP = 2
MOST_CANDIDATES = 256


class RowOperations(Cache):
    """The methods of `Cache` that change what is stored; none of them may come amid a forward."""

    layers: list[Any]
    pending: int | None
    rollback: int
    max_tokens: int | None
    _kivi: list[int]
    _beside: list[int]
    _stores: list[Store]
    _step: Step | None
    _ahead: list[int]
    _history: Tensor | None
    _rollback_is_ours: bool
    _in_rounds = False
    _round_tokens = 0
    _has_warned = False

    def check_sound(self) -> None:
        """Raise if a layer's `update` was not followed by its attention, or a forward was refused.

        A refusal matters if linear layers had the tokens of that forward already.
        """
        if self.pending is not None:
            raise RuntimeError(
                f"the previous step of layer {self.pending} did not go through {ATTENTION_NAME} "
                f"attention: call `model.set_attn_implementation({ATTENTION_NAME!r})` and "
                "`reset()` the cache; this model may not support it"
            )
        if self._ahead:
            raise RuntimeError(
                f"linear layers {self._ahead} have the tokens of a forward that was refused "
                "thereafter: `reset()` the cache and pass the whole prompt"
            )

    # Rolling back.

    def activate_past_recording(self) -> None:
        """Prepare for `crop`: called by transformers at the start of assisted generation.

        Unless `rollback` was given, it becomes 32 tokens; a round of more candidates than that
        raises it further for the next ones, up to 256.
        """
        self._check_between_forwards("activate_past_recording")
        self._in_rounds, self._round_tokens = False, 0
        if self._rollback_is_ours:
            self._raise_rollback(CANDIDATES)
        for layer in self.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last columns; each row loses those of its own tokens that are among them.

        Exact for up to `rollback` tokens. Beyond, tokens of the window get stand-ins, their
        dequantized values: the first time a `RuntimeWarning` says so, `report()` counts them.

        Parameters
        ----------
        tokens_to_remove : int
            Minus the number of columns. As in the transformers installed, a positive number is
            the columns to keep (5.17) or refused.

        Raises
        ------
        RuntimeError
            A forward stopped half-way, or a sliding-window or linear layer of a hybrid model
            cannot be taken back.
        ValueError
            `tokens_to_remove` is positive and transformers is newer than 5.17.
        """
        self._check_between_forwards("crop")
        columns = self._columns
        count = columns_to_remove(index(tokens_to_remove), columns)
        check_croppable(self._others, count)
        if not columns:
            return
        self._after_round()
        if count:
            self._crop_rows(tokens_of_last(self._history, self._rows, columns, count))
            if self._history is not None:
                self._history = self._history[:, : columns - count]
            for i in self._kivi:
                self.layers[i].columns -= count
        for layer in self._others.values():
            if count or getattr(layer, "record_past", False):
                layer.crop(-count)

    def _crop_rows(self, lengths: list[int]) -> None:
        refilled = [max(store.cache.crop(lengths).refilled) for store in self._stores]
        if max(refilled) and not self._has_warned:
            self._has_warned = True
            # Not transformers' logger: its verbosity would hide that results have changed.
            warnings.warn(
                f"KiviCache took back {max(lengths)} tokens of a row, more than rollback="
                f"{self.rollback} holds in full precision: {max(refilled)} tokens of its window "
                f"are dequantized ones now; pass `rollback={max(lengths)}` to KiviCache to keep "
                "this exact, and see `report()['refilled']`",
                RuntimeWarning,
                stacklevel=3,
            )

    def _after_round(self) -> None:
        """Make rounds as large as the last one, and what comes next, possible to take back."""
        candidates = self._round_tokens - 1 + CANDIDATE_STEP
        if self._rollback_is_ours and self.rollback < candidates <= MOST_CANDIDATES:
            self._raise_rollback(-(-candidates // CANDIDATES) * CANDIDATES)
        self._in_rounds, self._round_tokens = True, 0

    def _raise_rollback(self, tokens: int) -> None:
        self.rollback = max(self.rollback, tokens)
        for store in self._stores:
            if store.cache.rollback < self.rollback:
                store.cache.enable_rollback(self.rollback)

    def _before_step(self, step: Step) -> None:
        """Note whether `step` is a round of candidates, and forget what its mask newly hides."""
        # Only a step between two crops was a round: a chat's next turn is followed by none.
        self._round_tokens = step.tokens if self._in_rounds else 0
        self._in_rounds = False
        if step.rewind is not None:
            stored = self._stores[0].cache.lengths
            kept = [a - b for a, b in zip(stored, step.rewind.lengths, strict=True)]
            check_room(kept, step.lengths or [step.width] * len(kept), self.max_tokens)
            self._crop_rows(step.rewind.lengths)
            self._history, step.rewind = step.rewind.history, None

    # Rearranging.

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row `i` becomes a copy of old row `beam_idx[i]`: beam search."""
        beam_idx = torch.as_tensor(beam_idx)
        self._rearrange("reorder_cache", beam_idx, beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, one after another."""
        rows = torch.arange(self._rows).repeat_interleave(repeats)
        self._rearrange("batch_repeat_interleave", repeats, rows)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Row `i` becomes old row `indices[i]`; a bool mask keeps the rows where it is True."""
        indices = torch.as_tensor(indices)
        rows = torch.arange(self._rows, device=indices.device)[indices]
        self._rearrange("batch_select_indices", indices, rows)

    def _rearrange(self, name: str, argument: Any, chosen: Tensor) -> None:
        """Rows `chosen` for KIVI layers, and `name(argument)` for the others."""
        self._check_between_forwards(name)
        check_rearrangeable(self._others, name)
        if not self._columns:
            return
        rows: list[int] = chosen.tolist()
        for store in self._stores:
            store.select(rows)
        for i in self._kivi:
            self.layers[i].batch_size = len(rows)
        if self._history is not None:
            self._history = self._history[chosen.to(self._history.device)]
        for layer in self._others.values():
            getattr(layer, name)(argument)

    # Copying.

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """An independent cache with the same contents: a prompt's cache for each continuation."""
        self._check_between_forwards("copy.deepcopy")
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        new.__dict__.update(self.__dict__)
        new.layers = [
            x.copied(new) if isinstance(x, KiviLayer) else copy.deepcopy(x, memo)
            for x in self.layers
        ]
        new._stores = [store.copy() for store in self._stores]
        return new

    def __reduce__(self) -> NoReturn:
        unsupported("pickle", "saving a cache")

    @property
    def _columns(self) -> int:
        columns: int = self.layers[self._kivi[0]].columns
        return columns

    @property
    def _rows(self) -> int:
        return self._stores[0].geometry.batch_size if self._stores else 0

    @property
    def _others(self) -> dict[int, Any]:
        """Layers of transformers' own; most models have none, and so nothing to look through."""
        return {i: self.layers[i] for i in self._beside}

    def _check_between_forwards(self, call: str) -> None:
        self.check_sound()
        check_in_step(self._others, 0, self._columns, 0)
        if self._step is not None:
            raise RuntimeError(
                f"`{call}` must come between forwards, but one stopped before layers "
                f"{sorted(self._step.waiting)} had attended; `reset()` the cache and pass the "
                "whole prompt"
            )

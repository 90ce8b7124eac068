"""Steps: one forward of the model over the layers of a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import tvm_ffi
from torch import Tensor

from kivi_tvm import layout
from kivi_tvm.runtime.checks import check_count, check_lengths
from kivi_tvm.runtime.library import configure_threads
from kivi_tvm.runtime.pages import Ownership
from kivi_tvm.runtime.pool import CachePool
from kivi_tvm.runtime.rows import NO_SLOT, Row
from kivi_tvm.runtime.workspace import Workspace


@dataclass(slots=True)
class Step:
    """A forward under way: the tokens it adds to each row, and the layers still to come.

    Parameters
    ----------
    lengths : list of int
        New tokens of each row.
    added, slots : object
        As kernels take them, int32 `[B]`: new body tokens of each row, and the slots of the rows
        that have any.
    todo : set of int
        Layers that were not called yet.
    before : (list of Row, Ownership) or None
        What `abandon` goes back to; None for a step that only made every active row one longer.
    to_sinks : list of int
        New tokens of each row that become sinks; empty if none do.
    flushed : list of int
        Slots in whose rings this step writes keys back.
    overrun : list of int
        Slots whose rings have too few spare places for this step's tokens.
    default : int
        New tokens of every active row if no lengths were given, else -1.
    """

    lengths: list[int]
    added: Any
    slots: Any
    todo: set[int]
    before: tuple[list[Row], Ownership] | None = None
    to_sinks: list[int] = field(default_factory=list)
    flushed: list[int] = field(default_factory=list)
    overrun: list[int] = field(default_factory=list)
    default: int = 1
    history_is_set: bool = False


class SteppedCache(CachePool):
    """A cache that goes from forward to forward: each is begun once and meets every layer once."""

    @property
    def step(self) -> Step:
        """The open step."""
        if self._step is None:
            raise RuntimeError("no step is open")
        return self._step

    def begin(self, n: int, lengths: Sequence[int] | Tensor | None = None) -> None:
        """Begin a step of `n` tokens per row: reserve memory and advance every length.

        Parameters
        ----------
        n : int
            Tokens of this step's tensors: `T` of a prefill, 1 of a decode.
        lengths : sequence of int or Tensor, optional
            Tokens of each row of a ragged prefill or extend, at most `n`; default `n` for active
            rows (for all if none is active) and 0 for the others.

        Raises
        ------
        RuntimeError
            The previous step is not finished: some layers were not called.
        ValueError
            A length is out of range or `max_tokens` would be exceeded; nothing has changed.
        """
        if (
            self._quiet_steps
            and type(n) is int
            and n == 1
            and lengths is None
            and self._step is None
        ):
            self._begin_quietly()
            return
        self.check_no_step()
        added = self.new_tokens(check_count("n", n), lengths)
        self._begin(added, n if lengths is None else -1)

    def _begin(self, added: list[int], default: int) -> None:
        held = self.rows
        if self.max_tokens is not None and any(
            row.length + new > self.max_tokens for row, new in zip(held.rows, added, strict=True)
        ):
            raise ValueError(
                f"`max_tokens`={self.max_tokens} would be exceeded: "
                f"lengths {self.rows.lengths} plus {added} new tokens"
            )
        bodies = held.bodies
        with self.all_or_nothing([]) as before:
            self._activate(added)
            for row, new in zip(held.rows, added, strict=True):
                row.length += new
            self._make_room(held.bodies)
            held.sync_state()
            threads = torch.get_num_threads()
            self.workspace.fit(held.bodies, threads)
            configure_threads(threads)
            body_added = [n - old for n, old in zip(held.bodies, bodies, strict=True)]
            step = self._new_step(added, body_added, default)
            self._quiet_steps = self._steps_without_host_work()
            self._quiet_lengths = [int(active) for active in held.active]
            step.before = before
            self._step = step

    def _new_step(self, added: list[int], body_added: list[int], default: int) -> Step:
        cfg, held = self.cfg, self.rows
        growing = list(zip(held.rows, held.bodies, body_added, strict=True))
        slots = [row.slot if new else NO_SLOT for row, _, new in growing]
        flushed = [
            row.slot
            for row, body, new in growing
            if layout.packed_keys(cfg, body) > layout.packed_keys(cfg, body - new)
        ]
        # One new token takes a ring's spare place; the next ones overwrite what `crop` may need.
        overrun = [row.slot for row, body, new in growing if body > new > 1]
        to_sinks = [n - new for n, new in zip(added, body_added, strict=True)]
        return Step(
            added,
            tvm_ffi.from_dlpack(held.tensor(body_added)),
            tvm_ffi.from_dlpack(held.tensor(slots)),
            set(range(len(self.layers))),
            to_sinks=to_sinks if any(to_sinks) else [],
            flushed=flushed if self.write_back else [],
            overrun=overrun,
            default=default,
        )

    def _activate(self, added: list[int]) -> None:
        """Give slots to inactive rows that get tokens."""
        free = self.rows.free_slots
        for row, new in zip(self.rows.rows, added, strict=True):
            if new and row.slot == NO_SLOT:
                row.slot = free.pop(0)
        self.rows.sync_slots()

    def _begin_quietly(self) -> None:
        """A step of one token per active row for which pages, workspace and work are in place."""
        self._quiet_steps -= 1
        configure_threads(torch.get_num_threads())
        try:
            self.kernels["advance"](*self._advance_one)
        except BaseException:
            self._quiet_steps = 0
            self.rows.sync_state()
            raise
        for row in self.rows.rows:
            row.length += row.slot != NO_SLOT
        todo = set(range(len(self.layers)))
        self._step = Step(self._quiet_lengths, *self._quiet_tensors, todo)

    def _steps_without_host_work(self) -> int:
        """One-token steps before a key block is due, a split is added or `max_tokens` is met."""
        active = [row.length for row in self.rows.rows if row.slot != NO_SLOT]
        if min(active, default=0) < self.rows.sink_tokens:
            return 0
        bodies = [self.rows.body(length) for length in active]
        flush = min((self.cfg.R - 1 - n % self.cfg.R for n in bodies), default=0)
        steps = min(flush, self.workspace.steps_until_new_splits(bodies))
        if self.max_tokens is not None and active:
            steps = min(steps, self.max_tokens - max(active))
        return steps

    def new_tokens(
        self, n: int, lengths: Sequence[int] | Tensor | None, rows: list[int] | None = None
    ) -> list[int]:
        """The new tokens of every row, of a call with `n` tokens for all rows or for `rows`."""
        if rows is None:
            if lengths is not None:
                return check_lengths(lengths, len(self.rows), n)
            active = self.rows.active
            return [n if each or not any(active) else 0 for each in active]
        found = [0] * len(self.rows)
        counts = [n] * len(rows) if lengths is None else check_lengths(lengths, len(rows), n)
        for row, count in zip(rows, counts, strict=True):
            found[row] = count
        return found

    def enter(self, index: int, n: int, added: list[int] | None = None) -> bool:
        """Layer `index` joins the step with `n` tokens per row; true if that began the step.

        Without `added` every active row gets `n` tokens, and no inactive one.

        Raises
        ------
        RuntimeError
            The layer was called already, or with other tokens than the step's.
        """
        step = self._step
        if step is None:
            if added is None and not self._quiet_steps and not any(self.rows.active):
                added = [0] * len(self.rows)
            self.begin(n, added)
            return True
        if index not in step.todo:
            raise RuntimeError(
                f"layer {index} was already called in this step; still to come: {sorted(step.todo)}"
            )
        if added is None and step.default != n:
            added = self.new_tokens(n, None)
        if added is not None and added != step.lengths:
            raise RuntimeError(f"this step adds {step.lengths} tokens per row, got {added}")
        return False

    def leave(self, index: int) -> None:
        """Layer `index` is done; the last one ends the step."""
        if self._step is not None:
            self._step.todo.discard(index)
            if not self._step.todo:
                self._step = None

    def abandon(self, began: bool) -> None:
        """Undo the step if the failed layer call began it; else the layer can be called again."""
        if not began or self._step is None:
            return
        if self._step.before is None:
            for row in self.rows.rows:
                row.length -= row.slot != NO_SLOT
            self._step, self._quiet_steps = None, 0
            self.rows.sync_state()
        else:
            self._restore(*self._step.before)

    def check_can_prefill(self, added: list[int]) -> None:
        """Raise unless every row that gets tokens was empty before the step."""
        before = self._lengths_before()
        if any(length and new for length, new in zip(before, added, strict=True)):
            raise RuntimeError(
                f"`prefill` needs empty rows, got lengths {before} for {added} new tokens; use "
                "`extend` to add tokens, or `free` rows or `reset()` first"
            )

    def extension(self) -> tuple[Any, Workspace]:
        """The open step's new tokens per row `int32 [B]`, and scratch for its history."""
        if self._extend_workspace is None:
            self._extend_workspace = Workspace(
                self.cfg,
                self._extend_key,
                2 + bool(self.rows.sink_tokens),
                len(self.rows),
                self.device,
            )
        step, held = self.step, self.rows
        if not step.history_is_set:
            before = self._lengths_before()
            held.write(held.state_before, held.sink_state_before, before)
            bodies = [held.body(length) for length in before]
            self._extend_workspace.fit(bodies, torch.get_num_threads())
            step.history_is_set = True
        return held.tensor(step.lengths), self._extend_workspace

    def _lengths_before(self) -> list[int]:
        """Tokens per row before the open step, if there is one."""
        if self._step is None:
            return self.rows.lengths
        return [n - new for n, new in zip(self.rows.lengths, self._step.lengths, strict=True)]

    def check_done(self, index: int) -> None:
        """Raise if layer `index` is still to be called in the open step."""
        if self._step is not None and index in self._step.todo:
            raise RuntimeError(f"layer {index} was not called yet in the open step")

    def check_no_step(self) -> None:
        if self._step is not None:
            raise RuntimeError(
                f"the previous step is not finished: layers {sorted(self._step.todo)} were not "
                "called; call them, or `reset()` to drop everything"
            )

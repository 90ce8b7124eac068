"""The cache of a batch: sequences, pages and lengths, shared by all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import tvm_ffi
from torch import Tensor

from kivi_tvm import layout
from kivi_tvm.config import WINDOWS
from kivi_tvm.errors import UserError
from kivi_tvm.runtime.checks import check_lengths, outside_inference_mode
from kivi_tvm.runtime.layer import CacheLayer
from kivi_tvm.runtime.library import configure_threads
from kivi_tvm.runtime.pages import PageTable
from kivi_tvm.runtime.workspace import Workspace

if TYPE_CHECKING:
    from kivi_tvm.runtime.module import Module

# A full pool grows by this share: 3% more memory for one copy of the pages per 3% more tokens.
GROWTH_SHARE = 32


@dataclass(slots=True)
class Step:
    """A forward under way: the tokens it adds to each row, and the layers still to come."""

    lengths: list[int]
    added: Tensor
    todo: set[int]
    history_is_set: bool = False


class Cache:
    """KV cache of `batch_size` sequences and `num_layers` layers; `Module.new_cache` makes it.

    One forward is one step: `begin(n)`, then every layer once. The first layer called begins the
    step by itself if `begin` was not called.
    """

    @outside_inference_mode
    def __init__(
        self,
        module: Module,
        num_layers: int,
        batch_size: int,
        max_tokens: int | None,
        device: Any,
        rollback: int,
        window: str,
    ) -> None:
        _check_options(num_layers, batch_size, max_tokens, device, rollback, window)
        cfg = module.cfg
        self.module, self.cfg = module, cfg
        self.batch_size, self.max_tokens, self.window = batch_size, max_tokens, window
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, cfg.dtype)
        self.kernels = module.library
        self.write_back = int(window == "kivi")
        self.slots = torch.arange(batch_size, dtype=torch.int32, device=self.device)
        self.state = torch.zeros(
            batch_size, len(layout.STATE_FIELDS), dtype=torch.int32, device=self.device
        )
        self.state_before = torch.zeros_like(self.state)
        self.one = torch.ones(batch_size, dtype=torch.int32, device=self.device)
        self._advance_one = (*map(tvm_ffi.from_dlpack, (self.state, self.slots, self.one)), cfg.R)
        self._lengths = [0] * batch_size
        self._pages = PageTable(cfg, batch_size, self.device)
        self._step: Step | None = None
        self._quiet_steps = 0
        key = cfg.kernel_key()
        self.workspace = Workspace(cfg, key, 1, batch_size, self.device)
        self._extend_key = replace(key, rows_per_query=key.extend_rows)
        self._extend_workspace: Workspace | None = None
        self.lse = torch.empty(batch_size, cfg.H, device=self.device)
        self._layers = [CacheLayer(self, index) for index in range(num_layers)]

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def lengths(self) -> list[int]:
        """Tokens stored per sequence."""
        return list(self._lengths)

    @property
    def page_table(self) -> Tensor:
        return self._pages.table

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes actually held, by part.

        "packed" (codes, scales and zeros of the page pool), "window" (full-precision rings),
        "tables" (page table, lengths, slots), "workspace" (partial results and work lists, shared
        by all layers) and "total".
        """
        parts = {
            "packed": sum(layer.packed_nbytes for layer in self._layers),
            "window": sum(layer.window_nbytes for layer in self._layers),
            "tables": sum(
                x.nbytes
                for x in (self.page_table, self.state, self.state_before, self.slots, self.one)
            ),
            "workspace": self.lse.nbytes + sum(each.nbytes for each in self._workspaces()),
        }
        return {**parts, "total": sum(parts.values())}

    def layer(self, index: int) -> CacheLayer:
        """Layer `index`.

        Raises
        ------
        IndexError
            There is no such layer.
        """
        if not 0 <= index < self.num_layers:
            raise IndexError(f"`index` must be in 0..{self.num_layers - 1}, got {index}")
        return self._layers[index]

    def __repr__(self) -> str:
        return (
            f"Cache(layers={self.num_layers}, lengths={self._lengths}, window={self.window!r}, "
            f"bytes={self.nbytes['total']:,})"
        )

    def begin(self, n: int, lengths: Sequence[int] | Tensor | None = None) -> None:
        """Begin a step of `n` tokens per row: reserve memory and advance every length.

        Parameters
        ----------
        n : int
            Tokens of this step's tensors: `T` of a prefill, 1 of a decode.
        lengths : sequence of int or Tensor, optional
            Tokens of each row of a ragged prefill or extend, at most `n`; default `n`.

        Raises
        ------
        RuntimeError
            The previous step is not finished: some layers were not called.
        ValueError
            A length is out of range or `max_tokens` would be exceeded; nothing has changed.
        """
        if (
            self._quiet_steps
            and n == 1
            and n is not True
            and lengths is None
            and self._step is None
        ):
            self._begin_quietly()
            return
        if self._step is not None:
            raise RuntimeError(
                f"the previous step is not finished: layers {sorted(self._step.todo)} were not "
                "called; call them, or `reset()` to drop everything"
            )
        if not isinstance(n, int) or isinstance(n, bool) or n < 0:
            raise ValueError(f"`n` must be an int of at least 0, got {n!r}")
        added = check_lengths(lengths, self.batch_size, n)
        after = [old + new for old, new in zip(self._lengths, added, strict=True)]
        if self.max_tokens is not None and max(after) > self.max_tokens:
            raise ValueError(
                f"`max_tokens`={self.max_tokens} would be exceeded: "
                f"lengths {self._lengths} plus {added} new tokens"
            )
        self._make_room([layout.packed_keys(self.cfg, length) for length in after])
        threads = torch.get_num_threads()
        self.workspace.fit(after, threads)
        configure_threads(threads)
        tokens = torch.tensor(added, dtype=torch.int32, device=self.device)
        self.kernels["advance"](self.state, self.slots, tokens, self.cfg.R)
        self._lengths = after
        self._quiet_steps = self._steps_without_host_work()
        self._step = Step(added, tokens, set(range(self.num_layers)))

    def _begin_quietly(self) -> None:
        """A step of one token per row for which pages, workspace and work list are in place."""
        self._quiet_steps -= 1
        configure_threads(torch.get_num_threads())
        self.kernels["advance"](*self._advance_one)
        self._lengths = [length + 1 for length in self._lengths]
        self._step = Step([1] * self.batch_size, self.one, set(range(self.num_layers)))

    def _steps_without_host_work(self) -> int:
        """One-token steps before a key block is due, a split is added or `max_tokens` is met."""
        flush = min(self.cfg.R - 1 - length % self.cfg.R for length in self._lengths)
        steps = min(flush, self.workspace.steps_until_new_splits(self._lengths))
        if self.max_tokens is not None:
            steps = min(steps, self.max_tokens - max(self._lengths))
        return steps

    def enter(self, index: int, n: int, lengths: Sequence[int] | Tensor | None = None) -> None:
        """Layer `index` joins the step with `n` tokens per row; it is begun if none is open.

        Raises
        ------
        RuntimeError
            The layer was called already, or with other tokens than the step's.
        """
        if self._step is None:
            self.begin(n, lengths)
            return
        if index not in self._step.todo:
            raise RuntimeError(
                f"layer {index} was already called in this step; still to come: "
                f"{sorted(self._step.todo)}"
            )
        added = check_lengths(lengths, self.batch_size, n)
        if added != self._step.lengths:
            raise RuntimeError(f"this step adds {self._step.lengths} tokens per row, got {added}")

    def leave(self, index: int) -> None:
        """Layer `index` is done; the last one ends the step."""
        if self._step is not None:
            self._step.todo.discard(index)
            if not self._step.todo:
                self._step = None

    def check_can_prefill(self) -> None:
        """Raise unless every row was empty before the step."""
        before = self._lengths_before()
        if any(before):
            raise RuntimeError(
                f"`prefill` needs an empty cache, got lengths {before}; use `extend` to add tokens "
                "or call `reset()` first"
            )

    def extension(self) -> tuple[Tensor, Workspace]:
        """The open step's new tokens per row `int32 [B]`, and scratch for its history."""
        assert self._step is not None
        if self._extend_workspace is None:
            self._extend_workspace = Workspace(
                self.cfg, self._extend_key, 2, self.batch_size, self.device
            )
        if not self._step.history_is_set:
            before, cfg = self._lengths_before(), self.cfg
            packed = [(n, layout.packed_keys(cfg, n), layout.packed_values(cfg, n)) for n in before]
            self.state_before[:, :3] = torch.tensor(packed, dtype=torch.int32)
            self._extend_workspace.fit(before, torch.get_num_threads())
            self._step.history_is_set = True
        return self._step.added, self._extend_workspace

    def _lengths_before(self) -> list[int]:
        """Tokens per row before the open step, if there is one."""
        if self._step is None:
            return self._lengths
        return [n - new for n, new in zip(self._lengths, self._step.lengths, strict=True)]

    def _workspaces(self) -> list[Workspace]:
        return [each for each in (self.workspace, self._extend_workspace) if each is not None]

    def prefill(self, k: Tensor, v: Tensor, lengths: Sequence[int] | Tensor | None = None) -> None:
        """`CacheLayer.prefill` of a cache with one layer."""
        self._only_layer("prefill").prefill(k, v, lengths)

    def decode(
        self,
        q: Tensor,
        k_new: Tensor,
        v_new: Tensor,
        scale: float | None = None,
        return_lse: bool = False,
        out: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`CacheLayer.decode` of a cache with one layer."""
        return self._only_layer("decode").decode(q, k_new, v_new, scale, return_lse, out)

    def extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int] | Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """`CacheLayer.extend` of a cache with one layer."""
        return self._only_layer("extend").extend(q, k, v, lengths, scale)

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """`CacheLayer.dequantize` of a cache with one layer."""
        return self._only_layer("dequantize").dequantize()

    def _only_layer(self, call: str) -> CacheLayer:
        if self.num_layers != 1:
            raise ValueError(
                f"`cache.{call}` needs num_layers=1, got {self.num_layers}; "
                f"use `cache.layer(i).{call}`"
            )
        return self._layers[0]

    def reserve(self, tokens: int) -> None:
        """Take the memory for `tokens` tokens of every sequence now.

        Raises
        ------
        ValueError
            `tokens` is negative or above `max_tokens`.
        """
        if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 0:
            raise ValueError(f"`tokens` must be an int of at least 0, got {tokens!r}")
        if self.max_tokens is not None and tokens > self.max_tokens:
            raise ValueError(f"`tokens` must be at most max_tokens={self.max_tokens}, got {tokens}")
        packed = layout.packed_keys(self.cfg, tokens)
        self._make_room([max(packed, self._packed_keys(row)) for row in range(self.batch_size)])

    def reset(self) -> None:
        """Forget all sequences; memory is kept for the next ones."""
        self._lengths = [0] * self.batch_size
        self._step = None
        self.state.zero_()
        self._pages.clear()
        self._quiet_steps = 0

    def _packed_keys(self, row: int) -> int:
        return layout.packed_keys(self.cfg, self._lengths[row])

    def _make_room(self, packed: list[int]) -> None:
        """Own the pages for so many packed keys of every sequence, growing the pool if needed."""
        missing = self._pages.missing(packed)
        if missing:
            capacity = self._pages.capacity
            capacity += max(missing, capacity // GROWTH_SHARE)
            for layer in self._layers:
                layer.grow(capacity)
            self._pages.grow(capacity)
        width = max(layout.num_pages(self.cfg, tokens) for tokens in packed)
        if width > self._pages.width:
            # Room for more than one block ahead, so that steps rarely change the launch shapes.
            self._pages.widen(width + width // 4)
            for layer in self._layers:
                layer.bind()
        self._pages.assign(packed)


def _check_options(
    num_layers: int,
    batch_size: int,
    max_tokens: int | None,
    device: Any,
    rollback: int,
    window: str,
) -> None:
    """Raise one error that lists every option that breaks its rule."""
    found = []
    counts = {"num_layers": num_layers, "batch_size": batch_size}
    if max_tokens is not None:
        counts["max_tokens"] = max_tokens
    for name, count in counts.items():
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            found.append(f"`{name}` must be an int of at least 1, got {count!r}")
    if window not in WINDOWS:
        found.append(f"`window` must be one of {list(WINDOWS)}, got {window!r}")
    if rollback != 0:
        found.append(
            f"`rollback` must be 0 (taking tokens back is not built yet), got {rollback!r}"
        )
    try:
        if torch.device(device).type != "cpu":
            found.append(f"`device` must be 'cpu' (no GPU schedules yet), got {str(device)!r}")
    except (RuntimeError, TypeError):
        found.append(f"`device` must be a torch device, got {device!r}")
    if found:
        raise UserError("; ".join(found))

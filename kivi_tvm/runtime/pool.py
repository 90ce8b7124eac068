"""What a cache is made of: rows, pages, layers and scratch; how it grows and is put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
import tvm_ffi

from kivi_tvm import layout
from kivi_tvm.runtime.checks import outside_inference_mode
from kivi_tvm.runtime.devices import device_of
from kivi_tvm.runtime.layer import CacheLayer
from kivi_tvm.runtime.options import CacheOptions
from kivi_tvm.runtime.pages import Ownership, PageTable
from kivi_tvm.runtime.rows import NO_SLOT, Row, Rows
from kivi_tvm.runtime.workspace import Workspace

if TYPE_CHECKING:
    from kivi_tvm.runtime.cache import Cache
    from kivi_tvm.runtime.module import Module
    from kivi_tvm.runtime.step import Step

# A full pool grows by this share: 2% more memory for one copy of the pages per 2% more tokens.
GROWTH_SHARE = 48


class CachePool:
    """The memory behind a `Cache`."""

    @outside_inference_mode
    def __init__(self, module: Module, options: CacheOptions) -> None:
        cfg = module.cfg
        self.module, self.cfg, self.kernels = module, cfg, module.library
        self.max_tokens, self.window = options.max_tokens, options.window
        self.device = device_of(module.target, options.device)
        self.dtype: torch.dtype = getattr(torch, cfg.dtype)
        self.write_back = int(options.window == "kivi")
        self.rows = Rows(
            cfg,
            options.batch_size,
            options.rollback,
            options.window,
            options.sink_tokens,
            self.device,
        )
        self.pages = PageTable(cfg, options.batch_size, self.device)
        self._step: Step | None = None
        self._quiet_steps = 0
        self._quiet_lengths: list[int] = []
        self.layers: list[CacheLayer] = []
        self._make_workspace()
        self._freeze()
        self._is_bound = True
        whole = cast("Cache", self)
        self.layers += [CacheLayer(whole, index) for index in range(options.num_layers)]

    def _make_room(self, bodies: list[int]) -> None:
        """Own the pages for so many body tokens of every active row, growing the pool if needed."""
        packed = {
            row.slot: layout.packed_keys(self.cfg, n)
            for row, n in zip(self.rows.rows, bodies, strict=True)
            if row.slot != NO_SLOT
        }
        self.make_pages(self.pages.missing(packed))
        width = max((layout.num_pages(self.cfg, n) for n in packed.values()), default=0)
        if width > self.pages.width:
            # Room for more than one block ahead, so that steps rarely change the launch shapes.
            self._unbind()
            self.pages.reshape(self.rows.capacity, width + width // 4)
            self.bind()
        self.pages.assign(packed)

    def make_pages(self, missing: int) -> None:
        """Let the pool have so many more pages."""
        if missing:
            capacity = self.pages.capacity
            capacity += max(missing, capacity // GROWTH_SHARE)
            self._unbind()
            for layer in self.layers:
                layer.memory.grow_pages(capacity)
                layer.bind()
            self.pages.grow(capacity)
            self._is_bound = True

    def make_slots(self, capacity: int) -> None:
        """Let there be windows and lines of the tables for so many sequences."""
        if capacity > self.rows.capacity:
            self._unbind()
            for layer in self.layers:
                layer.memory.grow_windows(capacity, self.rows.rollback)
            self.pages.reshape(capacity, self.pages.width)
            self.rows.grow(capacity)
            self.bind()

    @contextmanager
    def all_or_nothing(self, slots: list[int]) -> Iterator[tuple[list[Row], Ownership]]:
        """Undo what is done to rows, page ownership and the windows of `slots` if it raises.

        Pages that have an owner must not be written to. Gives what to `_restore` later.
        """
        if not self._is_bound:
            self.bind()
        rows, pages = self.rows.snapshot(), self.pages.snapshot()
        saved = [layer.memory.save_windows(slots) for layer in self.layers if slots]
        try:
            yield rows, pages
        except BaseException:
            for layer, windows in zip(self.layers, saved, strict=False):
                layer.memory.put_windows(slots, windows)
            self._restore(rows, pages)
            raise

    def _restore(self, rows: list[Row], pages: Ownership) -> None:
        self._step, self._quiet_steps = None, 0
        self.rows.rows = rows
        self.pages.restore(pages)
        self.rows_changed()

    def rows_changed(self) -> None:
        """Bring the device and the scratch memory to the host's record of the rows."""
        self._quiet_steps = 0
        if not self._is_bound or len(self.rows) != len(self.lse):
            self.bind()
        self.rows.sync()

    @outside_inference_mode
    def _make_workspace(self) -> None:
        key, tail = self.module.key, 1 + bool(self.rows.sink_tokens)
        self.workspace = Workspace(self.cfg, key, tail, len(self.rows), self.device)
        self._extend_key = replace(key, rows_per_query=key.extend_rows)
        self._extend_workspace: Workspace | None = None
        self.lse = torch.empty(len(self.rows), self.cfg.H, device=self.device)

    def _freeze(self) -> None:
        """Convert what every decode step hands to kernels once."""
        held = self.rows
        state, slots, one = map(tvm_ffi.from_dlpack, (held.state, held.slots, held.one))
        self._quiet_tensors = (one, slots)
        # Kernels run on the stream that torch has for one of their tensors, if they get any.
        if self.device.type == "cuda":
            state, slots, one = held.state, held.slots, held.one
        self._advance_one = (state, slots, one, self.cfg.R)

    def _unbind(self) -> None:
        """Note that buffers are about to be replaced: the next step must not begin quietly."""
        self._is_bound, self._quiet_steps = False, 0

    def bind(self) -> None:
        """Hand all layers the buffers that kernels take; after any was replaced.

        `_is_bound` is false from the first replacement until this is done, so that whatever
        interrupts it, no kernel sees the old ones.
        """
        self._unbind()
        if not len(self.rows) == len(self.rows.slots) == len(self.lse):
            self.rows.resize()
            self._make_workspace()
        self.rows.sync()
        self._freeze()
        for layer in self.layers:
            layer.bind()
        self._is_bound = True

    def _workspaces(self) -> list[Workspace]:
        return [each for each in (self.workspace, self._extend_workspace) if each is not None]

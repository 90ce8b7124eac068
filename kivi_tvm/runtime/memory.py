"""The buffers of one layer: its page pool and its windows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kivi_tvm import layout
from kivi_tvm.config import KiviConfig
from kivi_tvm.runtime.checks import INDEX_LIMIT, outside_inference_mode

# torch's uint32 lacks most operators on CPU: words are held as int32 and viewed at the call.
_HELD_AS = {"uint32": torch.int32}
Pairs = list[tuple[int, int]]  # (from, to)


class LayerMemory:
    """Pages and windows of one layer, and how they grow and are copied.

    Attributes
    ----------
    pages : dict of str to Tensor
        `layout.page_buffers`, words as int32. While they grow, some may be longer than others.
    windows : dict of str to Tensor
        `layout.ring_buffers`, one entry per slot.
    """

    def __init__(
        self,
        cfg: KiviConfig,
        num_slots: int,
        rollback: int,
        window: str,
        sink_tokens: int,
        device: torch.device,
    ) -> None:
        self._cfg, self._device = cfg, device
        self._window, self._sink_tokens = window, sink_tokens
        self.pages: dict[str, Tensor] = {}
        self.grow_pages(0)
        self.windows = self.new_windows(num_slots, rollback)

    @property
    def packed_nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.pages.values())

    @property
    def window_nbytes(self) -> int:
        return sum(ring.nbytes for ring in self.windows.values())

    def pool(self, kind: str) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and zeros of the keys ("k") or values ("v"), as kernels take them."""
        count = min(buffer.shape[0] for buffer in self.pages.values())
        code, scale, zero = (self.pages[f"{kind}_{part}"] for part in ("code", "scale", "zero"))
        return code[:count].view(torch.uint32), scale[:count], zero[:count]

    def rings(self, num_slots: int) -> tuple[Tensor, Tensor, Tensor]:
        """`k_ring`, `v_ring` and `k_exact` of the first slots; the last is empty if not held."""
        exact = self.windows.get("k_exact", self.windows["k_ring"][:, :, :0])
        rings = (self.windows["k_ring"], self.windows["v_ring"], exact)
        k_ring, v_ring, k_exact = (ring[:num_slots] for ring in rings)
        return k_ring, v_ring, k_exact if k_exact.numel() else k_exact.contiguous()

    def grow_pages(self, num_pages: int) -> None:
        """Make every page buffer hold `num_pages` pages, one buffer at a time.

        Raises
        ------
        ValueError
            A buffer would have more elements than the kernels can index.
        """
        for name, buffer in layout.page_buffers(self._cfg, num_pages).items():
            old = self.pages.get(name)
            if old is None or old.shape[0] < num_pages:
                self.pages[name] = self._grown(old, buffer)

    def grow_windows(self, num_slots: int, rollback: int) -> None:
        """Make every window hold `num_slots` slots."""
        for name, buffer in self._window_buffers(num_slots, rollback).items():
            if self.windows[name].shape[0] < num_slots:
                self.windows[name] = self._grown(self.windows[name], buffer)

    def new_windows(self, num_slots: int, rollback: int) -> dict[str, Tensor]:
        """Empty windows for so many slots and tokens to take back."""
        buffers = self._window_buffers(num_slots, rollback)
        return {name: self._empty(buffer) for name, buffer in buffers.items()}

    def copy_pages(self, pairs: Pairs) -> None:
        """Copy pages onto others."""
        if pairs:
            source, target = (torch.tensor(ids, device=self._device) for ids in zip(*pairs))
            for buffer in self.pages.values():
                buffer[target] = buffer[source]

    def copy_windows(self, pairs: Pairs) -> None:
        """Copy the windows of slots onto those of others."""
        for window in self.windows.values():
            for source, target in pairs:
                window[target].copy_(window[source])

    def save_windows(self, slots: list[int]) -> list[Tensor]:
        """Copies of what the windows of these slots hold."""
        return [window[slots] for window in self.windows.values()]

    def put_windows(self, slots: list[int], saved: list[Tensor]) -> None:
        """Write back what `save_windows` copied."""
        for window, copy in zip(self.windows.values(), saved, strict=True):
            window[slots] = copy

    def _window_buffers(self, num_slots: int, rollback: int) -> dict[str, layout.Buffer]:
        return layout.ring_buffers(self._cfg, num_slots, rollback, self._window, self._sink_tokens)

    def _grown(self, old: Tensor | None, buffer: layout.Buffer) -> Tensor:
        new = self._empty(buffer)
        if old is not None:
            new[: old.shape[0]] = old
        return new

    @outside_inference_mode
    def _empty(self, buffer: layout.Buffer) -> Tensor:
        """Uninitialized memory for a buffer; kernels never read what was not written."""
        if math.prod(buffer.shape) >= INDEX_LIMIT:
            raise ValueError(
                f"a buffer of a layer must have less than 2^31 elements, got {buffer.shape}; "
                "use fewer or shorter sequences, or several caches"
            )
        dtype = _HELD_AS.get(buffer.dtype) or getattr(torch, buffer.dtype)
        return torch.empty(buffer.shape, dtype=dtype, device=self._device)

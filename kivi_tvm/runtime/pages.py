"""Which pages a sequence owns: the host's side of the page table."""

from __future__ import annotations

import torch

from kivi_tvm.config import KiviConfig
from kivi_tvm.layout import NO_PAGE, num_pages
from kivi_tvm.runtime.checks import outside_inference_mode


class PageTable:
    """Pages of `num_slots` sequences; the device reads `table [num_slots, width]` int32."""

    @outside_inference_mode
    def __init__(self, cfg: KiviConfig, num_slots: int, device: torch.device) -> None:
        self._cfg = cfg
        self.capacity = 0
        self._owned: list[list[int]] = [[] for _ in range(num_slots)]
        self._free: list[int] = []
        self.table = torch.full((num_slots, 1), NO_PAGE, dtype=torch.int32, device=device)

    @property
    def width(self) -> int:
        """Pages that one row of the table can name."""
        return self.table.shape[1]

    def missing(self, packed_tokens: list[int]) -> int:
        """Pages that the pool lacks to hold so many packed tokens of every sequence."""
        pairs = zip(self._owned, packed_tokens, strict=True)
        wanted = sum(max(0, num_pages(self._cfg, n) - len(owned)) for owned, n in pairs)
        return max(0, wanted - len(self._free))

    def grow(self, capacity: int) -> None:
        """Make pages up to `capacity` available, after the pool holds them."""
        # Lowest page first, so that a fresh pool is filled in order of its addresses.
        self._free[:0] = range(capacity - 1, self.capacity - 1, -1)
        self.capacity = capacity

    @outside_inference_mode
    def widen(self, width: int) -> None:
        """Let every row name at least `width` pages."""
        if width > self.width:
            wider = self.table.new_full((self.table.shape[0], width), NO_PAGE)
            wider[:, : self.width] = self.table
            self.table = wider

    def assign(self, packed_tokens: list[int]) -> None:
        """Give every sequence the pages for so many packed tokens; the pool must have them."""
        for slot, tokens in enumerate(packed_tokens):
            owned, wanted = self._owned[slot], num_pages(self._cfg, tokens)
            if wanted > len(owned):
                new = [self._free.pop() for _ in range(wanted - len(owned))]
                self.table[slot, len(owned) : wanted] = torch.tensor(new, dtype=torch.int32)
                owned.extend(new)

    def clear(self) -> None:
        """Take all pages back."""
        self._owned = [[] for _ in self._owned]
        self._free = list(range(self.capacity - 1, -1, -1))
        self.table.fill_(NO_PAGE)

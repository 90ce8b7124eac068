"""Which pages a sequence owns, and which sequences share one: the host's side of the page table."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch

from kivi_tvm.config import KiviConfig
from kivi_tvm.layout import NO_PAGE, num_pages
from kivi_tvm.runtime.checks import outside_inference_mode


class Ownership(NamedTuple):
    """Pages of every slot, free pages (the next one last), and owners of every page."""

    owned: list[tuple[int, ...]]
    free: list[int]
    references: list[int]


class PageTable:
    """Pages of the sequences in `num_slots` slots; the device reads `table [num_slots, width]`.

    Pages whose tokens are all packed, keys and values, may have several owners. A page that is
    still written has one.
    """

    @outside_inference_mode
    def __init__(self, cfg: KiviConfig, num_slots: int, device: torch.device) -> None:
        self._cfg = cfg
        self.capacity = 0
        self._owned: list[tuple[int, ...]] = [()] * num_slots
        self._free: list[int] = []
        self._references: list[int] = []
        self.table = torch.full((num_slots, 1), NO_PAGE, dtype=torch.int32, device=device)

    @property
    def width(self) -> int:
        """Pages that one row of the table can name."""
        return self.table.shape[1]

    @property
    def used(self) -> int:
        """Pages with an owner."""
        return self.capacity - len(self._free)

    @property
    def shared(self) -> int:
        """Pages with several owners."""
        return sum(count > 1 for count in self._references)

    def owned(self, slot: int) -> tuple[int, ...]:
        """Pages of the sequence in `slot`, in the order of its tokens."""
        return self._owned[slot]

    def references(self, page: int) -> int:
        """Owners of `page`."""
        return self._references[page]

    def missing(self, packed_tokens: dict[int, int], copies: int = 0) -> int:
        """Pages that the pool lacks to hold so many packed tokens per slot, and `copies` more."""
        wanted = sum(
            max(0, num_pages(self._cfg, tokens) - len(self._owned[slot]))
            for slot, tokens in packed_tokens.items()
        )
        return max(0, wanted + copies - len(self._free))

    def grow(self, capacity: int) -> None:
        """Make pages up to `capacity` available, after the pool holds them."""
        # Lowest page first, so that a fresh pool is filled in order of its addresses.
        self._free[:0] = range(capacity - 1, self.capacity - 1, -1)
        self._references += [0] * (capacity - self.capacity)
        self.capacity = capacity

    @outside_inference_mode
    def reshape(self, num_slots: int, width: int) -> None:
        """Give the table more rows or let every row name more pages."""
        if (num_slots, width) != self.table.shape:
            table = self.table.new_full((num_slots, width), NO_PAGE)
            table[: self.table.shape[0], : self.width] = self.table
            self.table = table
            self._owned += [()] * (num_slots - len(self._owned))

    def assign(self, packed_tokens: dict[int, int]) -> None:
        """Give every slot the pages for so many packed tokens; the pool must have them."""
        for slot, tokens in packed_tokens.items():
            owned, wanted = self._owned[slot], num_pages(self._cfg, tokens)
            if wanted > len(owned):
                self._set(slot, owned + self._take(wanted - len(owned)))

    def share(
        self, shares: list[tuple[int, int, range]], dropped: list[int]
    ) -> list[tuple[int, int]]:
        """Empty the slots `dropped`; for each (source, target, written) let the slot `target` own
        the pages of `source` before the numbers `written`, and copies of those.

        Returns (page, its copy) for the caller to fill. No copy is a page that was dropped, so
        until then nothing is lost.
        """
        pairs: list[tuple[int, int]] = []
        owners = []
        for source, target, written in shares:
            owned = self._owned[source]
            kept, copies = owned[: written.start], self._take(len(written))
            pairs += zip([owned[i] for i in written], copies, strict=True)
            owners.append((target, kept + copies))
            for page in kept:
                self._references[page] += 1
        for slot in dropped:
            self.release(slot)
        for target, owned in owners:
            self._set(target, owned)
        return pairs

    def shared_from(self, slot: int, first: int) -> list[int]:
        """Which of a slot's pages from number `first` on have other owners."""
        owned = self._owned[slot]
        return [i for i in range(first, len(owned)) if self._references[owned[i]] > 1]

    def copies_to_reopen(self, firsts: dict[int, int]) -> int:
        """Pages that `reopen` takes from the pool."""
        wanted = Counter(
            self._owned[slot][i]
            for slot, first in firsts.items()
            for i in self.shared_from(slot, first)
        )
        return sum(min(n, self._references[page] - 1) for page, n in wanted.items())

    def reopen(self, firsts: dict[int, int]) -> list[tuple[int, int]]:
        """Let every slot be the only owner of its pages from a number on, by copies.

        Returns (page, its copy) for the caller to fill. The last owner keeps a page, so that none
        becomes free, and a copy of another, before it was read.
        """
        return [
            pair
            for slot, first in firsts.items()
            for pair in self._separate(slot, self.shared_from(slot, first))
        ]

    def _separate(self, slot: int, numbers: list[int]) -> list[tuple[int, int]]:
        """Exchange a slot's pages of these numbers for copies; returns (page, its copy)."""
        owned = list(self._owned[slot])
        pairs = [
            (owned[i], copy) for i, copy in zip(numbers, self._take(len(numbers)), strict=True)
        ]
        for i, (_, copy) in zip(numbers, pairs, strict=True):
            owned[i] = copy
        self._drop([page for page, _ in pairs])
        self._set(slot, tuple(owned))
        return pairs

    def release(self, slot: int, keep: int = 0) -> None:
        """Give up a slot's pages from number `keep` on."""
        owned = self._owned[slot]
        if keep < len(owned):
            self._drop(owned[keep:])
            self.table[slot, keep : len(owned)] = NO_PAGE
            self._owned[slot] = owned[:keep]

    def clear(self) -> None:
        """Take all pages back."""
        self.restore(
            Ownership(
                [()] * len(self._owned), list(range(self.capacity - 1, -1, -1)), [0] * self.capacity
            )
        )

    def snapshot(self) -> Ownership:
        """Who owns what now."""
        return Ownership(self._owned.copy(), self._free.copy(), self._references.copy())

    def restore(self, before: Ownership) -> None:
        """Undo all changes of ownership since `snapshot`; pages and slots added since are free."""
        added = self.capacity - len(before.references)
        self._owned = before.owned + [()] * (len(self._owned) - len(before.owned))
        self._free = list(range(self.capacity - 1, self.capacity - 1 - added, -1)) + before.free
        self._references = before.references + [0] * added
        self.table.fill_(NO_PAGE)
        for slot, owned in enumerate(self._owned):
            self._write(slot, owned)

    def _take(self, count: int) -> tuple[int, ...]:
        taken = tuple(self._free.pop() for _ in range(count))
        for page in taken:
            self._references[page] = 1
        return taken

    def _drop(self, pages: tuple[int, ...] | list[int]) -> None:
        for page in reversed(pages):
            self._references[page] -= 1
            if not self._references[page]:
                self._free.append(page)

    def _set(self, slot: int, owned: tuple[int, ...]) -> None:
        self._owned[slot] = owned
        self._write(slot, owned)

    def _write(self, slot: int, owned: tuple[int, ...]) -> None:
        if owned:
            self.table[slot, : len(owned)] = torch.tensor(owned, dtype=torch.int32)

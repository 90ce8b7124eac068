"""Which sequence each row of a batch holds: slots and lengths, on the host and on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kivi_tvm import layout
from kivi_tvm.config import KiviConfig
from kivi_tvm.runtime.checks import outside_inference_mode

NO_SLOT = -1


@dataclass(slots=True)
class Row:
    """One sequence of the batch, or a free place in it.

    Parameters
    ----------
    slot : int
        Where its windows and its line of the page table lie; `NO_SLOT` while it is inactive.
    length : int
        Tokens stored, sinks included.
    values_from, keys_from : int
        Body tokens from which on full-precision values and keys were held after the last crop.
    refilled : int
        Tokens whose dequantized values were put in place of full-precision ones, by crops.
    """

    slot: int = NO_SLOT
    length: int = 0
    values_from: int = 0
    keys_from: int = 0
    refilled: int = 0


class Rows:
    """The rows of a cache. The host's record leads; `sync` brings the device's to it.

    A row's first `sink_tokens` tokens are its sinks, the others its *body*: a KIVI sequence of its
    own, whose tokens are counted from 0.

    Attributes
    ----------
    state : Tensor
        int32 `[S, 4]`, one line per slot: `layout.STATE_FIELDS` of the body.
    sink_state : Tensor
        The same of the sinks, which are never packed.
    slots : Tensor
        int32 `[B]`, `NO_SLOT` for inactive rows.
    one : Tensor
        int32 `[B]` of ones: the tokens that a decode step adds.
    """

    @outside_inference_mode
    def __init__(
        self,
        cfg: KiviConfig,
        batch_size: int,
        rollback: int,
        window: str,
        sink_tokens: int,
        device: torch.device,
    ) -> None:
        self._cfg, self._window, self._device = cfg, window, device
        self.rollback, self.sink_tokens = rollback, sink_tokens
        self.rows = [Row(slot) for slot in range(batch_size)]
        self.capacity = 0
        self.state = self.sink_state = torch.zeros(0, len(layout.STATE_FIELDS), dtype=torch.int32)
        self.grow(batch_size)
        self.resize()

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> list[int]:
        return [row.length for row in self.rows]

    @property
    def bodies(self) -> list[int]:
        """Body tokens of each row."""
        return [self.body(row.length) for row in self.rows]

    @property
    def active(self) -> list[bool]:
        return [row.slot != NO_SLOT for row in self.rows]

    @property
    def free_slots(self) -> list[int]:
        """Slots that no row uses, the lowest first."""
        used = {row.slot for row in self.rows}
        return [slot for slot in range(self.capacity) if slot not in used]

    @property
    def nbytes(self) -> int:
        tensors = (self.state, self.state_before, self.sink_state, self.sink_state_before)
        states = sum(x.untyped_storage().nbytes() for x in tensors)
        return states + self.slots.nbytes + self.one.nbytes

    def body(self, length: int) -> int:
        """Body tokens of a row of `length` tokens."""
        return max(0, length - self.sink_tokens)

    def bounds(self, row: Row) -> tuple[int, int]:
        """Body tokens from which on full-precision values and keys are held.

        A ring holds the last R + E tokens. Keys of a flushed block survive in a ring of their own
        (E > 0) or because the window keeps them (`window="exact"`).
        """
        length = self.body(row.length)
        kept = length - self._cfg.R - self.rollback
        values = max(row.values_from, kept)
        if self._window == "exact":
            return values, values
        if not self.rollback:
            return values, layout.packed_keys(self._cfg, length)
        return values, max(row.keys_from, kept)

    def snapshot(self) -> list[Row]:
        """The host's record as it is now."""
        return [replace(row) for row in self.rows]

    @outside_inference_mode
    def grow(self, capacity: int) -> None:
        """Make slots up to `capacity` available.

        A GPU meets rows without a slot as well: for number -1 there is a line of zeros before all.
        """
        shape = (1 + capacity, len(layout.STATE_FIELDS))
        tensors = [torch.zeros(shape, dtype=torch.int32, device=self._device)[1:] for _ in range(4)]
        tensors[0][: self.capacity] = self.state
        tensors[2][: self.capacity] = self.sink_state
        self.state, self.state_before, self.sink_state, self.sink_state_before = tensors
        self.capacity = capacity

    @outside_inference_mode
    def resize(self) -> None:
        """Make what is held per row as long as the batch."""
        one = torch.ones(len(self), dtype=torch.int32, device=self._device)
        self.slots, self.one = torch.empty_like(one), one
        self.sync_slots()

    def sync(self) -> None:
        """Tell the device what the host knows."""
        self.sync_state()
        self.sync_slots()

    def sync_slots(self) -> None:
        self.slots.copy_(self.tensor([row.slot for row in self.rows]))

    def sync_state(self) -> None:
        self.write(self.state, self.sink_state, self.lengths)

    def write(self, state: Tensor, sink_state: Tensor, lengths: Sequence[int]) -> None:
        """Set both states to what they are when the rows have `lengths` tokens."""
        body_lines = [[0] * 4 for _ in range(self.capacity)]
        sink_lines = [[0] * 4 for _ in range(self.capacity)]
        for row, length in zip(self.rows, lengths, strict=True):
            if row.slot != NO_SLOT:
                n = self.body(length)
                packed = layout.packed_keys(self._cfg, n), layout.packed_values(self._cfg, n)
                body_lines[row.slot] = [n, *packed, 0]
                sink_lines[row.slot][layout.LENGTH] = length - n
        state.copy_(self.tensor(body_lines))
        if self.sink_tokens:
            sink_state.copy_(self.tensor(sink_lines))

    def tensor(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._device)

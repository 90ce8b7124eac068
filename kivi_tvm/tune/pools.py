"""Page pools and rings as the reference fills them; everything else in them is poison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from kivi_tvm import layout, reference
from kivi_tvm.config import KiviConfig
from kivi_tvm.tune.measure import poisoned


class Pool:
    """Pages, rings and tables of several rows for kernels to be called on directly.

    Rows have permuted pages and slots; a row of length None is inactive (slot -1).

    Parameters
    ----------
    cfg : KiviConfig
    lengths : sequence of int or None
        Tokens of every row, after the call under test.
    rollback : int
        Further ring slots `E`.
    seed : int
        Of the permutations.
    """

    def __init__(
        self,
        cfg: KiviConfig,
        lengths: Sequence[int | None],
        rollback: int = 0,
        seed: int = 0,
    ) -> None:
        self.cfg, self.key, self.lengths = cfg, cfg.kernel_key(), list(lengths)
        self.ring = layout.ring_size(cfg, rollback)
        generator = torch.Generator().manual_seed(seed)
        num_slots = len(self.lengths) + 2
        order = torch.randperm(num_slots, generator=generator)[: len(self.lengths)]
        active = torch.tensor([n is not None for n in self.lengths])
        self.slots = torch.where(active, order, -1).int()
        counts = [0 if n is None else layout.num_pages(cfg, n) for n in self.lengths]
        ids = torch.randperm(sum(counts) + 2, generator=generator)
        self.pages = ids[: sum(counts)].split(counts)
        self.table = torch.full((num_slots, max(counts) + 1), layout.NO_PAGE, dtype=torch.int32)
        self.state = poisoned((num_slots, len(layout.STATE_FIELDS)), torch.int32)
        self.buffers = {
            name: poisoned(buffer.shape, torch_dtype(buffer.dtype))
            for name, buffer in (
                layout.page_buffers(cfg, len(ids)) | layout.ring_buffers(cfg, num_slots, rollback)
            ).items()
        }
        for row, slot, length in self.active():
            self.table[slot, : counts[row]] = self.pages[row].int()
            packed = layout.packed_keys(cfg, length), layout.packed_values(cfg, length)
            self.state[slot] = torch.tensor([length, *packed, 0], dtype=torch.int32)

    def active(self) -> list[tuple[int, int, int]]:
        """(row, slot, length) of every active row."""
        return [
            (row, int(self.slots[row]), length)
            for row, length in enumerate(self.lengths)
            if length is not None
        ]

    def args(self, *names: str) -> list[Tensor]:
        """Buffers as the kernels take them: words as uint32."""
        held = {
            name: self.buffers[name] if name in self.buffers else getattr(self, name)
            for name in names
        }
        return [x.view(torch.uint32) if name.endswith("code") else x for name, x in held.items()]

    def store_keys(self, k: Tensor) -> None:
        """Write the packed keys of `k [B, H_kv, T, D]` into the pages."""
        cfg = self.cfg
        for row, _, length in self.active():
            n = layout.packed_keys(cfg, length)
            if n == 0:
                continue
            found = reference.quantize_key(k[row, :, :n], cfg.key_bits, cfg.G_k)
            order = layout.key_order(self.key)
            words = reference.pack(found.code, cfg.key_bits, 2, order)  # [H_kv, n, D / W_k]
            page, at = self._place(row, torch.arange(n))
            self.buffers["k_code"][page, :, :, at] = words.movedim(1, 0)
            page, at = self._place(row, torch.arange(0, n, cfg.G_k))
            self.buffers["k_scale"][page, :, at // cfg.G_k] = found.scale.movedim(1, 0)
            self.buffers["k_zero"][page, :, at // cfg.G_k] = found.zero.movedim(1, 0)

    def store_values(self, v: Tensor) -> None:
        """Write the packed values of `v [B, H_kv, T, D]` into the pages."""
        cfg, order = self.cfg, layout.value_order(self.key)
        for row, _, length in self.active():
            n = layout.packed_values(cfg, length)
            if n == 0:
                continue
            found = reference.quantize_value(v[row, :, :n], cfg.value_bits, cfg.G_v)
            code = torch.nn.functional.pad(found.code, (0, 0, 0, -n % cfg.P))
            words = reference.pack(code, cfg.value_bits, 1, order)
            number = torch.arange(words.shape[1])  # of [H_kv, words of whole pages, D]
            number = number[order.element(number, 0) < n]
            page, at = self._place(row, number * order.codes_per_word)
            at = at // order.codes_per_word
            self.buffers["v_code"][page, :, at] = words[:, number].movedim(1, 0)
            page, at = self._place(row, torch.arange(n))
            self.buffers["v_scale"][page, :, :, at] = found.scale.movedim(1, 0)
            self.buffers["v_zero"][page, :, :, at] = found.zero.movedim(1, 0)

    def store_rings(self, k: Tensor, v: Tensor, write_back: bool = True) -> None:
        """Write the last tokens of every row into its rings."""
        for row, slot, length in self.active():
            token = torch.arange(max(0, length - self.ring), length)
            seen = k[row, :, :length].clone()
            n = layout.packed_keys(self.cfg, length)
            if write_back and n:
                seen[:, :n] = self.dense_keys(k, row).to(seen.dtype)
            self.buffers["k_ring"][slot][:, token % self.ring] = seen[:, token]
            self.buffers["v_ring"][slot][:, token % self.ring] = v[row][:, token]

    def store(self, k: Tensor, v: Tensor, write_back: bool = True) -> Self:
        """Write everything that the rows hold."""
        self.store_keys(k)
        self.store_values(v)
        self.store_rings(k, v, write_back)
        return self

    def dense_keys(self, k: Tensor, row: int) -> Tensor:
        """Dequantized packed keys of a row, float32 `[H_kv, packed_keys, D]`."""
        n = layout.packed_keys(self.cfg, self.lengths[row] or 0)
        if n == 0:
            return k.new_zeros(self.cfg.H_kv, 0, self.cfg.D).float()
        found = reference.quantize_key(k[row, :, :n], self.cfg.key_bits, self.cfg.G_k)
        return reference.dequantize(found, 1)

    def dense_values(self, v: Tensor, row: int) -> Tensor:
        """Dequantized packed values of a row, float32 `[H_kv, packed_values, D]`."""
        n = layout.packed_values(self.cfg, self.lengths[row] or 0)
        if n == 0:
            return v.new_zeros(self.cfg.H_kv, 0, self.cfg.D).float()
        found = reference.quantize_value(v[row, :, :n], self.cfg.value_bits, self.cfg.G_v)
        return reference.dequantize(found, 2)

    def _place(self, row: int, token: Tensor) -> tuple[Tensor, Tensor]:
        """Page and position in it of tokens of a row."""
        return self.pages[row][token // self.cfg.P], token % self.cfg.P


def torch_dtype(name: str) -> torch.dtype:
    """How a buffer is held: torch's uint32 lacks most operators."""
    found: torch.dtype = torch.int32 if name == "uint32" else getattr(torch, name)
    return found

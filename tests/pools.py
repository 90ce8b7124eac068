"""Page pools and rings as the reference fills them; everything else in them is poison."""

from __future__ import annotations

import torch

from kivi_tvm import layout, reference

POISON_WORD = 0x5A5A5A5A
# Quiet NaNs with a payload that no kernel and no cast produces: a write is always seen.
POISON_NAN = {
    torch.float16: (torch.int16, 0x7E5A),
    torch.bfloat16: (torch.int16, 0x7FDA),
    torch.float32: (torch.int32, 0x7FDA5A5A),
}


def poisoned(shape, dtype):
    """Memory that no result may depend on."""
    if dtype not in POISON_NAN:
        return torch.full(shape, POISON_WORD, dtype=dtype)
    held, word = POISON_NAN[dtype]
    return torch.full(shape, word, dtype=held).view(dtype)


def poison_(x):
    """Fill a tensor with poison, in place."""
    return x.copy_(poisoned((), x.dtype)) if x.numel() else x


def bits(x):
    """The bits of `x` as ints; every NaN that is not poison counts as one."""
    if x.dtype not in POISON_NAN:
        return x
    held, word = POISON_NAN[x.dtype]
    found = x.contiguous().view(held)
    return torch.where(x.isnan() & (found != word), torch.full_like(found, -1), found)


def assert_same_bits(found, expected, what=""):
    """Fail unless two tensors are equal bit for bit, poison included."""
    assert found.shape == expected.shape and found.dtype == expected.dtype, what
    wrong = bits(found) != bits(expected)
    where = [w.item() for w in wrong.nonzero()[0]] if wrong.any() else None
    assert where is None, f"{what}: {int(wrong.sum())} of {wrong.numel()} differ, first at {where}"


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

    def __init__(self, cfg, lengths, rollback=0, seed=0):
        self.cfg, self.lengths = cfg, list(lengths)
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
            name: poisoned(buffer.shape, _torch_dtype(buffer.dtype))
            for name, buffer in (
                layout.page_buffers(cfg, len(ids)) | layout.ring_buffers(cfg, num_slots, rollback)
            ).items()
        }
        for row, slot, length in self.active():
            self.table[slot, : counts[row]] = self.pages[row].int()
            packed = layout.packed_keys(cfg, length), layout.packed_values(cfg, length)
            self.state[slot] = torch.tensor([length, *packed, 0], dtype=torch.int32)

    def active(self):
        """(row, slot, length) of every active row."""
        return [
            (row, int(self.slots[row]), length)
            for row, length in enumerate(self.lengths)
            if length is not None
        ]

    def args(self, *names):
        """Buffers as the kernels take them: words as uint32."""
        held = {name: self.buffers.get(name, getattr(self, name, None)) for name in names}
        return [x.view(torch.uint32) if name.endswith("code") else x for name, x in held.items()]

    def store_keys(self, k):
        """Write the packed keys of `k [B, H_kv, T, D]` into the pages."""
        cfg = self.cfg
        for row, _, length in self.active():
            n = layout.packed_keys(cfg, length)
            if n == 0:
                continue
            found = reference.quantize_key(k[row, :, :n], cfg.key_bits, cfg.G_k)
            words = reference.pack(found.code, cfg.key_bits, 2)  # [H_kv, n, D / W_k]
            page, at = self._place(row, torch.arange(n))
            self.buffers["k_code"][page, :, :, at] = words.movedim(1, 0)
            page, at = self._place(row, torch.arange(0, n, cfg.G_k))
            self.buffers["k_scale"][page, :, at // cfg.G_k] = found.scale.movedim(1, 0)
            self.buffers["k_zero"][page, :, at // cfg.G_k] = found.zero.movedim(1, 0)

    def store_values(self, v):
        """Write the packed values of `v [B, H_kv, T, D]` into the pages."""
        cfg = self.cfg
        W = 32 // cfg.value_bits
        for row, _, length in self.active():
            n = layout.packed_values(cfg, length)
            if n == 0:
                continue
            found = reference.quantize_value(v[row, :, :n], cfg.value_bits, cfg.G_v)
            code = torch.nn.functional.pad(found.code, (0, 0, 0, -n % W))
            words = reference.pack(code, cfg.value_bits, 1)  # [H_kv, ceil(n / W_v), D]
            page, at = self._place(row, torch.arange(0, n, W))
            self.buffers["v_code"][page, :, at // W] = words.movedim(1, 0)
            page, at = self._place(row, torch.arange(n))
            self.buffers["v_scale"][page, :, :, at] = found.scale.movedim(1, 0)
            self.buffers["v_zero"][page, :, :, at] = found.zero.movedim(1, 0)

    def store_rings(self, k, v, write_back=True):
        """Write the last tokens of every row into its rings."""
        for row, slot, length in self.active():
            token = torch.arange(max(0, length - self.ring), length)
            seen = k[row, :, :length].clone()
            n = layout.packed_keys(self.cfg, length)
            if write_back and n:
                seen[:, :n] = self.dense_keys(k, row).to(seen.dtype)
            self.buffers["k_ring"][slot][:, token % self.ring] = seen[:, token]
            self.buffers["v_ring"][slot][:, token % self.ring] = v[row][:, token]

    def store(self, k, v, write_back=True):
        """Write everything that the rows hold."""
        self.store_keys(k)
        self.store_values(v)
        self.store_rings(k, v, write_back)
        return self

    def dense_keys(self, k, row):
        """Dequantized packed keys of a row, float32 `[H_kv, packed_keys, D]`."""
        n = layout.packed_keys(self.cfg, self.lengths[row])
        if n == 0:
            return k.new_zeros(self.cfg.H_kv, 0, self.cfg.D).float()
        found = reference.quantize_key(k[row, :, :n], self.cfg.key_bits, self.cfg.G_k)
        return reference.dequantize(found, 1)

    def dense_values(self, v, row):
        """Dequantized packed values of a row, float32 `[H_kv, packed_values, D]`."""
        n = layout.packed_values(self.cfg, self.lengths[row])
        if n == 0:
            return v.new_zeros(self.cfg.H_kv, 0, self.cfg.D).float()
        found = reference.quantize_value(v[row, :, :n], self.cfg.value_bits, self.cfg.G_v)
        return reference.dequantize(found, 2)

    def assert_equals(self, expected):
        """Fail unless every buffer, table and the state equal another pool's."""
        for name, buffer in expected.buffers.items():
            assert_same_bits(self.buffers[name], buffer, name)
        assert_same_bits(self.state, expected.state, "state")
        assert_same_bits(self.table, expected.table, "page_table")

    def _place(self, row, token):
        """Page and position in it of tokens of a row."""
        return self.pages[row][token // self.cfg.P], token % self.cfg.P


def _torch_dtype(name):
    return torch.int32 if name == "uint32" else getattr(torch, name)

"""One sequence's cache against the algorithm written another way."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kivi_tvm import KiviConfig
from kivi_tvm.reference import ReferenceRow, dequantize, quantize_key, quantize_value

R = 32
CFG = KiviConfig(
    head_dim=64, num_heads=2, num_kv_heads=1, group_size=16, residual_length=R, dtype="float32"
)
BFLOAT16 = KiviConfig(
    head_dim=64, num_heads=2, num_kv_heads=1, group_size=16, residual_length=R, dtype="bfloat16"
)
WINDOWS = st.sampled_from(["kivi", "exact"])


def drawn(tokens, dtype="float32", seed=0):
    generator = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, 1, tokens, 64, generator=generator).to(getattr(torch, dtype))
    return k, v


def fed(cfg, k, v, **options):
    row = ReferenceRow(cfg, **options)
    row.append(k, v)
    return row


def assert_sees(row, k, v):
    for found, expected in zip(row.visible(), (k, v)):
        assert torch.equal(found, expected.float())


def assert_alike(row, other):
    assert row.length == other.length
    assert_sees(row, *other.visible())


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 63, 64, 65, 100])
def test_algorithm_1_boundaries(length):
    """Packed keys are whole blocks of R, packed values all but the last R."""
    k, v = drawn(length)
    row = fed(CFG, k, v)
    assert (row.packed_keys, row.packed_values) == (length - length % 32, max(0, length - 32))
    k_seen, v_seen = row.visible()
    assert torch.equal(k_seen[:, row.packed_keys :], k[:, row.packed_keys :])
    assert torch.equal(v_seen[:, row.packed_values :], v[:, row.packed_values :])
    for packed, exact, seen, quantized, dim in (
        (row.packed_keys, k, k_seen, quantize_key, 1),
        (row.packed_values, v, v_seen, quantize_value, 2),
    ):
        if packed:
            codes = quantized(exact[:, :packed], 2, 16)
            assert torch.equal(seen[:, :packed], dequantize(codes, dim))


@given(st.integers(0, 100), st.integers(0, 40), WINDOWS, st.sampled_from([0, 5, 40]))
def test_streamed_equals_one_shot(prompt, streamed, window, sinks):
    k, v = drawn(prompt + streamed)
    options = {"window": window, "sink_tokens": sinks}
    other = fed(CFG, k[:, :prompt], v[:, :prompt], **options)
    for t in range(prompt, prompt + streamed):
        other.append(k[:, t : t + 1], v[:, t : t + 1])
    assert_alike(other, fed(CFG, k, v, **options))


def test_exact_window_keeps_flushed_keys():
    k, v = drawn(64)
    seen = {window: fed(CFG, k, v, window=window).visible()[0] for window in ("kivi", "exact")}
    assert torch.equal(seen["exact"][:, 32:], k[:, 32:])
    assert not torch.equal(seen["kivi"][:, 32:], k[:, 32:])
    assert torch.equal(seen["exact"][:, :32], seen["kivi"][:, :32])


@given(st.integers(0, 120), st.integers(1, 50), WINDOWS)
def test_after_the_sinks_a_row_is_one_of_its_own(length, sinks, window):
    k, v = drawn(length)
    row = fed(CFG, k, v, window=window, sink_tokens=sinks)
    body = fed(CFG, k[:, sinks:], v[:, sinks:], window=window)
    assert row.length == length
    assert_sees(
        row, *(torch.cat([x[:, :sinks], y], 1) for x, y in zip((k, v), body.visible(), strict=True))
    )


def test_keys_by_token_are_flushed_in_blocks():
    k, v = drawn(R + 5)
    row = fed(CFG, k, v, key_axis="token")
    codes = quantize_value(k[:, :R], CFG.key_bits, CFG.G_k)
    assert_sees(row, torch.cat([dequantize(codes, 2), k[:, R:]], 1), fed(CFG, k, v).visible()[1])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: ReferenceRow(CFG, key_axis="head"),
            ["`key_axis`", "['channel', 'token']", "head"],
        ),
        (
            lambda: ReferenceRow(
                KiviConfig(80, 1, 1, group_size=32, value_group_size=16), key_axis="token"
            ),
            ["`key_axis`", "head_dim=80", "32"],
        ),
        (lambda: fed(CFG, *drawn(3)).crop(4), ["`c`", "0..3", "4"]),
        (lambda: fed(CFG, *drawn(3)).crop(-1), ["`c`", "0..3", "-1"]),
    ],
    ids=["axis", "group size", "too many", "negative"],
)
def test_errors_name_the_rule(call, words):
    with pytest.raises(ValueError) as error:
        call()
    for word in words:
        assert word in str(error.value)


class Ledger:
    """A row as lists: what each token is, which ones are still held exactly.

    `k`, `v` are the data as later steps take it, stand-ins included; `k_coded` what the codes of
    packed keys were made from.
    """

    def __init__(self, cfg, window, rollback):
        self.cfg, self.window, self.rollback = cfg, window, rollback
        self.dtype = getattr(torch, cfg.dtype)
        self.k = self.k_coded = self.v = torch.zeros(1, 0, 64, dtype=self.dtype)
        self.held_keys, self.held_values = set(), set()

    @property
    def length(self):
        return self.k.shape[1]

    @property
    def packed(self):
        return self.length // R * R, max(0, self.length - R)

    def append(self, k, v):
        start = self.length
        self.k, self.v = torch.cat([self.k, k], 1), torch.cat([self.v, v], 1)
        self.k_coded = torch.cat([self.k_coded, k], 1)
        first = self.length - R - self.rollback
        first_key = self.packed[0] if self.window == "kivi" and not self.rollback else first
        new = set(range(start, self.length))
        self.held_keys = {t for t in self.held_keys | new if t >= first_key}
        self.held_values = {t for t in self.held_values | new if t >= first}

    def crop(self, c, k_seen, v_seen):
        self.k, self.v, self.k_coded = (
            x[:, : self.length - c].clone() for x in (self.k, self.v, self.k_coded)
        )
        keys, values = self.packed
        left = set(range(self.length))
        wanted = {t for t in left if t >= (keys if self.window == "kivi" else values)}
        no_keys = wanted - self.held_keys
        no_values = {t for t in left if t >= values} - self.held_values
        for t in no_keys:
            self.k[:, t] = k_seen[:, t].to(self.dtype)
        for t in no_values:
            self.v[:, t] = v_seen[:, t].to(self.dtype)
        self.k_coded[:, keys:] = self.k[:, keys:]
        self.held_keys = self.held_keys & left | no_keys
        self.held_values = self.held_values & left | no_values
        return len(no_keys | no_values)

    def visible(self):
        cfg, (keys, values) = self.cfg, self.packed
        k, v = (x.to(torch.float32, copy=True) for x in (self.k, self.v))
        if keys:
            codes = quantize_key(self.k_coded[:, :keys], cfg.key_bits, cfg.G_k)
            k[:, :keys] = dequantize(codes, 1)
        if values:
            codes = quantize_value(self.v[:, :values], cfg.value_bits, cfg.G_v)
            v[:, :values] = dequantize(codes, 2)
        k[:, values:] = (self.k if self.window == "exact" else k.to(self.dtype))[:, values:]
        return k, v


# Appended tokens, or (negative) tokens to crop.
STEPS = st.lists(st.one_of(st.integers(1, 70), st.integers(-70, -1)), min_size=2, max_size=12)


@given(STEPS, WINDOWS, st.sampled_from([0, 1, 7, 40]), st.sampled_from([CFG, BFLOAT16]))
def test_crop_refills_what_is_no_longer_held(steps, window, rollback, cfg):
    k, v = drawn(sum(n for n in steps if n > 0), cfg.dtype)
    row, ledger = ReferenceRow(cfg, window, rollback), Ledger(cfg, window, rollback)
    used = refilled = 0
    for n in steps:
        if n > 0:
            new = k[:, used : used + n], v[:, used : used + n]
            row.append(*new)
            ledger.append(*new)
            used += n
        else:
            c = min(-n, row.length)
            found = ledger.crop(c, *row.visible())
            assert row.crop(c) == found
            refilled += found
        assert row.length == ledger.length
        assert_sees(row, *ledger.visible())
    assert row.refilled == refilled


@given(STEPS, WINDOWS, st.sampled_from([1, 7, 40]), st.sampled_from([0, 5, 50]))
def test_crop_within_the_rollback_leaves_no_trace(steps, window, rollback, sinks):
    """A row equals one that never saw the removed tokens, again and again."""
    options = {"window": window, "rollback": rollback, "sink_tokens": sinks}
    k, v = drawn(sum(n for n in steps if n > 0))
    row, kept, used, longest = ReferenceRow(CFG, **options), [], 0, 0
    for n in steps:
        if n > 0:
            row.append(k[:, used : used + n], v[:, used : used + n])
            kept += range(used, used + n)
            used, longest = used + n, max(longest, row.length)
        else:
            c = min(-n, row.length, row.length - max(0, longest - rollback))
            assert row.crop(c) == 0
            kept = kept[: len(kept) - c]
        assert_alike(row, fed(CFG, k[:, kept], v[:, kept], **options))


def test_crop_to_nothing_and_into_the_sinks():
    k, v = drawn(100)
    row = fed(CFG, k, v, sink_tokens=8)
    row.crop(95)
    assert_sees(row, k[:, :5], v[:, :5])
    row.append(k[:, 5:], v[:, 5:])
    assert_alike(row, fed(CFG, k, v, sink_tokens=8))
    row.crop(100)
    assert row.length == 0


def test_stand_ins_are_stored_values():
    """Without rollback the open block and the window's values come back from the codes."""
    k, v = drawn(100, "bfloat16")
    row = fed(BFLOAT16, k, v)
    k_seen, v_seen = row.visible()
    assert row.crop(30) == 32  # values of the window [38, 68) and keys of the open block [64, 70)
    k_after, v_after = row.visible()
    assert torch.equal(v_after[:, 38:68], v_seen[:, 38:68].bfloat16().float())
    assert torch.equal(v_after[:, 68:], v[:, 68:70].float())
    assert torch.equal(k_after[:, 64:], k_seen[:, 64:70].bfloat16().float())

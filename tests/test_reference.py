"""The oracle itself: by hand, by property, and against the algorithm written another way."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kivi_tvm import KiviConfig
from kivi_tvm.config import BITS
from kivi_tvm.reference import (
    FLOAT16_MAX,
    ReferenceCache,
    ReferenceRow,
    attention,
    dequantize,
    pack,
    quantize,
    quantize_key,
    quantize_value,
    unpack,
)

SEEDS = st.integers(0, 2**31)


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(group, bits):
    """One group in Python floats, as the design's section 2 says it."""
    low, high, levels = min(group), max(group), 2**bits - 1
    zero = torch.tensor(low).half().item()
    scale = (torch.tensor(high - low) / levels).half().item()
    ratio = [(torch.tensor(x) - zero) / torch.tensor(scale) for x in group]
    return [int(min(max(round(r.item()), 0), levels)) for r in ratio], scale, zero


@given(SEEDS, st.sampled_from(BITS))
def test_a_group_by_hand(seed, bits):
    x = drawn(seed, 16)
    found = quantize(x, bits, 16, 0)
    code, scale, zero = by_hand(x.tolist(), bits)
    assert found.code.tolist() == code
    assert (found.scale.item(), found.zero.item()) == (scale, zero)


@given(SEEDS, st.sampled_from(BITS), st.sampled_from([16, 32]), st.sampled_from([1e-3, 1.0, 50.0]))
def test_error_is_half_a_step(seed, bits, group_size, size):
    x = size * drawn(seed, 64, 3)
    found = quantize(x, bits, group_size, 0)
    step = found.scale.float().repeat_interleave(group_size, 0)
    # Half a step, and what rounding zero and scale to float16 may add.
    slack = x.abs().max() * 2**-10 + 2**-14
    assert ((dequantize(found, 0) - x).abs() <= 0.5 * step * 1.001 + slack).all()


@given(SEEDS, st.sampled_from(BITS))
def test_codes_are_idempotent(seed, bits):
    """Quantizing dequantized values gives the same values where the whole range is used."""
    first = quantize(drawn(seed, 32, 8), bits, 32, 0)
    once = dequantize(first, 0)
    second = quantize(once, bits, 32, 0)
    full = (first.code == 0).any(0) & (first.code == 2**bits - 1).any(0)
    assert full.any()
    assert torch.equal(second.code[:, full], first.code[:, full])
    twice = dequantize(second, 0)[:, full]
    torch.testing.assert_close(twice, once[:, full], rtol=2**-10, atol=2**-14)


def test_half_to_even():
    x = torch.tensor([0.0, 0.5, 1.5, 2.5, 3.0, 3.0, 3.0, 3.0])
    assert quantize(x, 2, 8, 0).code.tolist() == [0, 0, 2, 2, 3, 3, 3, 3]


@pytest.mark.parametrize("bits", BITS)
def test_special_groups(bits):
    x = torch.zeros(7, 16)
    x[0] = 2.5  # constant
    x[1, 3] = math.nan
    x[2, 5] = math.inf
    x[3] = torch.linspace(0, 1e-8, 16)  # scale below float16
    x[4, 0], x[4, 1] = -1e6, 1e6  # beyond float16
    x[5] = -0.0
    x[6, ::2] = -0.0
    found = quantize(x, bits, 16, 1)
    assert (found.code[[0, 1, 2, 3, 5, 6]] == 0).all()
    assert (found.scale[0], found.zero[0]) == (0, 2.5)
    assert found.scale[1:3].isnan().all() and found.zero[1:3].isnan().all()
    assert found.scale[3] == 0
    assert found.zero[4] == -FLOAT16_MAX and found.scale[4].item() <= FLOAT16_MAX
    for special in (found.zero[5:], found.scale[5:]):
        assert not special.signbit().any()


@given(SEEDS, st.sampled_from(BITS), st.integers(0, 2))
def test_pack_and_unpack_are_inverse(seed, bits, dim):
    shape = (32, 32, 32)
    code = torch.randint(
        0, 2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    words = pack(code, bits, dim)
    assert words.dtype == torch.int32 and words.shape[dim] == bits
    assert torch.equal(unpack(words, bits, dim), code)


def test_low_bits_first():
    code = torch.zeros(16, dtype=torch.uint8)
    code[0], code[1], code[15] = 1, 2, 3
    assert pack(code, 2, 0).tolist() == [1 + (2 << 2) + (3 << 30) - (1 << 32)]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: quantize(torch.zeros(30), 2, 16, 0), ["`group_size`", "30", "16"]),
        (lambda: pack(torch.zeros(30, dtype=torch.uint8), 2, 0), ["multiple of 16", "30"]),
        (lambda: pack(torch.zeros(16, dtype=torch.uint8), 2, 0, "odd"), ["`pack_order`", "'odd'"]),
    ],
)
def test_errors_name_the_rule(call, words):
    with pytest.raises(ValueError) as error:
        call()
    for word in words:
        assert word in str(error.value)


def test_keys_by_channel_and_values_by_token():
    x = drawn(0, 2, 64, 32)
    assert quantize_key(x, 2, 32).scale.shape == (2, 2, 32)
    assert quantize_value(x, 2, 16).scale.shape == (2, 64, 2)


@pytest.mark.parametrize("M", [1, 4, 7])
def test_attention_equals_torch(M):
    q, k, v = drawn(1, 2 * M, 16), drawn(2, 2, 50, 16), drawn(3, 2, 50, 16)
    out, lse = attention(q, k, v)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q[None, :, None], k[None], v[None], enable_gqa=True
    )
    torch.testing.assert_close(out, expected[0, :, 0])
    score = q @ k.repeat_interleave(M, 0).mT / 4  # [2M, 2M, 50]: head i against its own keys
    own = torch.stack([score[i, i] for i in range(2 * M)])
    torch.testing.assert_close(lse, own.logsumexp(-1))


CFG = KiviConfig(
    head_dim=64, num_heads=2, num_kv_heads=1, group_size=16, residual_length=32, dtype="float32"
)


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 63, 64, 65, 100])
def test_algorithm_1_boundaries(length):
    """Packed keys are whole blocks of R, packed values all but the last R."""
    k, v = drawn(4, 1, length, 64), drawn(5, 1, length, 64)
    row = ReferenceRow(CFG)
    row.append(k, v)
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


@given(st.integers(0, 100), st.integers(0, 40), st.sampled_from(["kivi", "exact"]))
def test_streamed_equals_one_shot(prompt, streamed, window):
    length = prompt + streamed
    k, v = drawn(6, 1, length, 64), drawn(7, 1, length, 64)
    one, other = ReferenceRow(CFG, window), ReferenceRow(CFG, window)
    one.append(k, v)
    other.append(k[:, :prompt], v[:, :prompt])
    for t in range(prompt, length):
        other.append(k[:, t : t + 1], v[:, t : t + 1])
    for a, b in zip(one.visible(), other.visible(), strict=True):
        assert torch.equal(a, b)


def test_exact_window_keeps_flushed_keys():
    k, v = drawn(8, 1, 64, 64), drawn(9, 1, 64, 64)
    seen = {}
    for window in ("kivi", "exact"):
        row = ReferenceRow(CFG, window)
        row.append(k, v)
        seen[window] = row.visible()[0]
    assert torch.equal(seen["exact"][:, 32:], k[:, 32:])
    assert not torch.equal(seen["kivi"][:, 32:], k[:, 32:])
    assert torch.equal(seen["exact"][:, :32], seen["kivi"][:, :32])


def test_rows_are_independent():
    k, v, q = drawn(10, 2, 1, 50, 64), drawn(11, 2, 1, 50, 64), drawn(12, 2, 2, 64)
    cache = ReferenceCache(CFG, 2)
    cache.prefill(k, v, [50, 7])
    out, lse = cache.attend(q)
    for row, n in enumerate((50, 7)):
        alone = ReferenceCache(CFG, 1)
        alone.prefill(k[row : row + 1, :, :n], v[row : row + 1, :, :n])
        one, one_lse = alone.attend(q[row : row + 1])
        assert torch.equal(one[0], out[row]) and torch.equal(one_lse[0], lse[row])

"""Quantization, packing and attention: by hand, by property, and against torch."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kivi_tvm.config import BITS
from kivi_tvm.layout import pack_order
from kivi_tvm.reference import (
    FLOAT16_MAX,
    attention,
    dequantize,
    pack,
    quantize,
    quantize_key,
    quantize_value,
    repack,
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
    shape = (64, 64, 64)
    code = torch.randint(
        0, 2**bits, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )
    plain = pack_order("plain", bits, 64)
    orders = [pack_order("bytes", bits, span) for span in (16, 64) if span % (32 // bits) == 0]
    orders += [pack_order("fragment", bits, 64, run) for run in (2, 4, 8) if run <= 32 // bits]
    for order in [plain, *orders]:
        words = pack(code, bits, dim, order)
        assert words.dtype == torch.int32 and words.shape[dim] == 2 * bits
        assert torch.equal(unpack(words, bits, dim, order), code)
        assert torch.equal(repack(words, dim, order, plain), pack(code, bits, dim))


def test_low_bits_first():
    code = torch.zeros(16, dtype=torch.uint8)
    code[0], code[1], code[15] = 1, 2, 3
    assert pack(code, 2, 0).tolist() == [1 + (2 << 2) + (3 << 30) - (1 << 32)]


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: quantize(torch.zeros(30), 2, 16, 0), ["`group_size`", "30", "16"]),
        (lambda: pack(torch.zeros(30, dtype=torch.uint8), 2, 0), ["multiple of 16", "30"]),
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


def test_keys_by_token_are_quantized_as_values():
    x = drawn(0, 2, 64, 32)
    for found, expected in zip(quantize_key(x, 2, 16, "token"), quantize_value(x, 2, 16)):
        assert torch.equal(found, expected)


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

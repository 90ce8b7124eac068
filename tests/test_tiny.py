"""The whole path on one page: build, prefill, decode, compare. Start here."""

import torch
from tolerance import assert_close

from kivi_tvm import KiviConfig, build
from kivi_tvm.reference import ReferenceCache


def test_a_cache_from_build_to_answer():
    cfg = KiviConfig(head_dim=64, num_heads=4, num_kv_heads=2, dtype="float32", residual_length=32)
    cache, reference = build(cfg).new_cache(batch_size=2), ReferenceCache(cfg, batch_size=2)
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    # Two prompts of 75 and 10 tokens, padded on the right.
    k, v, lengths = draw(2, 2, 75, 64), draw(2, 2, 75, 64), [75, 10]
    cache.prefill(k, v, lengths)
    reference.prefill(k, v, lengths)

    # 30 tokens more: row 0 reaches 96 and row 1 reaches 32, where a block of keys is quantized.
    for _ in range(30):
        q, k_new, v_new = draw(2, 4, 64), draw(2, 2, 64), draw(2, 2, 64)
        out = cache.decode(q, k_new, v_new)
        assert_close(out, reference.decode(q, k_new, v_new))

    # What is stored equals the reference bit for bit.
    assert cache.lengths == [105, 40]
    k_dense, v_dense = cache.dequantize()
    for row, length in enumerate(cache.lengths):
        k_seen, v_seen = reference.rows[row].visible()
        assert torch.equal(k_dense[row, :, :length], k_seen)
        assert torch.equal(v_dense[row, :, :length], v_seen)

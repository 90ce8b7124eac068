"""Compute modes through the cache: the same stored bits, read in another arithmetic."""

from dataclasses import replace

import pytest
from caches import assert_same_contents
from configurations import module
from inputs import draw
from tolerance import assert_close, limit

from kivi_tvm.config import INTEGER_MODES, KiviConfig
from kivi_tvm.reference import ReferenceCache

FLOAT = KiviConfig(64, 8, 2, value_bits=4, residual_length=32, dtype="float32", compute="float")
LENGTHS = [1500, 77]
STEPS = 6


@pytest.mark.parametrize("compute", INTEGER_MODES)
def test_decode_and_extend(compute):
    cfg = replace(FLOAT, compute=compute)
    made = module(cfg)
    assert made.manifest["compute"] == compute
    inputs = draw(cfg, max(LENGTHS), LENGTHS, steps=STEPS)
    bound = limit(inputs.q.dtype, compute=compute)
    expected = ReferenceCache(cfg, len(LENGTHS))
    caches = [each.new_cache(1, len(LENGTHS)) for each in (made, module(FLOAT))]
    expected.prefill(inputs.k, inputs.v, LENGTHS)
    for cache in caches:
        cache.prefill(inputs.k, inputs.v, lengths=LENGTHS)
    for step in range(2):
        token = inputs.q[step], inputs.k_new[step], inputs.v_new[step]
        want = expected.decode(*token)
        for cache in caches:
            assert_close(cache.decode(*token), want, bound=bound)
    tokens = [x[2:].movedim(0, 2) for x in (inputs.q, inputs.k_new, inputs.v_new)]
    found, plain = (cache.extend(*tokens) for cache in caches)
    assert_close(found, plain, bound=bound)
    for row in range(len(LENGTHS)):
        assert_same_contents(caches[0], row, caches[1], row)

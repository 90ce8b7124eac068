"""Compute modes through the cache: the same stored bits, read in another arithmetic."""

from dataclasses import replace
from statistics import mean

import pytest
import torch
from caches import assert_same_contents
from configurations import module
from inputs import draw
from tolerance import assert_close, limit, relative_l2

from kivi_tvm import build, load, targets
from kivi_tvm.config import INTEGER_MODES, KiviConfig
from kivi_tvm.reference import ReferenceCache, attention

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


@pytest.mark.parametrize(
    ("size", "share", "error"), [(1, 0.1, 0.04), (10, 0.25, 0.15), (100, 0.25, 0.15)]
)
def test_int8_beside_what_quantization_brings(size, share, error):
    """As the README says, also where two channels of keys are so many times as large."""
    cfg = KiviConfig(64, 8, 2, dtype="float32", compute="int8")
    shares, errors = [], []
    for seed in range(4):
        inputs = draw(cfg, 1200, seed=seed, steps=1)
        (q,), (k_new,), (v_new,), k, v = inputs.q, inputs.k_new, inputs.v_new, inputs.k, inputs.v
        for x in (k, k_new):
            x[..., [seed, 40 + seed]] *= size
        caches = module(cfg).new_cache(), ReferenceCache(cfg, 1)
        for cache in caches:
            cache.prefill(k, v)
        out, rounded = (cache.decode(q, k_new, v_new).double() for cache in caches)
        k, v = (
            torch.cat([old, new[:, :, None]], 2)[0].double()
            for old, new in ((k, k_new), (v, v_new))
        )
        exact, _ = attention(q[0].double(), k, v)
        shares.append(((out - rounded).norm() / (rounded - exact).norm()).item())
        errors.append(relative_l2(out, rounded))
    assert mean(shares) <= share
    assert mean(errors) <= error


def test_auto_takes_the_mode_that_the_processor_serves_best():
    """Integers where the processor multiplies bytes, close to what "float" would give beside."""
    cfg = replace(FLOAT, dtype="float16", compute="auto")
    fast = targets.hardware(targets.resolve("native")).byte_dot is not None
    made, plain = build(cfg), build(replace(cfg, compute="float"))
    assert made.manifest["compute"] == ("int8" if fast else "float")
    assert made.cfg == cfg and build(replace(cfg, dtype="float32")).manifest["compute"] == "float"
    inputs = draw(cfg, max(LENGTHS), LENGTHS)
    found = []
    for module_of in (made, plain):
        cache = module_of.new_cache(1, len(LENGTHS))
        cache.prefill(inputs.k, inputs.v, lengths=LENGTHS)
        found.append(cache.decode(inputs.q[0], inputs.k_new[0], inputs.v_new[0]))
    assert_close(*found, bound=limit(torch.float16, compute=made.manifest["compute"]))


def test_auto_is_saved_and_loaded(tmp_path):
    made = build(replace(FLOAT, dtype="float16", compute="auto"))
    made.save(tmp_path / "kernels.so")
    loaded = load(tmp_path / "kernels.so")
    assert loaded.cfg == made.cfg and loaded.manifest["compute"] == made.manifest["compute"]

"""From a kernel key to one module with every operator, and the whole path over the grid."""

import random

import pytest
import torch
import tvm
from configurations import POINTS, Point, config, config_id, grid, pairs_of, pairs_of_all
from inputs import draw
from tolerance import assert_close

from kivi_tvm import targets
from kivi_tvm.compile import compile_kernels, scheduled_module
from kivi_tvm.ops import FUNCTIONS
from kivi_tvm.reference import ReferenceCache
from kivi_tvm.runtime.library import Library
from kivi_tvm.runtime.module import Module

SAMPLE = 40


def test_every_operator_is_in_the_module():
    key = config(POINTS[2]).kernel_key()
    mod = scheduled_module(key, targets.resolve("native"))
    assert {var.name_hint for var in mod.get_global_vars()} == set(FUNCTIONS)
    for name in FUNCTIONS:
        assert mod[name].attrs["global_symbol"] == name


def test_the_same_key_gives_the_same_code():
    """Nothing in the factories depends on what was built before."""
    key, target = config(POINTS[2]).kernel_key(), targets.resolve("native")
    tvm.ir.assert_structural_equal(scheduled_module(key, target), scheduled_module(key, target))


def sample():
    """What the fast tests do not cover pair by pair, then points drawn from the grid."""
    rng = random.Random(0)
    points = grid()
    chosen, missing = [], pairs_of_all(points) - pairs_of_all(POINTS)
    while missing:
        best = max(rng.sample(points, 2000), key=lambda point: len(pairs_of(point) & missing))
        missing -= pairs_of(best)
        chosen.append(best)
    return chosen + rng.sample(points, SAMPLE)


def test_the_sample_completes_the_pairs():
    assert pairs_of_all(sample() + POINTS) == pairs_of_all(grid())
    assert all(isinstance(point, Point) and point.is_valid for point in sample())


@pytest.mark.slow
@pytest.mark.parametrize("cfg", [config(point) for point in sample()], ids=config_id)
def test_grid(cfg):
    """Compiled in process, so that the grid does not fill the cache on disk."""
    kernels = compile_kernels(cfg.kernel_key(), targets.resolve("native"))
    library = Library(kernels.executable, "in-process")
    cache = Module(cfg, library, kernels.manifest(), "in-process", kernels).new_cache(batch_size=3)
    reference = ReferenceCache(cfg, 3)
    lengths = [400, cfg.R - 1, 0]
    inputs = draw(cfg, 400, lengths, data="outlier", steps=3)
    cache.prefill(inputs.k, inputs.v, lengths)
    reference.prefill(inputs.k, inputs.v, lengths)
    for q, k_new, v_new in zip(inputs.q, inputs.k_new, inputs.v_new, strict=True):
        out = cache.decode(q, k_new, v_new)
        assert_close(out, reference.decode(q, k_new, v_new), what="out")
    for row, expected in enumerate(reference.rows):
        for found, want in zip(cache.dequantize(), expected.visible(), strict=True):
            assert torch.equal(found[row, :, : expected.length], want.to(found.dtype))

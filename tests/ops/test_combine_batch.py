"""`combine_batch` gives the bits of `combine_window`, whatever rows there are."""

import configurations
import pytest
from configurations import HALF, config_id
from emulated_cuda import EmulatedLibrary
from ops.test_combine_window import SOME, check
from pools import assert_same_bits


@pytest.mark.parametrize(
    "cfg",
    [pytest.param(x, marks=[] if x in SOME else pytest.mark.slow, id=config_id(x)) for x in HALF],
)
def test_the_same_bits(cfg, request):
    kernels = request.config.getoption("--kernels")
    if kernels == "opencl":
        pytest.skip("needs a CPU or tensor cores")
    library = EmulatedLibrary(cfg.kernel_key()) if kernels == "cpu" else configurations.library(cfg)
    R, split = cfg.R, cfg.kernel_key().split_tokens
    # sums of one tile, of several, of partial results alone, and of nothing
    for lengths in ([R + 9 * split + 1, None, R - 1, 0, R + 1, 1], [2 * R + 5], [17]):
        found = [
            check(cfg, lambda _, name=name: library[name], lengths, rollback=rollback)
            for name in ("combine_batch", "combine_window")
            for rollback in (0, 32)
        ]
        for other in found[1:]:
            for one, two in zip(found[0], other, strict=True):
                assert_same_bits(one, two)

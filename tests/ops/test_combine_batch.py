"""`combine_batch` and `combine_few` give the bits of `combine_window`, whatever rows there are."""

from dataclasses import replace

import configurations
import pytest
from configurations import HALF, config_id, slow_but
from emulated_cuda import TARGET, EmulatedLibrary
from ops.test_combine_window import SOME, check
from pools import assert_same_bits

from kivi_tvm.compile import functions

NARROW = [cfg for cfg in HALF if cfg.D <= 128]
SHORT_WINDOWS = [replace(cfg, residual_length=32) for cfg in NARROW if cfg.key_group_size <= 32]


def library(cfg, request):
    """The functions of a configuration."""
    kernels = request.config.getoption("--kernels")
    if kernels == "opencl":
        pytest.skip("needs a CPU or tensor cores")
    return EmulatedLibrary(cfg.kernel_key()) if kernels == "cpu" else configurations.library(cfg)


def compare(kernels, cfg, lengths, **ways):
    """Every function and way gives the same bits; `ways` are arguments of `check` to try."""
    found = [
        check(cfg, lambda _, name=name: kernels[name], lengths, **{way: value})
        for name in ("combine_window", "combine_batch", "combine_few")
        if name in functions(cfg.kernel_key(), TARGET)
        for way, values in ways.items()
        for value in values
    ]
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert_same_bits(one, two)


@pytest.mark.parametrize("cfg", slow_but(SOME[:1], NARROW))
def test_the_same_bits(cfg, request):
    kernels, R, split = library(cfg, request), cfg.R, cfg.kernel_key().split_tokens
    # sums of one tile, of several, of partial results alone, and of nothing
    for lengths in ([R + 9 * split + 1, None, R - 1, 0, R + 1, 1], [2 * R + 5], [17]):
        compare(kernels, cfg, lengths, rollback=(0, 32))


@pytest.mark.parametrize("cfg", SHORT_WINDOWS[:2], ids=config_id)
def test_short_windows_and_rows_use_few_sums(cfg, request):
    """And give the bits that they give beside longer rows."""
    kernels, R, split = library(cfg, request), cfg.R, cfg.kernel_key().split_tokens
    lengths = [R + 30, None, R - 1, 0, R + 1, 1, 17, R + split // 2]
    compare(kernels, cfg, lengths, spare=(1, 2), rollback=(0, 32))
    compare(kernels, cfg, [*lengths, R + 3 * split], rollback=(0, 32))

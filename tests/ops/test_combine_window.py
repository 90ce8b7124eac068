"""`combine_window` against float64 attention over the window and what partial results stand for."""

import math
from dataclasses import replace

import configurations
import pytest
import torch
from configurations import CONFIGS, FEW, HALF, config_id, slow_but
from emulated_cuda import TARGET, EmulatedKernel, EmulatedLibrary
from inputs import ATTENDED_DATA, draw, strided_queries
from ops.plain import plain_kernel
from ops.test_attend import splits_of
from pools import Pool, poisoned
from tolerance import assert_close

from kivi_tvm.compile import scheduled_function

SOME = HALF[::5]
NAMES = ("k_ring", "v_ring", "state", "slots")


@pytest.fixture
def kernel(request):
    """The function of a configuration; the operator as it is on CPUs, which have no schedule.

    In mode "half" not for bfloat16, whose bits TVM does not give on CPUs: its CUDA source is run.
    """
    if request.config.getoption("--kernels") == "cpu":
        return operator
    return lambda cfg: configurations.library(cfg)["combine_window"]


def operator(cfg):
    key = cfg.kernel_key()
    if key.compute == "half" and cfg.dtype == "bfloat16":
        return EmulatedLibrary(key)["combine_window"]
    return plain_kernel("combine_window", key)


def partial_results(cfg, pool, spare, spread=3.0):
    """Statistics and accumulators of every split, poisoned where there are none."""
    B, packed = len(pool.lengths), [max(0, (length or 0) - cfg.R) for length in pool.lengths]
    counts = [len(splits_of(cfg, tokens)) for tokens in packed]
    entries = max(counts) + spare
    acc = poisoned((B, cfg.H, entries, cfg.D), torch.float32)
    stat = poisoned((B, cfg.H, entries, 2), torch.float32)
    generator = torch.Generator().manual_seed(max(counts))
    for row, count in enumerate(counts):
        acc[row, :, :count] = torch.randn(cfg.H, count, cfg.D, generator=generator)
        stat[row, :, :count, 0] = spread * torch.randn(cfg.H, count, generator=generator)
        stat[row, :, :count, 1] = 1 + torch.rand(cfg.H, count, generator=generator)
    return acc, stat, counts


def expected(cfg, q, k, v, acc, stat, scale):
    """Output `[H, D]` and log-sum-exp `[H]` in float64; `k, v [H_kv, t, D]` are the window."""
    score = q.double().unflatten(0, (cfg.H_kv, -1)) @ k.double().mT * scale
    score, value = score.flatten(0, 1), v.double().repeat_interleave(cfg.M, 0)
    mass, level = stat[..., 1].double(), stat[..., 0].double() * math.log(2)
    lse = torch.cat([score, level + mass.log()], 1).logsumexp(1)
    out = torch.einsum("ht,htd->hd", (score - lse[:, None]).exp(), value)
    return out + torch.einsum("hx,hxd->hd", (level - lse[:, None]).exp(), acc.double()), lse


def check(cfg, kernel, lengths, data="normal", rollback=0, scale=None, spare=2):
    inputs = draw(cfg, max(n or 0 for n in lengths), lengths, data=data)
    scale = cfg.D**-0.5 if scale is None else scale
    pool = Pool(cfg, lengths, rollback)
    pool.store_rings(inputs.k, inputs.v, write_back=False)
    acc, stat, counts = partial_results(cfg, pool, spare)
    dtype = getattr(torch, cfg.dtype)
    room = poisoned((cfg.H, len(lengths), cfg.D + 4), dtype)
    out, lse = room[..., : cfg.D].movedim(0, 1), poisoned((len(lengths), cfg.H), torch.float32)
    split = cfg.kernel_key().split_tokens
    q = strided_queries(inputs.q[0], cfg.compute)
    kernel(cfg)(*pool.args(*NAMES), q, scale, split, acc, stat, out, lse)
    assert room[..., cfg.D :].isnan().all()
    for row, length in enumerate(lengths):
        if not length:
            assert (out[row] == 0).all() and (lse[row] == -math.inf).all()
            continue
        window = slice(max(0, length - cfg.R), length)
        k, v = inputs.k[row, :, window], inputs.v[row, :, window]
        part = slice(counts[row])
        want = expected(cfg, q[row], k, v, acc[row, :, part], stat[row, :, part], scale)
        worst = want[1].abs().max().item()
        assert_close(out[row], want[0], dtype, worst, what=f"row {row}")
        assert_close(lse[row], want[1], torch.float32, worst, what=f"row {row} lse")
    return out, lse


@pytest.mark.parametrize("cfg", slow_but([*CONFIGS, *HALF[1::3]], [*CONFIGS, *HALF]))
def test_ragged_rows(cfg, kernel, request):
    if cfg.compute == "half" and request.config.getoption("--kernels") == "opencl":
        pytest.skip("needs a CPU or tensor cores")
    R, split = cfg.R, cfg.kernel_key().split_tokens
    check(cfg, kernel, [R + 3 * split, None, R + split + 1, 5, R + 1, 0, R - 1])


@pytest.mark.parametrize("data", ATTENDED_DATA)
@pytest.mark.parametrize("cfg", FEW, ids=config_id)
def test_data(cfg, kernel, data):
    check(cfg, kernel, [cfg.R + 40, 33], data)


@pytest.mark.parametrize("rollback", [1, 32])
@pytest.mark.parametrize("cfg", FEW, ids=config_id)
def test_slots_behind_the_window_are_not_read(cfg, kernel, rollback):
    R = cfg.R
    check(cfg, kernel, [R - 1, R, None, 2 * R + 33, 500], rollback=rollback, scale=-0.1)


@pytest.mark.cpu
@pytest.mark.parametrize("cfg", slow_but(SOME, HALF))
def test_cuda_source_in_mode_half(cfg):
    library = EmulatedLibrary(cfg.kernel_key())
    R, split = cfg.R, cfg.kernel_key().split_tokens
    for lengths in ([R + split + 1, None, R - 1, 0, R + 1, 1], [2 * R + 5]):
        check(cfg, lambda _: library["combine_window"], lengths)


@pytest.mark.cpu
@pytest.mark.slow
@pytest.mark.parametrize("decisions", [{"row_tile": 1, "warps": 2}, {"row_tile": 8, "warps": 4}])
def test_choices_in_mode_half(decisions):
    cfg = replace(HALF[1], num_heads=8 * HALF[1].num_kv_heads)
    kernel = EmulatedKernel(
        scheduled_function("combine_window", cfg.kernel_key(), TARGET, decisions).mod
    )
    check(cfg, lambda _: kernel, [cfg.R + 500, None, cfg.R - 1])


@pytest.mark.parametrize("length", [300, 2048, 2049, 4096, 4097, 8192])
def test_parts_of_short_rows_in_mode_half(kernel, length, request):
    if request.config.getoption("--kernels") == "opencl":
        pytest.skip("needs a CPU or tensor cores")
    cfg = replace(FEW[0], compute="half", page_size=64)
    check(cfg, kernel, [cfg.R + length])


def test_more_partial_results_than_a_chunk(kernel):
    cfg = FEW[0]
    check(cfg, kernel, [cfg.R + 70 * cfg.kernel_key().split_tokens])

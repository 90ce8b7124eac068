"""`attend_batch` gives the bits of `attend` and `combine_window`, of rows that are one part."""

import math
from dataclasses import replace

import pytest
import torch
from configurations import HALF, config_id, slow_but
from emulated_cuda import TARGET, EmulatedKernel, EmulatedLibrary
from inputs import ATTENDED_DATA, draw, strided_queries
from ops.partials import Partials
from ops.test_attend import NAMES, work_items
from ops.test_combine_batch import NARROW, SHORT_WINDOWS, library
from pools import Pool, assert_same_bits, poisoned

from kivi_tvm.compile import scheduled_function
from kivi_tvm.layout import one_part_tokens, value_order
from kivi_tvm.ops.fragments import TOKENS

SOME = HALF[::5]
PAGED, RINGS, ROWS = NAMES[:7], ("k_ring", "v_ring"), NAMES[7:]


def filled(cfg, lengths, data="normal", rollback=0):
    """A pool with all tokens of its rows, and queries."""
    inputs = draw(cfg, max(n or 0 for n in lengths), lengths, data=data)
    pool = Pool(cfg, lengths, rollback)
    pool.store_keys(inputs.k)
    pool.store_values(inputs.v)
    pool.store_rings(inputs.k, inputs.v, write_back=False)
    return pool, strided_queries(inputs.q[0], cfg.compute)


def results(cfg, batch_size):
    """Poisoned outputs, with something between heads that stays, and log-sum-exps."""
    room = poisoned((cfg.H, batch_size, cfg.D + 4), getattr(torch, cfg.dtype))
    return room[..., : cfg.D].movedim(0, 1), poisoned((batch_size, cfg.H), torch.float32)


def by_parts(cfg, kernels, pool, q, scale):
    """Output and log-sum-exp by `attend`, then `combine_window`."""
    parts = Partials(cfg, len(pool.lengths), 2)
    found, split = results(cfg, len(pool.lengths)), cfg.kernel_key().split_tokens
    items = work_items(pool)
    kernels["attend"](*pool.args(*NAMES), items, q, scale, *parts.args)
    kernels["combine_window"](*pool.args(*RINGS, *ROWS), q, scale, split, *parts.args, *found)
    return found


def at_once(cfg, kernels, pool, q, scale):
    """The same by `attend_batch`."""
    found = results(cfg, len(pool.lengths))
    kernels["attend_batch"](*pool.args(*PAGED, *RINGS, *ROWS), q, scale, *found)
    return found


def compare(cfg, kernels, lengths, scale=None, **given):
    pool, q = filled(cfg, lengths, **given)
    scale = cfg.D**-0.5 if scale is None else scale
    for one, two in zip(*(way(cfg, kernels, pool, q, scale) for way in (by_parts, at_once))):
        assert_same_bits(two.contiguous(), one.contiguous(), f"{lengths} {given}")
        assert not one.isnan().any()


@pytest.mark.parametrize("cfg", slow_but(SOME[1:2], NARROW))
def test_the_same_bits(cfg, request):
    kernels, R, longest = library(cfg, request), cfg.R, one_part_tokens(cfg.kernel_key())
    # of all warps some tiles or none, of the window every number of sums
    compare(cfg, kernels, [R + longest, None, R - 1, 0, R + 1, 1, R + 5 * TOKENS + 3, 17])
    compare(cfg, kernels, [2 * R + 5], rollback=32)


@pytest.mark.parametrize("cfg", slow_but(SHORT_WINDOWS[:1], SHORT_WINDOWS[:2]))
def test_short_windows(cfg, request):
    kernels, R = library(cfg, request), cfg.R
    for data in ATTENDED_DATA:  # kernels are compiled once
        compare(cfg, kernels, [R + 300, None, R - 1, R + TOKENS], data=data)
        compare(cfg, kernels, [R + 40, 3], data=data, scale=-0.1, rollback=1)


@pytest.mark.cpu
@pytest.mark.slow
@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize("cfg", SHORT_WINDOWS[:2], ids=config_id)
def test_any_number_of_warps(cfg, at_once):
    """The states of eight query heads are in the same memory as tiles, those of fewer are not."""
    for M in (1, 8):
        cfg = replace(cfg, num_heads=M * cfg.num_kv_heads)
        kernels = EmulatedLibrary(cfg.kernel_key())
        function = scheduled_function(
            "attend_batch", cfg.kernel_key(), TARGET, {"at_once": at_once}
        )
        chosen = {name: kernels[name] for name in ("attend", "combine_window")}
        chosen["attend_batch"] = EmulatedKernel(function.mod)
        longest = cfg.R + one_part_tokens(cfg.kernel_key())
        compare(cfg, chosen, [longest - 9, None, cfg.R - 1, cfg.R + 2 * TOKENS])


@pytest.mark.cpu
@pytest.mark.parametrize("cfg", SHORT_WINDOWS[:2], ids=config_id)
def test_what_is_read_while_a_token_is_appended(cfg):
    """Nothing that `append` writes, until it has ended: the last packed value, and later tokens."""
    kernels, order, P = EmulatedLibrary(cfg.kernel_key()), value_order(cfg.kernel_key()), cfg.P
    kernel, scale = kernels["attend_batch"], cfg.D**-0.5
    for packed in (0, 1, TOKENS, TOKENS + 1, 4 * TOKENS, 5 * TOKENS):
        pool, q = filled(cfg, [cfg.R + packed])
        want = at_once(cfg, kernels, pool, q, scale)
        [[_, slot, length]] = pool.active()
        after = {name: x.clone() for name, x in pool.buffers.items()}
        pool.buffers["k_ring"][slot, :, (length - 1) % pool.ring] = math.nan
        pool.buffers["v_ring"][slot, :, (length - 1) % pool.ring] = math.nan
        if packed:
            page, token = pool.table[slot, (packed - 1) // P], (packed - 1) % P
            for name in ("v_scale", "v_zero"):
                pool.buffers[name][page, ..., token] = math.nan
            pool.buffers["v_code"][page, :, order.word(token)] = 0
        kernel.run_after([(pool.buffers[name], after[name]) for name in after])
        found = at_once(cfg, kernels, pool, q, scale)
        kernel.run_after([])
        for one, two in zip(want, found, strict=True):
            assert_same_bits(two.contiguous(), one.contiguous(), f"{packed} packed")

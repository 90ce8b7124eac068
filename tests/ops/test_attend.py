"""`attend` over permuted, poisoned pages against float64 attention on the same codes."""

import math
import platform
import re
from dataclasses import replace

import pytest
import torch
from configurations import CONFIGS, FEW, config_id, library, with_window
from inputs import ATTENDED_DATA, draw, strided_queries
from ops import integer_attention
from ops.partials import Partials
from pools import Pool, assert_same_bits
from tolerance import FLAT_FLOAT32, relative_l2

from kivi_tvm import layout, targets
from kivi_tvm.compile import scheduled_function
from kivi_tvm.config import INTEGER_MODES, MAX_INTEGER_BITS, KiviConfig
from kivi_tvm.cpu import missing_cpu_flags
from kivi_tvm.lowering import compile_module

NAMES = ("k_code", "k_scale", "k_zero", "v_code", "v_scale", "v_zero", "table", "state", "slots")


def splits_of(cfg, tokens):
    """Slices of a row's packed tokens: its work items."""
    key = cfg.kernel_key()
    split = layout.split_tokens(key, tokens, key.split_tokens)
    return [slice(first, min(first + split, tokens)) for first in range(0, tokens, split)]


def work_items(pool):
    """(row, split) of every active row, in an odd order and with idle items between."""
    items = [
        (row, index)
        for row, _, length in pool.active()
        for index in range(len(splits_of(pool.cfg, max(0, length - pool.cfg.R))))
    ]
    idle = [(-1, 0)]
    return torch.tensor(idle + items[::-1] + idle, dtype=torch.int32)


def kernel(cfg):
    """`attend` in the mode that `cfg` names; "float" for "auto", whatever this machine has."""
    return library(replace(cfg, compute=cfg.compute_mode()))["attend"]


def attended(cfg, pool, q, scale, work):
    entries = int(work[:, 1].max()) + 3
    parts = Partials(cfg, len(pool.lengths), entries)
    kernel(cfg)(*pool.args(*NAMES), work, q, scale, *parts.args)
    return parts


def check(cfg, lengths, data="normal", scale=None, view=None, bound=None):
    inputs = draw(cfg, max(n or 0 for n in lengths), lengths, data=data)
    scale = cfg.D**-0.5 if scale is None else scale
    pool = Pool(cfg, lengths)
    pool.store_keys(inputs.k)
    pool.store_values(inputs.v)
    q = view(inputs.q[0]) if view else strided_queries(inputs.q[0], cfg.compute)
    parts = attended(cfg, pool, q, scale, work_items(pool))
    written = dict.fromkeys(range(len(lengths)), 0)
    for row, _, _ in pool.active():
        k, v = pool.dense_keys(inputs.k, row), pool.dense_values(inputs.v, row)
        for index, part in enumerate(splits_of(cfg, v.shape[1])):
            parts.assert_equals_softmax(
                row, index, inputs.q[0, row], k[:, part], v[:, part], scale, bound
            )
            written[row] += 1
    for row, count in written.items():
        parts.assert_untouched(row, slice(count, None))
    return pool, inputs, parts


@pytest.mark.parametrize("data", ATTENDED_DATA)
@pytest.mark.parametrize("cfg", CONFIGS, ids=config_id)
def test_ragged_rows(cfg, data):
    R, split = cfg.R, cfg.kernel_key().split_tokens
    check(cfg, [500, None, R + 1, R + 31, 0, R, R + split + 63], data)


@pytest.mark.parametrize("cfg", FEW, ids=config_id)
def test_flat_softmax_over_zero_mean_values(cfg):
    check(cfg, [500, cfg.R + 2000], "flat", bound=FLAT_FLOAT32)


@pytest.mark.parametrize("cfg", FEW, ids=config_id)
@pytest.mark.parametrize("packed", [31, 33, 63, 500, 513])
def test_odd_packed_counts(cfg, packed):
    check(cfg, [cfg.R + packed], view=torch.Tensor.contiguous)


@pytest.mark.parametrize("cfg", FEW, ids=config_id)
@pytest.mark.parametrize("scale", [0.0, 0.01, -0.05])
def test_any_softmax_scale(cfg, scale):
    check(cfg, [cfg.R + 200], scale=scale)


X86 = {"kind": "llvm", "machine": "x86_64", "system": "linux"}
INTEGER = [
    replace(cfg, compute=mode)
    for cfg in FEW
    for mode in INTEGER_MODES
    if max(cfg.key_bits, cfg.value_bits) <= MAX_INTEGER_BITS
]


@pytest.mark.parametrize("data", ATTENDED_DATA)
@pytest.mark.cpu
@pytest.mark.parametrize("cfg", INTEGER, ids=config_id)
def test_integer_modes_are_close_to_attention(cfg, data):
    R, split = cfg.R, cfg.kernel_key().split_tokens
    check(cfg, [500, None, R + 1, R + 31, 0, R, R + split + 63], data)


@pytest.mark.parametrize("data", ATTENDED_DATA)
@pytest.mark.cpu
@pytest.mark.parametrize("cfg", INTEGER, ids=config_id)
def test_integer_modes_round_as_they_say(cfg, data):
    """Ten times closer to the same rounding in torch than to exact attention."""
    lengths = [cfg.R + cfg.kernel_key().split_tokens + 63, cfg.R + 1, cfg.R + 200]
    _, inputs, parts = check(cfg, lengths, data)
    for row, length in enumerate(lengths):
        k, v = (x[row, :, :length].float() for x in (inputs.k, inputs.v))
        expected = integer_attention.attended(cfg, inputs.q[0, row].float(), k, v, cfg.D**-0.5)
        for index, (out, lse) in enumerate(expected):
            top, total = parts.stat[row, :, index].unbind(-1)
            assert relative_l2(parts.acc[row, :, index] / total[:, None], out) < 1e-3
            # Of thousands of products in float32 a few fall on the other side of a half: a unit of
            # 2^-15 in mode "int8x2".
            assert relative_l2((top + total.log2()) * math.log(2), lse) < 5e-5


@pytest.mark.cpu
@pytest.mark.parametrize("mcpu", ["x86-64", "haswell", "skylake-avx512"])
def test_other_processors_round_alike(mcpu):
    """Sums of integers are exact, whatever instructions add them up."""
    target = targets.from_identity({**X86, "mcpu": mcpu})
    if platform.machine() != "x86_64" or missing_cpu_flags(targets.required_cpu_flags(target)):
        pytest.skip(f"needs {mcpu}")
    cfg = KiviConfig(64, 8, 2, key_bits=4, dtype="float32", compute="int8")
    pool, inputs, plain = check(cfg, [cfg.R + 500])
    schedule = scheduled_function("attend", cfg.kernel_key(), target)
    kernel = compile_module(schedule.mod, target)["attend"]
    found = Partials(cfg, 1, plain.acc.shape[2])
    work = work_items(pool)
    kernel(*pool.args(*NAMES), work, inputs.q[0].contiguous(), cfg.D**-0.5, *found.args)
    assert relative_l2(found.acc[:, :, 0], plain.acc[:, :, 0]) < 1e-3


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("machine", "mcpu", "instruction"),
    [
        ("x86_64", "znver4", r"vpdpbusd.*zmm"),
        ("x86_64", "alderlake", r"vpdpbusd.*ymm"),
        ("x86_64", "skylake-avx512", r"vpmaddubsw.*zmm"),
        ("x86_64", "haswell", r"vpmaddubsw.*ymm"),
        ("aarch64", "neoverse-n1", r"sdot.*4s"),
    ],
)
def test_processors_use_their_dot_products_of_bytes(machine, mcpu, instruction):
    try:
        target = targets.from_identity({**X86, "machine": machine, "mcpu": mcpu})
    except ValueError as error:
        pytest.skip(str(error))
    cfg = KiviConfig(64, 8, 2, compute="int8")
    schedule = scheduled_function("attend", cfg.kernel_key(), target)
    code = compile_module(schedule.mod, target).mod.inspect_source("asm")
    assert len(re.findall(instruction, code)) >= 16


@pytest.mark.cpu
@pytest.mark.parametrize("cfg", [*FEW, *INTEGER], ids=config_id)
def test_prefetching_changes_no_bit(cfg):
    """The hints may reach beyond a row's last page and the last head: that must be harmless."""
    lengths = [cfg.R + cfg.kernel_key().split_tokens + 63, cfg.R + 1]
    inputs = draw(cfg, max(lengths), lengths)
    pool = Pool(cfg, lengths)
    pool.store_keys(inputs.k)
    pool.store_values(inputs.v)
    work = work_items(pool)
    plain = attended(cfg, pool, inputs.q[0], cfg.D**-0.5, work)
    target = targets.resolve("native")
    schedule = scheduled_function("attend", cfg.kernel_key(), target, {"prefetch": "none"})
    kernel = compile_module(schedule.mod, target)["attend"]
    found = Partials(cfg, len(lengths), int(work[:, 1].max()) + 3)
    kernel(*pool.args(*NAMES), work, inputs.q[0], cfg.D**-0.5, *found.args)
    for mine, theirs in zip(found.args, plain.args, strict=True):
        assert_same_bits(mine, theirs)


@pytest.mark.parametrize("cfg", FEW, ids=config_id)
def test_a_split_has_the_same_bits_in_any_company_and_order(cfg):
    """Slots, pages, neighbours and the order of the work list change nothing."""
    R = cfg.R
    lengths = [R + 700, None, R + 31, R + 1200]
    pool, inputs, parts = check(cfg, lengths)
    for row, _, length in pool.active():
        alone = Pool(cfg, [length], seed=1)
        alone.store_keys(inputs.k[row : row + 1])
        alone.store_values(inputs.v[row : row + 1])
        work = work_items(alone)
        work = work[torch.randperm(len(work), generator=torch.Generator().manual_seed(row))]
        q = inputs.q[0, row : row + 1].contiguous()
        found = attended(cfg, alone, q, cfg.D**-0.5, work)
        count = int((work[:, 0] >= 0).sum())
        for one, other in zip(found.args, parts.args, strict=True):
            assert torch.equal(one[0, :, :count], other[row, :, :count])


def test_window_and_packed_counts_are_run_time_values():
    """The same kernels serve another window; nothing derives boundaries from `L - R`."""
    cfg = with_window(FEW[0], 32)
    check(cfg, [500, 33])
    inputs = draw(cfg, 400)
    pool = Pool(cfg, [400])
    pool.store_keys(inputs.k)
    pool.store_values(inputs.v)
    pool.state[pool.slots[0], 2] = 77  # values as if fewer were packed
    q = inputs.q[0].contiguous()
    parts = attended(cfg, pool, q, 0.1, torch.tensor([[0, 0]], dtype=torch.int32))
    k, v = pool.dense_keys(inputs.k, 0), pool.dense_values(inputs.v, 0)
    parts.assert_equals_softmax(0, 0, q[0], k[:, :77], v[:, :77], 0.1)

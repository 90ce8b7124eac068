"""`attend` in mode "half": as its operator says, as its CUDA source says, and on tensor cores.

On a CPU the operator is compiled as it is, its mathematics with the registers of lanes as arrays;
and its CUDA source is run by `emulated_cuda`, instructions of warps included.
"""

import math
from dataclasses import replace

import configurations
import pytest
import torch
from configurations import FEW, HALF, config_id, slow_but
from emulated_cuda import TARGET, EmulatedKernel, EmulatedLibrary
from inputs import ATTENDED_DATA, strided_queries
from ops import half_attention, test_attend
from ops.plain import plain_kernel
from tolerance import relative_l2

from kivi_tvm.compile import scheduled_function
from kivi_tvm.config import KiviConfig
from kivi_tvm.layout import NO_PAGE, num_pages, packed_values, value_order
from kivi_tvm.ops.fragments import TOKENS
from kivi_tvm.reference.formulas import attention

SOME = HALF[::5]
LENGTHS = 500, None, 0, 31, 1  # beyond the window; None: no row


@pytest.fixture(autouse=True)
def kernel(request, monkeypatch):
    """Let `test_attend.check` take the kernels of mode "half"."""
    where = request.config.getoption("--kernels")
    if where == "opencl":
        pytest.skip("needs a CPU or tensor cores")
    monkeypatch.setattr(test_attend, "kernel", gpu_kernel if where == "cuda" else operator)


def gpu_kernel(cfg):
    return configurations.library(cfg)["attend"]


def operator(cfg):
    return plain_kernel("attend", cfg.kernel_key())


@pytest.mark.cpu
@pytest.mark.parametrize("cfg", SOME, ids=config_id)
def test_what_is_read_while_a_token_is_appended(cfg, monkeypatch):
    """Nothing that `append` writes, until it has ended: the last packed value, and later tokens."""
    kernel = EmulatedLibrary(cfg.kernel_key())["attend"]
    monkeypatch.setattr(test_attend, "kernel", lambda _: kernel)
    order, P, split = value_order(cfg.kernel_key()), cfg.P, cfg.kernel_key().split_tokens
    for packed in (1, TOKENS - 1, TOKENS, TOKENS + 1, 5 * TOKENS, split + 1):
        pool, inputs, parts = test_attend.check(cfg, [cfg.R + packed])
        at = {name: pool.buffers[name] for name in test_attend.NAMES[:6]}
        after = {name: x.clone() for name, x in at.items()}
        [[_, slot, length]], last = pool.active(), packed - 1
        page, token = pool.table[slot, last // P], last % P
        at["v_scale"][page, ..., token] = at["v_zero"][page, ..., token] = math.nan
        at["v_code"][page, :, order.word(token)] = 0
        for token in range(packed, length - length % cfg.R):
            page, group = pool.table[slot, token // P], token // cfg.G_k
            at["k_code"][page, ..., token % P] = 0
            if group * cfg.G_k >= packed:
                at["k_scale"][page, :, token % P // cfg.G_k] = math.nan
                at["k_zero"][page, :, token % P // cfg.G_k] = math.nan
        kernel.run_after([(at[name], after[name]) for name in at])
        q, items = strided_queries(inputs.q[0], "half"), test_attend.work_items(pool)
        found = test_attend.attended(cfg, pool, q, cfg.D**-0.5, items)
        kernel.run_after([])
        for x, want in zip(found.args, parts.args, strict=True):
            assert torch.equal(x.nan_to_num(-1), want.nan_to_num(-1)), packed


def check_ragged(cfg):
    lengths = [n if n is None else n + cfg.R for n in LENGTHS]
    test_attend.check(cfg, [*lengths, 0, cfg.R + cfg.kernel_key().split_tokens + 63])


@pytest.mark.parametrize("cfg", slow_but(HALF[::3], HALF))
def test_ragged_rows(cfg):
    check_ragged(cfg)


@pytest.mark.cpu
@pytest.mark.parametrize("cfg", slow_but(SOME, HALF))
def test_cuda_source(cfg, monkeypatch):
    library = EmulatedLibrary(cfg.kernel_key())
    monkeypatch.setattr(test_attend, "kernel", lambda _: library["attend"])
    check_ragged(cfg)


class BoundedPool(test_attend.Pool):
    """Whoever looks up the page of a token that no row has packed reads far behind the memory."""

    def __init__(self, cfg, lengths):
        super().__init__(cfg, lengths)
        for _, slot, length in self.active():
            self.table[slot, num_pages(cfg, packed_values(cfg, length)) :] = 1 << 22
        self.table[self.table == NO_PAGE] = 1 << 22


@pytest.mark.cpu
@pytest.mark.parametrize("page_size", [32, 96])
def test_only_pages_with_packed_tokens_are_read(page_size, monkeypatch):
    cfg = KiviConfig(
        64, 2, 1, group_size=16, residual_length=16, page_size=page_size, compute="half"
    )
    kernel = EmulatedLibrary(cfg.kernel_key())["attend"]
    monkeypatch.setattr(test_attend, "kernel", lambda _: kernel)
    monkeypatch.setattr(test_attend, "Pool", BoundedPool)
    test_attend.check(cfg, [None, *(cfg.R + n for n in (1, 32, 33, 64, 96, 97, 289))])


@pytest.mark.cpu
@pytest.mark.slow
@pytest.mark.parametrize(("cfg", "warps"), [(HALF[0], 1), (HALF[0], 2), (HALF[2], 1)])
def test_cuda_source_for_chips_with_little_shared_memory(cfg, warps, monkeypatch):
    schedule = scheduled_function("attend", cfg.kernel_key(), TARGET, {"warps": warps})
    kernel = EmulatedKernel(schedule.mod)
    monkeypatch.setattr(test_attend, "kernel", lambda _: kernel)
    check_ragged(cfg)


@pytest.mark.parametrize("data", ATTENDED_DATA)
@pytest.mark.parametrize("cfg", SOME, ids=config_id)
def test_rounds_as_it_says(cfg, data):
    """Ten times closer to the same rounding in torch than to exact attention.

    Of many products a few fall on the other side of a half: a unit of 2^-11.
    """
    lengths = [cfg.R + cfg.kernel_key().split_tokens + 63, cfg.R + 1, cfg.R + 200]
    _, inputs, parts = test_attend.check(cfg, lengths, data)
    for row, length in enumerate(lengths):
        k, v = (x[row, :, :length].float() for x in (inputs.k, inputs.v))
        expected = half_attention.attended(cfg, inputs.q[0, row].float(), k, v, cfg.D**-0.5)
        for index, (out, lse) in enumerate(expected):
            top, total = parts.stat[row, :, index].unbind(-1)
            assert relative_l2(parts.acc[row, :, index] / total[:, None], out) < 2e-4
            assert relative_l2((top + total.log2()) * math.log(2), lse) < 1e-5


@pytest.mark.parametrize(
    ("name", "size"),
    [("k", 2.0**-7), ("k", 2.0**6), ("k", 2.0**12), ("v", 2.0**-12), ("v", 2.0**12)],
)
def test_any_size_of_keys_and_values(name, size, monkeypatch):
    """float16 holds the products with scales of any size that models have.

    Below 2^-8 of the size of normal keys the products of those with queries become subnormal.
    """
    cfg = replace(FEW[0], compute="half", page_size=64)
    plain = test_attend.draw

    def draw(*args, **kwargs):
        inputs = plain(*args, **kwargs)
        getattr(inputs, name).mul_(size)
        return inputs

    monkeypatch.setattr(test_attend, "draw", draw)
    scale = cfg.D**-0.5 / (size if name == "k" else 1)
    test_attend.check(cfg, [cfg.R + 1100], scale=scale)


@pytest.mark.parametrize("data", ATTENDED_DATA)
@pytest.mark.parametrize(("bits", "most"), [(2, 0.01), (4, 0.01), (8, 0.12)])
def test_share_of_the_error_of_quantization(bits, most, data):
    cfg = KiviConfig(128, 8, 2, bits, bits, compute="half")
    pool, inputs, parts = test_attend.check(cfg, [1024], data)
    q, packed = inputs.q[0, 0].float(), slice(1024 - cfg.R)
    k, v = pool.dense_keys(inputs.k, 0), pool.dense_values(inputs.v, 0)
    of_codes, _ = attention(q.double(), k[:, packed].double(), v[:, packed].double())
    exact, _ = attention(q.double(), *(x[0, :, packed].double() for x in (inputs.k, inputs.v)))
    count = len(test_attend.splits_of(cfg, 1024 - cfg.R))
    acc, (top, total) = (
        parts.acc[0, :, :count].double(),
        parts.stat[0, :, :count].double().unbind(-1),
    )
    share = (top - top.amax(1, keepdim=True)).exp2()
    found = (acc * share[..., None]).sum(1) / (total * share).sum(1, keepdim=True)
    assert (found - of_codes).norm() < most * (of_codes - exact).norm()

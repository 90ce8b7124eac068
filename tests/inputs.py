"""Inputs of the kernels under test: the data of `workloads`, awkward shapes and elements."""

from __future__ import annotations

import math

import torch

from kivi_tvm.tune.cases.case import strided as strided
from kivi_tvm.tune.cases.case import strided_queries as strided_queries
from kivi_tvm.workloads import Workload, make_inputs

# Where quantization can go wrong.
QUANTIZED_DATA = ("normal", "outlier", "constant", "huge", "tiny", "extreme", "nonfinite", "zeros")
# Where attention loses digits. "flat" is the workload "zero_mean", whose softmax is nearly flat as
# well: 0.1% of the values' size is left of their sum. "zero_mean" here has its queries unscaled.
ATTENDED_DATA = ("normal", "outlier", "peaked", "zero_mean")
ODD_TOKENS = (1, 31, 33, 63, 500)


def _add_extreme(x):
    """Elements at the ends of the dtype's range: their difference may overflow float32."""
    top = torch.finfo(x.dtype).max
    x[:, :, ::29, 3::17], x[:, :, 5::31, 2::13] = top, -top


def _add_nonfinite(x):
    """NaN and infinities in a few groups of every row."""
    for value, token, channel in ((math.nan, 0, 1), (math.inf, 33, 20), (-math.inf, 70, 40)):
        x[:, :, token : token + 1, channel] = value


def _make_zeros(x):
    """Zeros of both signs, and larger elements in some groups."""
    x.copy_(torch.where(x.abs() <= 1.5, torch.copysign(torch.zeros_like(x), x), x.abs()))


EDITS = {"extreme": _add_extreme, "nonfinite": _add_nonfinite, "zeros": _make_zeros}


def draw(cfg, tokens, lengths=None, batch_size=1, data="normal", steps=1, seed=0):
    """`workloads.Inputs` for a configuration; None among `lengths` is an inactive row."""
    edit = EDITS.get(data)
    rows = None if lengths is None else tuple(0 if n is None else n for n in lengths)
    workload = Workload(
        num_heads=cfg.H,
        num_kv_heads=cfg.H_kv,
        head_dim=cfg.D,
        tokens=tokens,
        batch_size=batch_size if rows is None else len(rows),
        group_size=cfg.G_v,
        dtype=cfg.dtype,
        data="normal" if edit else "zero_mean" if data == "flat" else data,
        lengths=rows,
        seed=seed,
    )
    inputs = make_inputs(workload, steps)
    if data == "zero_mean":
        inputs = inputs._replace(q=8 * inputs.q)
    if edit:
        for x in (inputs.k, inputs.v):
            edit(x)
    return inputs


def ragged(cfg):
    """Lengths at the edges of the window: None is an inactive row."""
    R = cfg.R
    return [500, None, 1, R - 1, R, 0, R + 1, 2 * R + 31]

"""Workloads: ids, determinism, and that every kind of data is what its name says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kivi_tvm.reference import quantize_key, quantize_value
from kivi_tvm.workloads import DATA, MODELS, Workload, make_inputs

BASE = Workload(num_heads=8, num_kv_heads=2, head_dim=128, tokens=500, batch_size=2)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({}, "B2-H8-Hkv2-T500-D128-b2-G32"),
        ({"key_bits": 4}, "B2-H8-Hkv2-T500-D128-k4v2-G32"),
        ({"lengths": (500, 31)}, "B2-H8-Hkv2-T500_31-D128-b2-G32"),
        (
            {"residual_length": 64, "dtype": "float32", "data": "outlier", "seed": 3},
            "B2-H8-Hkv2-T500-D128-b2-G32-R64-fp32-outlier-seed3",
        ),
    ],
)
def test_id_can_be_read_aloud(change, name):
    assert replace(BASE, **change).id == name


def test_ids_are_unique_over_all_data():
    assert len({replace(BASE, data=data).id for data in DATA}) == len(DATA)


def test_every_broken_field_is_named():
    with pytest.raises(ValueError) as error:
        Workload(8, 2, 128, tokens=4, batch_size=2, data="odd", lengths=(5,))
    for word in ("`data`", "'odd'", "`lengths` must have batch_size=2", r"[0, 4]", "(5,)"):
        assert word in str(error.value)


@pytest.mark.parametrize("name", MODELS)
def test_models_are_valid_configurations(name):
    assert MODELS[name].cfg.H == MODELS[name].num_heads


@pytest.mark.parametrize("data", DATA)
def test_shapes_dtype_and_determinism(data):
    w = replace(BASE, data=data, dtype="bfloat16", tokens=70)
    first, second = make_inputs(w, steps=3), make_inputs(w, steps=3)
    assert first.k.shape == first.v.shape == (2, 2, 70, 128)
    assert first.q.shape == (3, 2, 8, 128)
    assert first.k_new.shape == first.v_new.shape == (3, 2, 2, 128)
    for a, b in zip(first, second, strict=True):
        if isinstance(a, torch.Tensor):
            assert a.dtype == torch.bfloat16
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("data", [name for name in DATA if name != "nonfinite"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_valid_tokens_are_finite(data, dtype):
    inputs = make_inputs(replace(BASE, data=data, dtype=dtype), steps=2)
    for tensor in (inputs.k, inputs.v, inputs.q, inputs.k_new, inputs.v_new):
        assert tensor.isfinite().all()


def test_steps_continue_the_prefill():
    """A streamed cache and a one-shot cache can be fed the same tokens."""
    streamed = make_inputs(replace(BASE, tokens=40), steps=8)
    whole = make_inputs(replace(BASE, tokens=48), steps=0)
    joined = torch.cat([streamed.k, streamed.k_new.movedim(0, 2)], 2)
    torch.testing.assert_close(joined, whole.k, rtol=0, atol=0)


def test_padding_is_poisoned():
    inputs = make_inputs(replace(BASE, tokens=64, lengths=(64, 3)))
    assert inputs.lengths == [64, 3]
    assert inputs.k[0].isfinite().all() and inputs.k[1, :, :3].isfinite().all()
    assert inputs.k[1, :, 3:].isnan().all() and inputs.v[1, :, 3:].isnan().all()


def test_outlier_channels_stand_out_per_head():
    k = make_inputs(replace(BASE, data="outlier", dtype="float32")).k
    size = k.abs().mean((0, 2))  # [H_kv, D]
    large = size > 8
    assert (large.sum(1) == 4).all()
    assert not torch.equal(large[0], large[1])


def test_peaked_softmax_is_peaked():
    inputs = make_inputs(replace(BASE, data="peaked", dtype="float32", tokens=4000))
    q = inputs.q[0].reshape(2, 2, 4, 128)
    top = (q @ inputs.k.mT * 128**-0.5).softmax(-1).topk(8).values.sum(-1)
    assert top.min() > 0.8


def test_zero_mean_values_have_zero_mean():
    inputs = make_inputs(replace(BASE, data="zero_mean", dtype="float32"), steps=0)
    assert inputs.v.mean(2).abs().max() < 1e-6


def test_constant_groups_have_scale_zero():
    inputs = make_inputs(replace(BASE, data="constant", tokens=64), steps=0)
    assert (quantize_key(inputs.k, 2, 32).scale[..., :64] == 0).all()
    assert (quantize_value(inputs.v, 2, 32).scale[..., 0] == 0).all()


def test_huge_values_saturate_the_stored_zero():
    inputs = make_inputs(replace(BASE, data="huge", dtype="float32", tokens=64), steps=0)
    assert (quantize_key(inputs.k, 2, 32).zero == -65504).any()


def test_tiny_ranges_meet_both_zero_and_subnormal_scales():
    inputs = make_inputs(replace(BASE, data="tiny", dtype="float32", tokens=64), steps=0)
    scale = quantize_key(inputs.k, 2, 32).scale
    assert (scale == 0).any()
    assert ((scale > 0) & (scale < torch.finfo(torch.float16).tiny)).any()


def test_nonfinite_elements_are_few_and_present():
    inputs = make_inputs(replace(BASE, data="nonfinite", dtype="float32"), steps=0)
    assert inputs.k.isnan().sum() == 1
    assert inputs.v.isinf().sum() == 1

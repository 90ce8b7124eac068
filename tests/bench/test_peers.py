"""Torch's peers compute attention; the gate accepts them and nothing else."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from kivi_tvm.bench import attention, harness, peers
from kivi_tvm.bench.provider import Provider, relative_l2
from kivi_tvm.workloads import MODELS, Workload, make_inputs

SMALL = Workload(num_heads=8, num_kv_heads=2, head_dim=64, tokens=300, batch_size=2)


@pytest.fixture(autouse=True)
def small_read(monkeypatch):
    monkeypatch.setattr(attention.harness, "READ_BUFFER_BYTES", 1 << 20)


@pytest.mark.parametrize("name", peers.PEERS)
@pytest.mark.parametrize("data", ["normal", "outlier", "peaked", "zero_mean"])
def test_peer_passes_its_check(name, data):
    w = replace(SMALL, data=data, dtype="float32")
    provider = peers.torch_peer(name, w, make_inputs(w), copies=2)
    assert provider.check() <= provider.tolerance


def test_peer_sees_the_new_token():
    inputs = make_inputs(SMALL)
    expected = peers.torch_peer("torch-matmul-fp32", SMALL, inputs, 1).expected
    changed = inputs._replace(v_new=inputs.v_new + 10)
    assert not torch.equal(
        expected, peers.torch_peer("torch-matmul-fp32", SMALL, changed, 1).expected
    )


def test_copies_share_no_memory():
    provider = peers.torch_peer("torch-matmul-bf16", SMALL, make_inputs(SMALL), copies=3)
    addresses = {tensor.data_ptr() for call in provider.calls for tensor in call.args[1:]}
    assert len(addresses) == 6


def test_unknown_and_ragged_are_refused():
    with pytest.raises(ValueError, match=r"`peers` must be among .*'flash'"):
        peers.torch_peer("flash", SMALL, make_inputs(SMALL), 1)
    ragged = replace(SMALL, lengths=(300, 5))
    with pytest.raises(ValueError, match=r"`lengths` must be None .*\(300, 5\)"):
        peers.torch_peer("torch-matmul-bf16", ragged, make_inputs(ragged), 1)


def test_wrong_result_gets_no_time():
    """One bad copy is enough."""
    good = peers.torch_peer("torch-matmul-fp32", SMALL, make_inputs(SMALL), copies=2)
    bad = replace(good, name="bad", calls=[good.calls[0], lambda: good.calls[1]() * 1.001])
    records = attention.compare(SMALL, [good, bad], "warm", rounds=1, target="native")
    assert [record.passed for record in records] == [True, False]
    plain = records[1].to_dict()
    assert "p50_us" not in plain
    assert "gb_per_s" not in plain
    assert plain["error"] > plain["tolerance"]


def test_nan_never_passes():
    expected = torch.ones(4, dtype=torch.float64)
    assert relative_l2(torch.full((4,), math.nan), expected) == math.inf
    provider = Provider("x", "peer", [lambda: torch.full((4,), math.nan)], 1, expected, 1e9)
    assert provider.check() > provider.tolerance


def test_byte_models_of_the_design_example():
    """T=32768, H_kv=8, D=128, G=32: 25.2 MB of 2-bit pages against 134 MB of bf16."""
    w = replace(MODELS["llama3-8b"], tokens=32768)
    window = 2 * 8 * 128 * 128 * 2
    assert attention.kivi_bytes(w.cfg, [32768 + 128]) == 2 * 32768 * 8 * 128 * 3 // 8 + window
    assert peers.cache_bytes(replace(w, tokens=32767), torch.bfloat16) == 134217728


def test_harness_cold_for_both_sides():
    w = replace(MODELS["llama3-8b"], tokens=4096)
    l3 = 32 << 20
    for nbytes in (attention.kivi_bytes(w.cfg, [4096]), peers.cache_bytes(w, torch.bfloat16)):
        assert harness.copies_for(nbytes, "cold", l3) * nbytes >= 4 * l3

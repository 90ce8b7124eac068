"""Peers compute attention; the gate accepts them and nothing else."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from kivi_tvm.bench import attention, harness, ours, peers, peers_torch
from kivi_tvm.bench.provider import HALF, Peer, Provider, Setting, Unusable, relative_l2
from kivi_tvm.errors import UserError
from kivi_tvm.workloads import MODELS, Workload, make_inputs

SMALL = Workload(num_heads=8, num_kv_heads=2, head_dim=64, tokens=300, batch_size=2)


@pytest.fixture(autouse=True)
def small_read(monkeypatch):
    monkeypatch.setattr(attention.harness, "READ_BUFFER_BYTES", 1 << 20)


@pytest.fixture
def absent(monkeypatch):
    """No optional package is installed."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


def setting(w, state="warm"):
    return Setting(w, make_inputs(w), state, 1 << 16)


def installed(name):
    if (reason := peers.PEERS[name].missing()) is not None:
        pytest.skip(reason)
    return peers.PEERS[name]


TORCH = [name for name in peers.PEERS if name.startswith("torch")]
OTHERS = [name for name in peers.PEERS if name not in TORCH]
DATA = ["normal", "outlier", "peaked", "zero_mean"]


@pytest.mark.parametrize("name", peers.PEERS)
@pytest.mark.parametrize("data", DATA)
def test_peer_passes_its_check(name, data):
    provider = installed(name).make(setting(replace(SMALL, data=data, dtype="float32")))
    assert provider.check() <= provider.tolerance
    assert provider.check() <= provider.tolerance  # a call leaves the cache as it was
    assert not provider.padded


@pytest.mark.parametrize("name", peers.PEERS)
def test_ragged_rows(name):
    """Padded and masked by torch, of their own length in the others."""
    ragged = replace(SMALL, batch_size=3, lengths=(300, 5, 127), dtype="float32")
    provider = installed(name).make(setting(ragged))
    assert provider.check() <= provider.tolerance
    assert provider.padded == (name in TORCH)
    even = peers.PEERS[name].make(setting(replace(ragged, lengths=None)))
    assert (provider.nbytes == even.nbytes) == provider.padded


@pytest.mark.parametrize("name", peers.PEERS)
def test_peer_sees_the_new_token(name):
    provider = installed(name).make(setting(SMALL))
    w, inputs = SMALL, make_inputs(SMALL)
    changed = inputs._replace(v_new=inputs.v_new + 10)
    other = peers.PEERS[name].make(Setting(w, changed, "warm", 1 << 16))
    assert relative_l2(other.calls[0](), provider.expected) > provider.tolerance
    assert other.check() <= other.tolerance


@pytest.mark.parametrize("name", OTHERS)
def test_copies_give_the_same(name):
    provider = installed(name).make(setting(SMALL, "cold"))
    assert len(provider.calls) >= 2
    assert provider.check() <= provider.tolerance


def test_copies_share_no_memory():
    wide = Setting(SMALL, make_inputs(SMALL), "cold", 1 << 20)
    provider = peers.PEERS["torch-matmul-bf16"].make(wide)
    tensors = [tensor for call in provider.calls for tensor in call.args[1:3]]
    assert len(provider.calls) > 2
    assert len({tensor.data_ptr() for tensor in tensors}) == len(tensors)


def test_algorithms_share_caches_that_exceed_l3():
    both = setting(SMALL, "cold")
    made = [peers.PEERS[f"torch-{name}-bf16"].make(both) for name in ("matmul", "sdpa-rows")]
    addresses = [[call.args[1].data_ptr() for call in provider.calls] for provider in made]
    assert len(set(addresses[0])) == 2
    assert addresses[0] == addresses[1]


def test_unknown_and_absent_peers_are_refused(absent):
    with pytest.raises(UserError, match=r"`peers` must be among .*'flash'"):
        peers.check(["flash"])
    with pytest.raises(UserError, match="`peers` must be installed, got 'vllm-fp8': no vllm here"):
        peers.make(setting(SMALL), ["torch-matmul-fp32", "vllm-fp8"])


def test_absent_peers_are_left_out_of_the_default_list(absent):
    made, left_out = peers.make(setting(SMALL))
    assert [provider.name for provider in made] == [n for n in TORCH if not n.endswith("fp16")]
    assert set(left_out) == {name for name in OTHERS if peers.PEERS[name].default}
    assert left_out["onnxruntime-int8"].startswith("no onnx and onnxruntime here: pip install")


def test_a_peer_that_cannot_run_is_left_out_unless_named(monkeypatch):
    def refuse(setting):
        raise Unusable("no such head")

    monkeypatch.setattr(peers, "PEERS", {"odd": Peer("odd", HALF, refuse)})
    assert peers.make(setting(SMALL)) == ([], {"odd": "no such head"})
    with pytest.raises(UserError, match="`peers`: odd cannot run: no such head"):
        peers.make(setting(SMALL), ["odd"])


def test_wrong_result_gets_no_time():
    """One bad copy is enough."""
    good = peers.PEERS["torch-matmul-fp32"].make(setting(SMALL, "cold"))
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
    assert ours.kivi_bytes(w.cfg, [32768 + 128]) == 2 * 32768 * 8 * 128 * 3 // 8 + window
    assert peers_torch.cache_bytes(replace(w, tokens=32767), torch.bfloat16) == 134217728


def test_harness_cold_for_both_sides():
    w = replace(MODELS["llama3-8b"], tokens=4096)
    l3 = 32 << 20
    for nbytes in (ours.kivi_bytes(w.cfg, [4096]), peers_torch.cache_bytes(w, torch.bfloat16)):
        assert harness.copies_for(nbytes, "cold", l3) * nbytes >= 4 * l3

"""The attention function "kivi_tvm": calls that it refuses leave the cache as it was."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from hf.tiny import TINY
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig

from kivi_tvm.hf.attention import kivi_attention_forward
from kivi_tvm.hf.reference_cache import ReferenceKiviCache
from kivi_tvm.hf.support import CALL_RULES


def states(tokens=1, H=4, H_kv=2, D=64):
    return torch.randn(1, H, tokens, D), *torch.randn(2, 1, H_kv, tokens, D)


def attend(q, k, v, **kwargs):
    module = SimpleNamespace(num_key_value_groups=2)
    return kivi_attention_forward(module, q, k, v, None, **kwargs)[0]


@pytest.fixture
def cache():
    return ReferenceKiviCache(LlamaConfig(**TINY))


def test_scaling_of_the_model():
    cache = ReferenceKiviCache(LlamaConfig(**{**TINY, "num_hidden_layers": 1}))
    q, k, v = states(5)
    attend(q, *cache.update(k, v, 0), scaling=0.5)
    new_q, new_k, new_v = states()
    got = attend(new_q, *cache.update(new_k, new_v, 0), scaling=0.5)
    k, v = torch.cat([k, new_k], 2), torch.cat([v, new_v], 2)
    want = scaled_dot_product_attention(new_q, k, v, scale=0.5, enable_gqa=True)
    torch.testing.assert_close(got, want.transpose(1, 2))


@pytest.mark.parametrize("name", CALL_RULES)
def test_arguments_that_change_attention(cache, name):
    q, k, v = states()
    k, v = cache.update(k, v, 0)
    with pytest.raises(NotImplementedError, match=f"`{name}` must be None with KiviCache, got 30"):
        attend(q, k, v, **{name: 30.0})
    assert cache.get_seq_length() == 0
    cache.update(*states()[1:], 0)  # nothing is pending


def test_keys_and_values_of_different_shape(cache):
    k, v = torch.zeros(1, 2, 3, 64), torch.zeros(1, 2, 3, 32)
    with pytest.raises(ValueError, match=r"one shape .* got \[1, 2, 3, 64\] and \[1, 2, 3, 32\]"):
        cache.update(k, v, 0)
    assert not cache.is_initialized


def test_query_that_does_not_fit(cache):
    q, k, v = states(H=3)
    k, v = cache.update(k, v, 0)
    with pytest.raises(ValueError, match="with H a multiple of 2"):
        attend(q, k, v)


def test_value_that_is_not_the_cache_s(cache):
    q, k, v = states()
    k, _ = cache.update(k, v, 0)
    with pytest.raises(RuntimeError, match="layer 0 must attend once"):
        attend(q, k, v)


def test_key_attended_twice(cache):
    q, k, v = states()
    k, v = cache.update(k, v, 0)
    attend(q, k, v)
    with pytest.raises(RuntimeError, match="layer 0 must attend once"):
        attend(q, k, v)


def test_key_of_another_cache_is_not_mixed_up(cache):
    other = ReferenceKiviCache(LlamaConfig(**TINY))
    q, k, v = states()
    k, v = other.update(k, v, 0)
    attend(q, k, v)
    assert (cache.get_seq_length(), other.get_seq_length()) == (0, 1)

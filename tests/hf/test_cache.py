"""`KiviCache` in tiny models: what stays inside the window must equal transformers' own cache."""

from __future__ import annotations

import gc
import weakref
from types import SimpleNamespace

import pytest
import torch
from hf.compare import run
from hf.tiny import TINY, pad, prompt, tiny_hybrid, tiny_llama
from transformers import DynamicCache, LlamaConfig

from kivi_tvm.hf.attention import kivi_attention_forward
from kivi_tvm.hf.reference_cache import ReferenceKiviCache

# Float32 noise of two orders of summation; logits here are of size 1 to 10.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
STEPS = 12


def whole(tokens, batch_size=1, seed=0):
    """An unpadded batch."""
    ids = prompt(tokens, batch_size, seed)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def ragged(side="left"):
    return pad([prompt(n, seed=n)[0] for n in (5, 33, 1)], side)


def interior():
    """Padding at the left, inside and at the right."""
    ids, mask = prompt(9, 2), torch.ones(2, 9, dtype=torch.long)
    mask[0, [0, 4, 5]] = mask[1, [2, 8]] = 0
    return {"input_ids": ids, "attention_mask": mask}


def states(tokens, H_kv):
    return torch.randn(1, 4, tokens, 64), *torch.randn(2, 1, H_kv, tokens, 64)


def attend(cache, layer, q, k, v):
    """One layer's step, as a model makes it."""
    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1])
    return kivi_attention_forward(module, q, *cache.update(k, v, layer), None)[0]


INPUTS = {
    "one-token": lambda: whole(1),
    "single": lambda: whole(40),
    "batch": lambda: whole(17, 3),
    "left": ragged,
    "right": lambda: ragged("right"),
    "interior": interior,
}


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


@pytest.mark.parametrize("name", INPUTS)
def test_equals_full_precision_within_the_window(llama, name):
    inputs = INPUTS[name]()
    want, tokens = run(llama, DynamicCache(config=llama.config), inputs, STEPS)
    cache = ReferenceKiviCache(llama.config)
    got, _ = run(llama, cache, inputs, STEPS, tokens)
    torch.testing.assert_close(got, want, **CLOSE)
    assert cache.lengths == (inputs["attention_mask"].sum(1) + STEPS).tolist()
    assert cache.get_seq_length() == inputs["input_ids"].shape[1] + STEPS


def test_quantization_changes_the_logits(llama):
    inputs = whole(300)
    want, tokens = run(llama, DynamicCache(config=llama.config), inputs, 4)
    two, _ = run(llama, ReferenceKiviCache(llama.config), inputs, 4, tokens)
    eight, _ = run(
        llama, ReferenceKiviCache(llama.config, key_bits=8, value_bits=8), inputs, 4, tokens
    )
    assert (two - want).norm() > 10 * (eight - want).norm() > 0


@pytest.mark.parametrize("name", ["left", "right", "interior"])
def test_padded_row_equals_the_row_alone(llama, name):
    inputs = INPUTS[name]()
    got, tokens = run(llama, ReferenceKiviCache(llama.config), inputs, STEPS)
    for i, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"])):
        ids = ids[mask.bool()][None]
        alone = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        want, _ = run(llama, ReferenceKiviCache(llama.config), alone, STEPS, tokens[i : i + 1])
        torch.testing.assert_close(got[:, i], want[:, 0], **CLOSE)


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "top_k": 20}])
@pytest.mark.parametrize("make", [lambda: whole(40), ragged], ids=["single", "left"])
def test_generate_equals_transformers(llama, make, options):
    outputs = []
    for cache in (DynamicCache(config=llama.config), ReferenceKiviCache(llama.config)):
        torch.manual_seed(3)
        outputs.append(
            llama.generate(**make(), past_key_values=cache, max_new_tokens=STEPS, **options)
        )
    assert torch.equal(*outputs)


def test_generate_several_sequences(llama):
    cache = ReferenceKiviCache(llama.config)
    out = llama.generate(
        **whole(7), past_key_values=cache, max_new_tokens=5, do_sample=True, num_return_sequences=3
    )
    assert out.shape == (3, 12)
    assert cache.lengths == [11] * 3


def test_early_end_of_sequence_in_a_batch(llama):
    greedy = llama.generate(**ragged(), max_new_tokens=STEPS, do_sample=False)
    end = {"eos_token_id": int(greedy[0, 36]), "pad_token_id": 0}
    want = llama.generate(**ragged(), max_new_tokens=STEPS, do_sample=False, **end)
    cache = ReferenceKiviCache(llama.config)
    got = llama.generate(
        **ragged(), past_key_values=cache, max_new_tokens=STEPS, do_sample=False, **end
    )
    assert torch.equal(got, want)


def test_no_cache_and_other_caches_equal_sdpa_exactly():
    model, inputs = tiny_llama(), ragged()
    with torch.no_grad():
        ours = model(**inputs, use_cache=False).logits
        own, tokens = run(model, DynamicCache(config=model.config), inputs, STEPS)
        model.set_attn_implementation("sdpa")
        assert torch.equal(ours, model(**inputs, use_cache=False).logits)
        want, _ = run(model, DynamicCache(config=model.config), inputs, STEPS, tokens)
    assert torch.equal(own, want)


@pytest.mark.parametrize("first", ["sliding_attention", "full_attention"])
def test_hybrid_model_keeps_its_sliding_layers(first):
    second = {"sliding_attention": "full_attention", "full_attention": "sliding_attention"}[first]
    model, inputs = tiny_hybrid((first, second)), ragged()
    want, tokens = run(model, DynamicCache(config=model.config), inputs, STEPS)
    cache = ReferenceKiviCache(model.config)
    for _ in range(2):
        got, _ = run(model, cache, inputs, STEPS, tokens)
        torch.testing.assert_close(got, want, **CLOSE)
        assert cache.report()["layers"] == {"kivi": 1, "DynamicSlidingWindowLayer": 1}
        cache.reset()


def test_layers_of_different_geometry_get_their_own_cache():
    per_layer = {1: {"num_key_value_heads": 1}}
    config = LlamaConfig(**{**TINY, "num_hidden_layers": 3}, per_layer_config=per_layer)
    cache = ReferenceKiviCache(config)
    for tokens in (5, 1, 1):
        for layer, H_kv in enumerate((2, 1, 2)):
            attend(cache, layer, *states(tokens, H_kv))
    kernels = [(k["layers"], k["num_kv_heads"]) for k in cache.report()["kernels"]]
    assert kernels == [([0, 2], 2), ([1], 1)]
    assert [store.cache.lengths for store in cache._stores] == [[7], [7]]


def test_layers_unlike_their_configuration():
    cache = ReferenceKiviCache(LlamaConfig(**TINY))
    attend(cache, 0, *states(5, 2))
    with pytest.raises(NotImplementedError, match=r"layers \[0, 1\] must be alike, got .* layer 1"):
        attend(cache, 1, *states(5, 1))
    cache.reset()
    attend(cache, 0, *states(5, 1))
    attend(cache, 1, *states(5, 1))
    assert cache.lengths == [5]


def test_reset_starts_over_also_with_another_batch(llama):
    cache = ReferenceKiviCache(llama.config)
    for inputs in (whole(200), whole(40), ragged(), whole(3)):
        want, tokens = run(llama, ReferenceKiviCache(llama.config), inputs, 3)
        got, _ = run(llama, cache, inputs, 3, tokens)
        assert torch.equal(got, want)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert sum(cache.lengths) == 0


def test_what_transformers_asks_a_cache(llama):
    cache = ReferenceKiviCache(llama.config, max_tokens=64)
    assert (cache.get_seq_length(), cache.get_mask_sizes(7, 0)) == (0, (7, 0))
    assert not cache.is_initialized
    assert cache.batch_size == -1
    run(llama, cache, ragged(), 2)
    assert type(cache.get_seq_length()) is int
    assert cache.get_mask_sizes(1, 1) == (36, 0)
    assert cache.get_max_length() == 64
    assert (cache.is_compileable, cache.is_croppable, cache.batch_size) == (False, True, 3)
    assert cache.is_initialized
    assert cache.is_sliding == [False, False]
    cache.crop(0)
    assert cache.get_seq_length() == 35


def test_report_says_what_was_applied(llama):
    cache = ReferenceKiviCache(llama.config, key_bits=4, window="exact", page_size=64)
    assert cache.nbytes == {"total": 0}
    run(llama, cache, whole(5), 1)
    report = cache.report()
    assert (report["key_bits"], report["value_bits"], report["window"]) == (4, 2, "exact")
    assert cache._stores[0].module.cfg.P == report["page_size"] == 64
    assert (report["columns"], report["lengths"]) == (6, [6])
    assert report["bytes"] == cache.nbytes == cache._stores[0].cache.nbytes
    (kernels,) = report["kernels"]
    assert (kernels["layers"], kernels["source"], kernels["head_dim"]) == ([0, 1], "torch", 64)


def test_early_initialization_takes_no_memory(llama):
    cache = ReferenceKiviCache(llama.config)
    cache.early_initialization(1, 2, 64, torch.float32, torch.device("cpu"))
    assert cache.is_initialized
    assert cache.nbytes == {"total": 0}
    want, tokens = run(llama, ReferenceKiviCache(llama.config), whole(5), 2)
    assert torch.equal(run(llama, cache, whole(5), 2, tokens)[0], want)


def test_dropped_cache_is_freed_at_once(llama):
    cache = ReferenceKiviCache(llama.config)
    run(llama, cache, whole(5), 1)
    gone = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert gone() is None
    finally:
        gc.enable()

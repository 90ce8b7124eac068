"""`generate` with the model under `torch.compile`: the graph breaks around the cache, no more."""

from __future__ import annotations

import pytest
import torch
from hf.compare import compare
from hf.tiny import pad, prompt, tiny_hybrid, tiny_llama
from transformers import CompileConfig, DynamicCache

from kivi_tvm.hf import KiviCache
from kivi_tvm.hf.reference_cache import ReferenceKiviCache

MODES = {
    "greedy": {},
    "beams": {"num_beams": 2},
    "chunks": {"prefill_chunk_size": 7},
}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def ragged():
    return pad([prompt(n, seed=n)[0] for n in (5, 33)])


def generate(model, cache, inputs=None, **options):
    out = model.generate(
        **(ragged() if inputs is None else inputs),
        past_key_values=cache,
        max_new_tokens=8,
        return_dict_in_generate=True,
        output_logits=True,
        **{"do_sample": False, **options},
    )
    return out.sequences, torch.stack(out.logits)


def assert_same(got, want):
    """Equal tokens; transformers' own sdpa gives other bits when it is compiled."""
    assert torch.equal(got[0], want[0])
    assert compare(got[1], want[1]).excused == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "mode"),
    [(tiny_llama, "beams"), (tiny_llama, "chunks"), (tiny_hybrid, "greedy")],
)
def test_equals_the_same_model_without(make, mode):
    model = make()
    want = generate(model, ReferenceKiviCache(model.config, residual_length=32), **MODES[mode])
    model.compile(backend="eager")
    got = generate(model, ReferenceKiviCache(model.config, residual_length=32), **MODES[mode])
    assert_same(got, want)


@pytest.mark.slow
def test_prompt_lookup():
    model, inputs = tiny_llama(), {"input_ids": prompt(11).repeat(1, 4)}
    options = {"prompt_lookup_num_tokens": 4}
    want = generate(model, KiviCache(model.config), inputs, **options)
    model.forward = torch.compile(model.forward, backend="eager")
    cache = KiviCache(model.config)
    got = generate(model, cache, inputs, **options)
    assert_same(got, want)
    assert cache.rollback == 32


def test_transformers_does_not_compile_by_itself():
    """It would with a cache that says so, and ask for masks of a static size."""
    model = tiny_llama()
    want = generate(model, ReferenceKiviCache(model.config))
    cache, config = ReferenceKiviCache(model.config), CompileConfig(backend="none of these")
    config._compile_all_devices = True
    assert_same(generate(model, cache, compile_config=config), want)


@pytest.mark.slow
def test_inductor():
    model = tiny_llama()
    want = generate(model, KiviCache(model.config, residual_length=32))
    model.compile()
    assert_same(generate(model, KiviCache(model.config, residual_length=32)), want)


@pytest.mark.slow
def test_another_attention_is_still_noticed():
    model = tiny_llama()
    model.set_attn_implementation("sdpa")
    model.compile(backend="eager")
    with pytest.raises(RuntimeError, match="layer 0 did not go through kivi_tvm attention"):
        generate(model, ReferenceKiviCache(model.config))


@pytest.mark.slow
def test_deep_model_shares_what_was_compiled():
    """Without the option, a layer's number is a constant of its code: 8 layers are compiled."""
    model = tiny_llama(num_hidden_layers=10)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    want = generate(model, ReferenceKiviCache(model.config))
    with torch._dynamo.config.patch(allow_unspec_int_on_nn_module=True):
        model.compile(backend=count)
        got = generate(model, ReferenceKiviCache(model.config))
        assert_same(got, want)
        assert len(graphs) < 30
        graphs.clear()
        got = generate(model, ReferenceKiviCache(model.config))
        assert_same(got, want)
        assert not graphs


@pytest.mark.slow
def test_other_caches_need_no_break():
    model = tiny_llama()
    want = generate(model, DynamicCache(config=model.config))
    model.compile(backend="eager", fullgraph=True)
    assert_same(generate(model, DynamicCache(config=model.config)), want)

"""Steps over several layers, growth, reservation and bytes of a cache."""

import copy
import pickle

import pytest
import torch
from caches import (
    assert_same_contents,
    assert_same_outputs,
    buffers,
    contents,
    feed,
    new_cache,
)
from configurations import FEW, config_id, module, with_window
from inputs import draw
from pools import assert_same_bits

from kivi_tvm import layout
from kivi_tvm.runtime.memory import LayerMemory

LAYERS = 3


def layer_inputs(cfg, lengths, steps):
    return [draw(cfg, max(lengths), lengths, steps=steps, seed=i) for i in range(LAYERS)]


def run_layers(cfg, lengths, inputs, steps, explicit):
    """All layers of one cache, `begin` called or implied; outputs by layer."""
    cache = new_cache(cfg, len(lengths), num_layers=LAYERS)
    if explicit:
        cache.begin(max(lengths), lengths)
    for i, x in enumerate(inputs):
        cache.layer(i).prefill(x.k, x.v, lengths)
    outputs = [[] for _ in inputs]
    for step in range(steps):
        if explicit:
            cache.begin(1)
        for i, x in enumerate(inputs):
            args = x.q[step], x.k_new[step], x.v_new[step]
            outputs[i].append(cache.layer(i).decode(*args, return_lse=True))
    return cache, outputs


@pytest.mark.parametrize("explicit", [False, True])
@pytest.mark.parametrize("cfg", FEW, ids=config_id)
def test_layers_are_caches_that_share_lengths(cfg, explicit):
    cfg, lengths, steps = with_window(cfg, cfg.G_k), [200, 17], FEW[0].R + 4
    inputs = layer_inputs(cfg, lengths, steps)
    cache, outputs = run_layers(cfg, lengths, inputs, steps, explicit)
    assert cache.lengths == [n + steps for n in lengths]
    for i, x in enumerate(inputs):
        alone = new_cache(cfg, 2)
        alone.prefill(x.k, x.v, lengths)
        assert_same_outputs(outputs[i], feed(alone, x, steps))
        for row in range(2):
            found, expected = contents(cache, row, i), contents(alone, row)
            for name in expected:
                assert_same_bits(found[name], expected[name], f"layer {i} {name}")


def test_layers_in_any_order():
    cfg, inputs = FEW[0], layer_inputs(FEW[0], [100], 1)
    cache = new_cache(cfg, num_layers=LAYERS)
    for i in (2, 0, 1):
        cache.layer(i).prefill(inputs[i].k, inputs[i].v)
    assert cache.lengths == [100]
    cache.begin(1)
    assert cache.lengths == [101]


@pytest.mark.parametrize("cfg", FEW, ids=config_id)
def test_grown_equals_reserved(cfg):
    """Pages added in a prefill and in many steps change nothing."""
    cfg = with_window(cfg, cfg.G_k)
    steps = 4 * cfg.R + 7
    inputs = draw(cfg, 90, [90, 33], steps=steps)
    grown, reserved = new_cache(cfg, 2), new_cache(cfg, 2)
    reserved.reserve(90 + steps)
    capacity = buffers(reserved)["k_code"].shape[0]
    results = []
    for cache in (grown, reserved):
        cache.prefill(inputs.k, inputs.v, inputs.lengths)
        results.append(feed(cache, inputs, steps))
    assert buffers(reserved)["k_code"].shape[0] == capacity
    assert_same_outputs(*results)
    for row in range(2):
        assert_same_contents(grown, row, reserved, row)


def test_reserved_memory_is_not_replaced():
    inputs = draw(FEW[0], 500, steps=300)
    cache = new_cache(FEW[0])
    cache.reserve(800)
    before = {name: x.data_ptr() for name, x in buffers(cache).items()}
    cache.prefill(inputs.k, inputs.v)
    feed(cache, inputs, 300)
    assert {name: x.data_ptr() for name, x in buffers(cache).items()} == before
    cache.reserve(10)
    assert {name: x.data_ptr() for name, x in buffers(cache).items()} == before


def test_reserve_in_the_middle_keeps_what_is_stored():
    cfg = FEW[0]
    inputs = draw(cfg, 300, steps=4)
    one, other = new_cache(cfg), new_cache(cfg)
    for cache in (one, other):
        cache.prefill(inputs.k, inputs.v)
        feed(cache, inputs, 2)
    one.reserve(5000)
    assert_same_outputs(*(feed(cache, inputs, 2, first=2) for cache in (one, other)))


def test_growth_replaces_one_layer_at_a_time(monkeypatch):
    """While a layer's new pages are made, only that layer has old ones beside them."""
    cfg = FEW[0]
    cache = new_cache(cfg, num_layers=4)
    cache.reserve(1000)
    held = [sum(x.nbytes for x in cache.layer(i).pages.values()) for i in range(4)]
    order = []
    plain = LayerMemory.grow_pages

    def grow(memory, num_pages):
        index = [layer.memory for layer in cache.layers].index(memory)
        order.append(index)
        storages = {
            i: {x.untyped_storage().data_ptr() for x in cache.layer(i).pages.values()}
            for i in range(4)
        }
        plain(memory, num_pages)
        for i in range(4):
            now = {x.untyped_storage().data_ptr() for x in cache.layer(i).pages.values()}
            assert (now == storages[i]) == (i != index)

    monkeypatch.setattr(LayerMemory, "grow_pages", grow)
    cache.reserve(4000)
    assert order == [0, 1, 2, 3]
    assert cache.layer(0).memory.packed_nbytes > 3 * held[0]


@pytest.mark.parametrize("cfg", FEW, ids=config_id)
def test_bytes_by_part(cfg):
    cache = new_cache(cfg, 2, num_layers=2)
    cache.reserve(1000)
    found = cache.nbytes
    pages = buffers(cache)["k_code"].shape[0]
    assert pages >= 2 * layout.num_pages(cfg, layout.packed_keys(cfg, 1000))
    assert found["packed"] == 2 * sum(x.nbytes for x in layout.page_buffers(cfg, pages).values())
    assert found["window"] == 2 * sum(x.nbytes for x in layout.ring_buffers(cfg, 2).values())
    assert found["total"] == sum(n for part, n in found.items() if part != "total")


def test_short_rows_take_no_pages_of_long_ones():
    cfg = FEW[0]
    cache = new_cache(cfg, 2)
    inputs = draw(cfg, 2000, [2000, 5])
    cache.prefill(inputs.k, inputs.v, inputs.lengths)
    assert (cache.page_table[1] == layout.NO_PAGE).all()
    used = layout.num_pages(cfg, layout.packed_keys(cfg, 2000))
    assert buffers(cache)["k_code"].shape[0] <= used + 1


def test_begin_and_lengths():
    cache = new_cache(FEW[0], 2, num_layers=2)
    cache.begin(7, [7, 2])
    assert cache.lengths == [7, 2] and cache.num_layers == 2
    cache.lengths.append(3)
    assert cache.lengths == [7, 2]
    assert "layers=2" in repr(cache) and "[7, 2]" in repr(cache)


def test_reset_drops_a_step_that_is_not_finished():
    cfg = FEW[0]
    inputs = draw(cfg, 40)
    cache = new_cache(cfg, num_layers=2)
    cache.layer(0).prefill(inputs.k, inputs.v)
    cache.reset()
    for i in range(2):
        cache.layer(i).prefill(inputs.k, inputs.v)
    assert cache.lengths == [40]
    assert torch.equal(cache.layer(0).dequantize()[0], cache.layer(1).dequantize()[0])


def test_a_layer_that_was_not_called_yet_cannot_be_read():
    cfg = FEW[0]
    inputs = draw(cfg, 20)
    cache = new_cache(cfg, num_layers=2)
    cache.layer(0).prefill(inputs.k, inputs.v)
    assert cache.layer(0).dequantize()[0].shape[2] == 20
    with pytest.raises(RuntimeError, match="layer 1 was not called"):
        cache.layer(1).dequantize()


def test_deepcopy_copies_and_pickle_says_what_to_use():
    inputs = draw(FEW[0], 40)
    cache = new_cache(FEW[0])
    cache.prefill(inputs.k, inputs.v)
    copied = copy.deepcopy(cache)
    cache.crop(40)
    assert copied.lengths == [40] and cache.lengths == [0]
    with pytest.raises(TypeError, match=r"cache\.save"):
        pickle.dumps(cache)
    made = module(FEW[0])
    assert copy.deepcopy(made) is made and copy.copy(made).cfg == made.cfg
    with pytest.raises(TypeError, match=r"module\.save"):
        pickle.dumps(made)

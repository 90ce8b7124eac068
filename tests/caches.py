"""What a cache holds, row by row, wherever its pages lie; and how tests feed caches."""

from __future__ import annotations

import torch
from configurations import module
from pools import assert_same_bits

from kivi_tvm import layout, reference


def new_cache(cfg, batch_size=1, **options):
    """A cache of the compiled configuration."""
    return module(cfg).new_cache(batch_size=batch_size, **options)


def largest_score(reference, q, scale):
    """max |scaled score| of a step, by which float32 tolerances grow."""
    worst = 0.0
    for row, cached in enumerate(reference.rows):
        k, _ = cached.visible()
        score = q[row].float().unflatten(0, (k.shape[0], -1)) @ k.mT * scale
        worst = max(worst, score.abs().max().item())
    return worst


def buffers(cache, layer=0):
    """The page and ring buffers of one layer by name."""
    held = cache.layer(layer)
    return {**held.pages, **held.windows}


def contents(cache, row, layer=0):
    """Everything that a row has stored, without the places where nothing was written."""
    cfg, slot = cache.cfg, cache.rows.rows[row].slot
    length = cache.rows.body(cache.lengths[row])
    held = buffers(cache, layer)
    keys, values = layout.packed_keys(cfg, length), layout.packed_values(cfg, length)
    pages = cache.page_table[slot, : layout.num_pages(cfg, keys)].long()
    assert (pages >= 0).all()
    token = torch.arange(values, length) % held["k_ring"].shape[2]
    found = {
        "state": cache.rows.state[slot],
        "k_code": _key_codes(cache, _join(held["k_code"][pages], -1))[..., :keys],
        # codes, not words: those of tokens that were taken back stay until others come
        "v_code": _value_codes(cache, _join(held["v_code"][pages], -2))[:, :values],
        "k_ring": held["k_ring"][slot][:, token],
        "v_ring": held["v_ring"][slot][:, token],
    }
    sinks = cache.lengths[row] - length
    for name in ("k_sink", "v_sink"):
        if name in held:
            found[name] = held[name][slot][:, :sinks]
    for name in ("k_scale", "k_zero"):
        found[name] = _join(held[name][pages], -2)[:, : keys // cfg.G_k]
    for name in ("v_scale", "v_zero"):
        found[name] = _join(held[name][pages], -1)[..., :values]
    return found


def _key_codes(cache, words):
    return reference.unpack(words, cache.cfg.key_bits, 1, layout.key_order(cache.module.key))


def _value_codes(cache, words):
    return reference.unpack(words, cache.cfg.value_bits, 1, layout.value_order(cache.module.key))


def assert_same_contents(cache, row, other, other_row, layer=0):
    """Fail unless two rows hold the same bits."""
    expected = contents(other, other_row, layer)
    for name, tensor in contents(cache, row, layer).items():
        assert_same_bits(tensor, expected[name], f"row {row} {name}")


def snapshot(cache):
    """Copies of all that a refused call must not change."""
    found = {
        f"layer {i} {name}": buffer.clone()
        for i in range(cache.num_layers)
        for name, buffer in buffers(cache, i).items()
    }
    return {**found, "state": cache.rows.state.clone(), "page_table": cache.page_table.clone()}


def assert_unchanged(cache, before, lengths):
    """Fail unless the cache is what `snapshot` saw."""
    assert cache.lengths == lengths
    for name, tensor in snapshot(cache).items():
        assert_same_bits(tensor, before[name], name)


def feed(cache, inputs, steps, rows=slice(None), first=0):
    """Decode `steps` of the inputs' steps; their outputs and log-sum-exps."""
    found = []
    for i in range(first, first + steps):
        q, k, v = (x[i, rows] for x in (inputs.q, inputs.k_new, inputs.v_new))
        found.append(cache.decode(q, k, v, return_lse=True))
    return found


def assert_same_outputs(found, expected, rows=slice(None), other=slice(None)):
    """Fail unless the outputs of every step have the same bits."""
    for step, (one, two) in enumerate(zip(found, expected, strict=True)):
        for name, a, b in zip(("out", "lse"), one, two, strict=True):
            assert_same_bits(a[rows], b[other], f"step {step} {name}")


def _join(pages, dim):
    """`[n, H_kv, ...]` pages as one tensor `[H_kv, ...]`, joined along `dim`."""
    return torch.cat(list(pages), dim) if len(pages) else pages.new_zeros(pages.shape[1:])[..., :0]

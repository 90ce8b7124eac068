"""The cache on a CUDA device: against the float64 reference, in batches, on streams, in graphs."""

import math
from dataclasses import replace

import pytest
import torch
from caches import largest_score
from configurations import CONFIGS, FEW, HALF, config_id
from inputs import draw
from pools import assert_same_bits
from tolerance import assert_close, limit

from kivi_tvm import build
from kivi_tvm.config import TILE_TOKENS
from kivi_tvm.layout import one_part_tokens
from kivi_tvm.reference import ReferenceCache
from kivi_tvm.runtime.devices import processors
from kivi_tvm.runtime.layer import BATCH_HEADS, FEW_HEADS, WHOLE_HEADS

pytestmark = pytest.mark.cuda
SHORT_WINDOWS = [replace(cfg, residual_length=32) for cfg in HALF if cfg.key_group_size <= 32]
PIECES = next(cfg for cfg in HALF if cfg.P % TILE_TOKENS and cfg.value_bits == 2)
SOME = [*FEW, *HALF[::6], SHORT_WINDOWS[0], PIECES]
BATCHED = [cfg for cfg in HALF if cfg.D <= 128][::5] + SHORT_WINDOWS[:1]


def cuda_cache(cfg, batch_size, **options):
    return build(cfg, "cuda").new_cache(batch_size=batch_size, device="cuda", **options)


def prefilled(cfg, lengths, steps):
    inputs = draw(cfg, max(lengths), lengths, steps=steps)
    cache = cuda_cache(cfg, len(lengths))
    cache.prefill(inputs.k.cuda(), inputs.v.cuda(), lengths)
    return cache, inputs


def decoded(cache, inputs, i, row=slice(None)):
    step = (inputs.q[i, row], inputs.k_new[i, row], inputs.v_new[i, row])
    return cache.decode(*(x.cuda() for x in step), return_lse=True)


@pytest.mark.parametrize("cfg", [*CONFIGS, *HALF], ids=config_id)
def test_decode(cfg):
    lengths, steps = [cfg.R - 2, 0, cfg.R, 2 * cfg.R - 1, 1500], 3
    cache, inputs = prefilled(cfg, lengths, steps)
    reference = ReferenceCache(cfg, len(lengths))
    reference.prefill(inputs.k, inputs.v, lengths)
    for i in range(steps):
        out, lse = decoded(cache, inputs, i)
        reference.append(inputs.k_new[i], inputs.v_new[i])
        want, want_lse = reference.attend(inputs.q[i])
        worst = largest_score(reference, inputs.q[i], cfg.D**-0.5)
        for row in range(len(lengths)):
            what = f"step {i} row {row}"
            bound = limit(out.dtype, worst, cfg.compute)
            assert_close(out[row].cpu(), want[row], what=what, bound=bound)
            bound = limit(torch.float32, 10 * worst, cfg.compute)
            assert_close(lse[row].cpu(), want_lse[row], what=f"{what} lse", bound=bound)
    dense = [x.cpu() for x in cache.dequantize()]
    for row, cached in enumerate(reference.rows):
        for found, want in zip(dense, cached.visible(), strict=True):
            assert_same_bits(found[row, :, : want.shape[1]], want.to(found.dtype), f"row {row}")


@pytest.mark.parametrize("cfg", SOME, ids=config_id)
def test_extend(cfg):
    lengths, n = [700, 3, cfg.R], 21
    cache, inputs = prefilled(cfg, lengths, n)
    reference = ReferenceCache(cfg, len(lengths))
    reference.prefill(inputs.k, inputs.v, lengths)
    # [n, B, heads, D] -> [B, heads, n, D]
    q, k, v = (x.movedim(0, 2).contiguous() for x in (inputs.q, inputs.k_new, inputs.v_new))
    out = cache.extend(q.cuda(), k.cuda(), v.cuda())
    want = reference.extend(q, k, v)
    for row in range(len(lengths)):
        bound = limit(out.dtype, 100.0, cfg.compute)
        assert_close(out[row].cpu(), want[row], what=f"row {row}", bound=bound)


def displaced(x):
    """The same numbers where few rows begin at multiples of 16 bytes."""
    wide = torch.empty(*x.shape[:-1], x.shape[-1] + 3, dtype=x.dtype, device=x.device)
    found = wide[..., 1:-2]
    return found.copy_(x)


@pytest.mark.parametrize("cfg", SOME, ids=config_id)
def test_inputs_may_lie_anywhere(cfg):
    lengths = [700, 3, cfg.R]
    cache, inputs = prefilled(cfg, lengths, 3)
    other = cuda_cache(cfg, len(lengths))
    other.prefill(inputs.k.cuda(), inputs.v.cuda(), lengths)
    q, k, v = (x.cuda() for x in (inputs.q, inputs.k_new, inputs.v_new))
    assert torch.equal(
        cache.decode(q[0], k[0], v[0]), other.decode(*map(displaced, (q[0], k[0], v[0])))
    )
    step = [x[1:].movedim(0, 2).contiguous() for x in (q, k, v)]
    assert torch.equal(cache.extend(*step), other.extend(*map(displaced, step)))


@pytest.mark.parametrize("cfg", SOME, ids=config_id)
def test_a_row_alone_gives_the_bits_of_a_batch(cfg):
    lengths = [2500, 17, cfg.R, 1100]
    cache, inputs = prefilled(cfg, lengths, 2)
    together = [decoded(cache, inputs, i) for i in range(2)]
    for row, length in enumerate(lengths):
        alone = cuda_cache(cfg, 1)
        part = slice(row, row + 1)
        alone.prefill(inputs.k[part, :, :length].cuda(), inputs.v[part, :, :length].cuda())
        for i in range(2):
            found = decoded(alone, inputs, i, part)
            for one, all_rows in zip(found, together[i], strict=True):
                assert_same_bits(one[0].cpu(), all_rows[row].cpu(), f"row {row} step {i}")


@pytest.mark.parametrize("cfg", BATCHED, ids=config_id)
@pytest.mark.parametrize(("name", "heads"), [("combine_window", 2), ("combine_batch", BATCH_HEADS)])
def test_batches_give_the_bits_of_few_rows(name, heads, cfg):
    """Other kernels end the step of so many KV heads for each multiprocessor."""
    lengths = [2500, 17, cfg.R, 1100, cfg.R + 300]
    cache, inputs = prefilled(cfg, lengths, 2)
    fits = len(lengths) * cfg.H <= FEW_HEADS * processors(torch.device("cuda"))
    of_few = "combine_few" if cfg.M > 2 and fits else "combine_window"
    assert cache.layer(0)._combine_window is cache.kernels[of_few]
    few = [decoded(cache, inputs, i) for i in range(2)]
    cache, _ = prefilled(cfg, lengths, 2)
    times = 1 + heads * processors(torch.device("cuda")) // (len(lengths) * cfg.H_kv)
    cache.repeat(times)
    assert cache.layer(0)._combine_window is cache.kernels[name]
    for i in range(2):
        given = (x[i] for x in (inputs.q, inputs.k_new, inputs.v_new))
        step = (x.cuda().repeat_interleave(times, 0) for x in given)
        for one, all_rows in zip(few[i], cache.decode(*step, return_lse=True), strict=True):
            assert_same_bits(all_rows.cpu(), one.cpu().repeat_interleave(times, 0), f"step {i}")


def batched(cfg, lengths, steps, heads):
    """A cache with every row so many times that a GPU has `heads` KV heads to a multiprocessor."""
    cache, inputs = prefilled(cfg, lengths, steps)
    times = 1 + heads * processors(torch.device("cuda")) // (len(lengths) * cfg.H_kv)
    cache.repeat(times)
    given = (inputs.q, inputs.k_new, inputs.v_new)
    return (
        cache,
        times,
        [[x[i].cuda().repeat_interleave(times, 0) for x in given] for i in range(steps)],
    )


@pytest.mark.parametrize("cfg", BATCHED, ids=config_id)
def test_batches_of_short_rows_give_the_bits_of_few_rows(cfg):
    """One kernel attends to all that they have, until one of them is too long."""
    longest = one_part_tokens(cfg.kernel_key())
    grows = cfg.R <= 64  # it is looked at again when a key block is due
    lengths, steps = [longest - 1, 17, cfg.R, longest // 2], cfg.R + 3 if grows else 4
    cache, inputs = prefilled(cfg, lengths, steps)
    few = [decoded(cache, inputs, i) for i in range(steps)]
    cache, times, given = batched(cfg, lengths, steps, WHOLE_HEADS)
    assert cache.layer(0)._attend_batch is cache.kernels["attend_batch"]
    at_once = 0
    for i in range(steps):
        results = cache.decode(*given[i], return_lse=True)
        at_once += cache.workspace.one_part
        if i < 3 or i >= steps - 4:
            for one, all_rows in zip(few[i], results, strict=True):
                assert_same_bits(all_rows, one.repeat_interleave(times, 0), f"step {i}")
    assert 0 < at_once < steps + (not grows)


@pytest.mark.parametrize("cfg", BATCHED[:2], ids=config_id)
def test_a_batch_of_short_rows_in_a_graph(cfg):
    lengths = [one_part_tokens(cfg.kernel_key()) // 2, 17]
    cache, _, given = batched(cfg, lengths, 4, WHOLE_HEADS)
    want = [cache.decode(*given[i]) for i in range(4)]
    cache, _, given = batched(cfg, lengths, 4, WHOLE_HEADS)
    cache.decode(*given[0])
    assert cache.workspace.one_part
    static, out = [x.clone() for x in given[1]], torch.empty_like(want[1])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.decode(*static, out=out)
    for i in (1, 2, 3):
        for held, new in zip(static, given[i], strict=True):
            held.copy_(new)
        graph.replay()
        assert_same_bits(out.cpu(), want[i].cpu(), f"step {i}")


@pytest.mark.parametrize("length", [2500, 4300])
def test_rows_grow_where_their_parts_have_become_longer(length):
    """They have fewer parts than shorter ones: the host sees to pages and room all the same."""
    cfg = replace(FEW[0], compute="half", page_size=64)
    steps = cfg.R + cfg.P + 1
    cache, inputs = prefilled(cfg, [length], steps)
    reference = ReferenceCache(cfg, 1)
    reference.prefill(inputs.k, inputs.v, [length])
    for i in range(steps):
        out, _ = decoded(cache, inputs, i)
        reference.append(inputs.k_new[i], inputs.v_new[i])
    want, _ = reference.attend(inputs.q[-1])
    worst = largest_score(reference, inputs.q[-1], cfg.D**-0.5)
    assert_close(out[0].cpu(), want[0], bound=limit(out.dtype, worst, cfg.compute))


def test_on_a_stream_of_its_own():
    cfg = FEW[0]
    cache, inputs = prefilled(cfg, [900], 3)
    want = [decoded(cache, inputs, i) for i in range(3)]
    other, _ = prefilled(cfg, [900], 3)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        found = [decoded(other, inputs, i) for i in range(3)]
    stream.synchronize()
    for one, two in zip(found, want, strict=True):
        assert_same_bits(one[0].cpu(), two[0].cpu())


def test_decode_step_in_a_graph():
    """A step without host work is captured as it is, and replayed where it left off."""
    cfg = FEW[0]
    length = 10 * cfg.R + 2
    cache, inputs = prefilled(cfg, [length, length - 1], 3)
    want = [decoded(cache, inputs, i)[0] for i in range(3)]
    cache, _ = prefilled(cfg, [length, length - 1], 3)
    decoded(cache, inputs, 0)
    static = [x.cuda() for x in (inputs.q[1], inputs.k_new[1], inputs.v_new[1])]
    out = torch.empty_like(static[0])
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cache.decode(*static, out=out)
    for i in (1, 2):
        for held, new in zip(static, (inputs.q, inputs.k_new, inputs.v_new), strict=True):
            held.copy_(new[i])
        graph.replay()
        assert_same_bits(out.cpu(), want[i].cpu(), f"step {i}")


def test_a_finished_row_is_left_alone():
    cfg = FEW[0]
    cache, inputs = prefilled(cfg, [500, 600], 2)
    cache.free(1)
    out, lse = decoded(cache, inputs, 0)
    assert not out[1].any()
    assert (lse[1] == -math.inf).all()

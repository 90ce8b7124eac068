"""What a cache refuses: the error names argument, rule and value, and nothing has changed."""

import math

import numpy as np
import pytest
import torch
from caches import assert_same_outputs, assert_unchanged, feed, new_cache, snapshot
from configurations import FEW
from inputs import draw

from kivi_tvm.runtime.checks import INDEX_LIMIT

CFG = FEW[2]  # float32, 16 query heads on 2
B, D, H, H_KV, T = 2, CFG.D, CFG.H, CFG.H_kv, 40
Q, KV = (B, H, D), (B, H_KV, D)


@pytest.fixture
def inputs():
    return draw(CFG, T, batch_size=B, steps=3)


def filled(inputs, **options):
    cache = new_cache(CFG, B, **options)
    cache.prefill(inputs.k, inputs.v)
    feed(cache, inputs, 1)
    return cache


def refused(cache, kind, words, call):
    """Fail unless `call` raises, with all words in the message, and changes nothing."""
    before, lengths = snapshot(cache), cache.lengths
    with pytest.raises(kind) as error:
        call()
    for word in words:
        assert word in str(error.value)
    assert_unchanged(cache, before, lengths)


def transposed(x):
    """The same shape with inner stride other than 1."""
    return torch.zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2]


def spread(x):
    """The same shape with heads so far apart that an int32 cannot index all; no memory is used."""
    B, H = x.shape[:2]
    size, apart = x[0, 0].numel(), -(-INDEX_LIMIT // (H - 1))
    whole = np.zeros((H - 1) * apart + B * size, "float32")  # torch would fill it
    return torch.from_numpy(whole).as_strided(x.shape, (size, apart, *x.contiguous().stride()[2:]))


BAD_TENSORS = {
    "a list": (lambda x: x.tolist(), TypeError, ["must be a torch tensor", "list"]),
    "dtype": (lambda x: x.half(), TypeError, ["torch.float32", "torch.float16"]),
    "device": (lambda x: x.to("meta"), ValueError, ["must be on cpu", "meta"]),
    "rank": (lambda x: x[0], ValueError, ["must have shape"]),
    "batch": (lambda x: x[:1], ValueError, ["must have shape"]),
    "heads": (lambda x: x[:, 1:], ValueError, ["must have shape"]),
    "head_dim": (lambda x: x[..., 1:], ValueError, ["must have shape", str(D), str(D - 1)]),
    "stride": (transposed, ValueError, ["inner stride 1", "strides"]),
    "span": (spread, ValueError, ["less than 2^31 elements", "contiguous"]),
    "negated": (torch._neg_view, ValueError, ["negated view", "resolve_neg"]),
    "gradient": (lambda x: x.clone().requires_grad_(), ValueError, ["gradients", "inference"]),
}


@pytest.mark.parametrize("name", ["q", "k_new", "v_new", "out"])
@pytest.mark.parametrize("what", BAD_TENSORS)
def test_decode(inputs, name, what):
    spoil, kind, words = BAD_TENSORS[what]
    cache, good = filled(inputs), filled(inputs)
    args = {"q": inputs.q[1], "k_new": inputs.k_new[1], "v_new": inputs.v_new[1]}
    bad = {**args, name: spoil(args.get(name, torch.zeros(Q)))}
    refused(cache, kind, [f"`{name}`", *words], lambda: cache.decode(**bad))
    found, expected = (feed(c, inputs, 2, first=1) for c in (cache, good))
    assert_same_outputs(found, expected)


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("what", BAD_TENSORS)
def test_prefill(inputs, name, what):
    spoil, kind, words = BAD_TENSORS[what]
    cache = new_cache(CFG, B)
    args = {"k": inputs.k, "v": inputs.v}
    bad = {**args, name: spoil(args[name])}
    refused(cache, kind, [f"`{name}`", *words], lambda: cache.prefill(**bad))
    cache.prefill(**args)
    feed(cache, inputs, 1)
    assert_same_outputs(*(feed(c, inputs, 2, first=1) for c in (cache, filled(inputs))))


@pytest.mark.parametrize(
    ("lengths", "kind", "words"),
    [
        ([-1, 3], ValueError, ["0..40", "{0: -1}"]),
        ([40, 41], ValueError, ["0..40", "{1: 41}"]),
        ([40], ValueError, ["one entry per row (2)", "got 1"]),
        ([40, 40, 40], ValueError, ["one entry per row (2)", "got 3"]),
        ([1.5, 2], TypeError, ["ints", "1.5"]),
        ([True, 2], TypeError, ["ints", "True"]),
        (7, TypeError, ["ints", "7"]),
        ("12", TypeError, ["ints", "12"]),
        (torch.tensor([1.0, 2.0]), TypeError, ["1-D tensor of ints", "float32"]),
        (torch.tensor([[1, 2]]), TypeError, ["1-D tensor of ints", "2-D"]),
        (torch.tensor([True, False]), TypeError, ["1-D tensor of ints", "bool"]),
    ],
    ids=str,
)
def test_lengths(inputs, lengths, kind, words):
    cache = new_cache(CFG, B)
    words = ["`lengths`", *words]
    refused(cache, kind, words, lambda: cache.prefill(inputs.k, inputs.v, lengths))
    refused(cache, kind, words, lambda: cache.begin(T, lengths))
    cache.prefill(inputs.k, inputs.v)
    assert cache.lengths == [T, T]


def test_k_and_v_of_different_lengths(inputs):
    cache = new_cache(CFG, B)
    words = ["`v` must have shape", "40", "39"]
    refused(cache, ValueError, words, lambda: cache.prefill(inputs.k, inputs.v[:, :, 1:]))


@pytest.mark.parametrize(
    "scale",
    ["1", b"1", [1.0], torch.ones(2), torch.tensor(True), True, math.nan, -math.inf, 1e39],
    ids=str,
)
def test_scale(inputs, scale):
    cache, words = filled(inputs), ["`scale`", "finite number of float32", repr(scale)]
    args = inputs.q[1], inputs.k_new[1], inputs.v_new[1]
    refused(cache, ValueError, words, lambda: cache.decode(*args, scale))
    refused(
        cache, ValueError, words, lambda: cache.extend(*(x[:, :, None] for x in args), scale=scale)
    )


def test_prefill_of_a_cache_that_holds_tokens(inputs):
    cache = filled(inputs)
    words = ["`prefill`", "empty", "[41, 41]", "reset()"]
    refused(cache, RuntimeError, words, lambda: cache.prefill(inputs.k, inputs.v))
    assert_same_outputs(*(feed(c, inputs, 2, first=1) for c in (cache, filled(inputs))))


def test_more_than_max_tokens(inputs):
    cache = filled(inputs, max_tokens=T + 2)
    words = ["`max_tokens`=42", "[42, 42]", "[1, 1]"]
    feed(cache, inputs, 1, first=1)
    refused(cache, ValueError, words, lambda: feed(cache, inputs, 1, first=2))
    small = new_cache(CFG, B, max_tokens=T - 1)
    words = ["`max_tokens`=39", "[40, 40]"]
    refused(small, ValueError, words, lambda: small.prefill(inputs.k, inputs.v))
    small.prefill(inputs.k, inputs.v, [39, 2])
    assert small.lengths == [39, 2]


@pytest.mark.parametrize("tokens", [-1, 1.5, True, "9"])
def test_reserve(tokens):
    cache = new_cache(CFG, B)
    words = ["`tokens`", "int of at least 0", repr(tokens)]
    refused(cache, ValueError, words, lambda: cache.reserve(tokens))


def test_reserve_above_max_tokens():
    cache = new_cache(CFG, B, max_tokens=100)
    words = ["`tokens`", "max_tokens=100", "101"]
    refused(cache, ValueError, words, lambda: cache.reserve(101))


def test_reserve_more_than_a_kernel_can_index(inputs):
    cache, good = filled(inputs), filled(inputs)
    words = ["less than 2^31 elements", "shorter sequences"]
    refused(cache, ValueError, words, lambda: cache.reserve(10**12))
    found, expected = (feed(c, inputs, 2, first=1) for c in (cache, good))
    assert_same_outputs(found, expected)


@pytest.mark.parametrize("n", [-1, 1.0, True, None])
def test_begin(n):
    cache = new_cache(CFG, B)
    refused(cache, ValueError, ["`n`", "int of at least 0", repr(n)], lambda: cache.begin(n))


@pytest.mark.parametrize("n", [True, 1.0])
def test_begin_takes_only_ints_between_quick_steps(inputs, n):
    cache = filled(inputs)
    feed(cache, inputs, 1, first=1)
    refused(cache, ValueError, ["`n`", repr(n)], lambda: cache.begin(n))


def test_out_that_overlaps_itself(inputs):
    cache = filled(inputs)
    args = inputs.q[1], inputs.k_new[1], inputs.v_new[1]
    out = torch.empty(1, CFG.H, CFG.D).expand(B, -1, -1)
    words = ["`out`", "overlap", "(0, "]
    refused(cache, ValueError, words, lambda: cache.decode(*args, out=out))


@pytest.mark.parametrize("index", [-1, 2, 7])
def test_layer_index(index):
    cache = new_cache(CFG, B, num_layers=2)
    refused(cache, IndexError, ["`index`", "0..1", str(index)], lambda: cache.layer(index))


def test_a_layer_called_twice(inputs):
    cache = new_cache(CFG, B, num_layers=2)
    first, second = cache.layer(0), cache.layer(1)
    first.prefill(inputs.k, inputs.v)
    words = ["layer 0", "already called", "[1]"]
    refused(cache, RuntimeError, words, lambda: first.prefill(inputs.k, inputs.v))
    second.prefill(inputs.k, inputs.v)
    args = inputs.q[0], inputs.k_new[0], inputs.v_new[0]
    second.decode(*args)
    refused(cache, RuntimeError, ["layer 1", "[0]"], lambda: second.decode(*args))
    first.decode(*args)
    assert cache.lengths == [T + 1] * B


def test_a_step_begun_before_the_last_is_finished(inputs):
    cache = new_cache(CFG, B, num_layers=2)
    cache.layer(1).prefill(inputs.k, inputs.v)
    words = ["previous step", "[0]", "reset()"]
    refused(cache, RuntimeError, words, lambda: cache.begin(1))
    cache.layer(0).prefill(inputs.k, inputs.v)
    cache.begin(1)


def test_a_bad_tensor_in_the_middle_of_a_step(inputs):
    """The step stays open: the same layer can be called again."""
    cache = new_cache(CFG, B, num_layers=2)
    cache.layer(0).prefill(inputs.k, inputs.v)
    layer = cache.layer(1)
    refused(cache, TypeError, ["`v`"], lambda: layer.prefill(inputs.k, inputs.v.half()))
    layer.prefill(inputs.k, inputs.v)
    assert torch.equal(cache.layer(0).dequantize()[0], layer.dequantize()[0])


def test_another_number_of_tokens_than_the_steps(inputs):
    cache = new_cache(CFG, B)
    cache.begin(T, [T, 1])
    args = inputs.q[0], inputs.k_new[0], inputs.v_new[0]
    refused(cache, RuntimeError, ["[40, 1]", "[1, 1]"], lambda: cache.decode(*args))
    cut = inputs.k[:, :, 1:], inputs.v[:, :, 1:]
    refused(cache, RuntimeError, ["[40, 1]", "[39, 39]"], lambda: cache.prefill(*cut))
    cache.prefill(inputs.k, inputs.v, [T, 1])


def test_decode_in_a_ragged_step(inputs):
    """A decode takes one token of every row; a step that gives some rows none is a prefill's."""
    cache = new_cache(CFG, B)
    cache.begin(1, [1, 0])
    args = inputs.q[0], inputs.k_new[0], inputs.v_new[0]
    refused(cache, RuntimeError, ["[1, 0]", "[1, 1]"], lambda: cache.decode(*args))


@pytest.mark.parametrize("call", ["prefill", "decode", "dequantize"])
def test_calls_on_a_cache_of_several_layers(inputs, call):
    cache = new_cache(CFG, B, num_layers=2)
    args = {"prefill": (inputs.k, inputs.v), "dequantize": ()}
    args["decode"] = inputs.q[0], inputs.k_new[0], inputs.v_new[0]
    words = [f"cache.{call}", "num_layers=1", "got 2", f"cache.layer(i).{call}"]
    refused(cache, ValueError, words, lambda: getattr(cache, call)(*args[call]))


def test_numbers_of_other_libraries():
    cache = new_cache(CFG, 2)
    inputs = draw(CFG, 9)
    k = inputs.k.repeat(2, 1, 1, 1)
    cache.prefill(k, k, rows=np.array([1, 0]))
    assert cache.crop(np.int64(2)).exact and cache.crop(torch.tensor([1, 0])).exact
    cache.reorder(np.array([1, 0]))
    assert cache.lengths == [7, 6] and cache.fork(np.int32(0)) == 2
    cache.repeat(np.int64(2))
    assert cache.lengths == [7, 7, 6, 6, 7, 7]
    for wrong in (True, 1.0, np.bool_(True), torch.tensor([True] * 6), np.ones(6)):
        with pytest.raises((TypeError, ValueError), match="`c`"):
            cache.crop(wrong)
    with pytest.raises(TypeError, match="`index`"):
        cache.layer("0")

"""Several tokens on a filled `KiviCache`: chunked prefill and continued chats."""

from __future__ import annotations

import pytest
import torch
from hf import smollm2
from hf.compare import MAX_ERROR, compare, talk
from hf.tape import RecordingTorchCache, ReplayingCache
from hf.tiny import pad, prompt, tiny_hybrid, tiny_llama
from transformers import DynamicCache

from kivi_tvm.hf import KiviCache
from kivi_tvm.hf.reference_cache import ReferenceKiviCache

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # as in test_cache.py
R = 128
MAX_EXCUSED = 0.01


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def turn(*lengths, side="left", seed=0, source=None):
    """New columns with so many real tokens in each row; of the text `source`, if given."""
    rows = [
        prompt(n, seed=100 * seed + i)[0]
        if source is None
        else source[500 * i + 100 * seed : 500 * i + 100 * seed + n]
        for i, n in enumerate(lengths)
    ]
    return pad(rows, side)


def interior():
    """Padding at the left, inside and at the right of the new columns."""
    ids, mask = prompt(9, 2, seed=5), torch.ones(2, 9, dtype=torch.long)
    mask[0, [0, 4, 5]] = mask[1, [2, 3, 7]] = 0
    return {"input_ids": ids, "attention_mask": mask}


def chunks(inputs, size, steps):
    """`inputs` as turns of `size` columns; the last one goes on with decode steps."""
    pieces = zip(*(inputs[name].split(size, 1) for name in ("input_ids", "attention_mask")))
    turns = [({"input_ids": ids, "attention_mask": mask}, 0) for ids, mask in pieces]
    return [*turns[:-1], (turns[-1][0], steps)]


IN_WINDOW = {
    "chunked": lambda: chunks(turn(40), 7, 6),
    "chunked-left": lambda: chunks(turn(33, 5, 19), 8, 6),
    "chunked-right": lambda: chunks(turn(33, 5, 19, side="right"), 8, 0),
    "chat": lambda: [(turn(9), 4), (turn(20, seed=1), 3), (turn(1, seed=2), 2)],
    "chat-left": lambda: [(turn(9, 4), 4), (turn(3, 20, seed=1), 3), (turn(2, 1, seed=2), 5)],
    "chat-interior": lambda: [(turn(5, 12), 3), (interior(), 4), (interior(), 3)],
    "silent-row": lambda: [(turn(9, 4), 2), (turn(3, 0, side="right"), 0), (turn(1, 2), 4)],
    "one-column": lambda: [(turn(9, 4), 2), (turn(1, 0), 0), (turn(0, 1), 0), (turn(2, 2), 3)],
    "empty-column": lambda: [
        (turn(9, 4), 2),
        ({"input_ids": prompt(1, 2), "attention_mask": torch.zeros(2, 1, dtype=torch.long)}, 0),
        (turn(2, 2), 3),
    ],
}


@pytest.mark.parametrize("name", IN_WINDOW)
def test_equals_full_precision_within_the_window(llama, name):
    turns = IN_WINDOW[name]()
    want = talk(llama, DynamicCache(config=llama.config), turns)
    cache = ReferenceKiviCache(llama.config)
    got = talk(llama, cache, turns, want.tokens)
    torch.testing.assert_close(got.logits, want.logits, **CLOSE)
    tokens = sum(inputs["attention_mask"].sum(1) + steps for inputs, steps in turns)
    assert cache.lengths == tokens.tolist()
    columns = sum(inputs["input_ids"].shape[1] + steps for inputs, steps in turns)
    assert cache.get_seq_length() == columns


@pytest.mark.parametrize("first", ["sliding_attention", "full_attention"])
@pytest.mark.parametrize("name", ["chunked-left", "chat", "chat-interior"])
def test_hybrid_model(name, first):
    second = {"sliding_attention": "full_attention", "full_attention": "sliding_attention"}[first]
    model, turns = tiny_hybrid((first, second)), IN_WINDOW[name]()
    want = talk(model, DynamicCache(config=model.config), turns)
    got = talk(model, ReferenceKiviCache(model.config), turns, want.tokens)
    torch.testing.assert_close(got.logits, want.logits, **CLOSE)


def test_refused_step_of_a_hybrid_model_is_noticed():
    model = tiny_hybrid()
    cache = ReferenceKiviCache(model.config)
    talk(model, cache, [(turn(9, 6), 0)])
    mask = torch.ones(2, 12, dtype=torch.long)
    with torch.no_grad(), pytest.raises(NotImplementedError, match="newly visible"):
        model(prompt(3, 2), attention_mask=mask, past_key_values=cache)
    mask[1, :3] = 0
    with torch.no_grad(), pytest.raises(RuntimeError, match="seen 15 columns instead of 12"):
        model(prompt(3, 2), attention_mask=mask, past_key_values=cache)
    cache.reset()
    talk(model, cache, [(turn(9, 6), 1)])


def test_padding_of_a_later_turn_is_remembered(llama):
    cache = ReferenceKiviCache(llama.config)
    talk(llama, cache, [(turn(9, 6), 2), (turn(3, 5, seed=1), 2)])
    mask = torch.ones(2, 19, dtype=torch.long)
    mask[1, :3] = 0
    step = {"attention_mask": mask, "past_key_values": cache}
    with torch.no_grad(), pytest.raises(NotImplementedError, match="row 0, column 11 newly vis"):
        llama(prompt(1, 2), **step)
    mask[0, 11:13] = 0
    with torch.no_grad():
        llama(prompt(1, 2), **step)
    assert cache.lengths == [17, 16]


@pytest.mark.parametrize("make", [lambda: turn(40), lambda: turn(33, 5, 19)], ids=["one", "left"])
@pytest.mark.parametrize("size", [1, 7, 16])
def test_generate_with_chunked_prefill(llama, make, size):
    options = {"max_new_tokens": 8, "do_sample": False}
    want = llama.generate(**make(), **options)
    cache = ReferenceKiviCache(llama.config)
    got = llama.generate(**make(), past_key_values=cache, prefill_chunk_size=size, **options)
    assert torch.equal(got, want)


@pytest.mark.parametrize("lengths", [[(9,), (12,), (3,)], [(9, 4), (3, 20), (5, 1)]], ids=str)
def test_generate_three_turns(llama, lengths):
    outputs = []
    for cache in (DynamicCache(config=llama.config), ReferenceKiviCache(llama.config)):
        ids = mask = torch.zeros(len(lengths[0]), 0, dtype=torch.long)
        for i, each in enumerate(lengths):
            new = turn(*each, seed=i)
            ids = torch.cat([ids, new["input_ids"]], 1)
            mask = torch.cat([mask, new["attention_mask"]], 1)
            ids = llama.generate(
                ids, attention_mask=mask, past_key_values=cache, max_new_tokens=5, do_sample=False
            )
            mask = torch.cat([mask, mask.new_ones(len(mask), 5)], 1)
        outputs.append(ids)
    assert torch.equal(*outputs)


def check(model, turns, bits):
    """The compiled cache against the plain-torch KIVI, as in test_conformance.py."""
    options = {"key_bits": bits, "value_bits": bits, "residual_length": R}
    reference = RecordingTorchCache(model.config, **options)
    want = talk(model, reference, turns)
    shared = ReplayingCache(model.config, tape=reference.tape, **options)
    got = talk(model, shared, turns, want.tokens)
    result = compare(got.logits, want.logits)
    print(f"\n{bits} bits, stored keys and values shared: {result}")
    print(f"  keys and values the model made: relative L2 at most {reference.tape.worst:.1e}")
    assert result.excused <= MAX_EXCUSED * result.positions
    assert reference.tape.worst < MAX_ERROR

    own = KiviCache(model.config, **options)
    got = talk(model, own, turns, want.tokens)
    assert own.lengths == shared.lengths == reference.lengths
    clean = want.clean(R)
    result = compare(got.logits[clean], want.logits[clean])
    print(f"  its own, nothing but the first turn quantized: {result}")
    assert result.excused <= MAX_EXCUSED * result.positions
    if not clean.all():
        print(f"  its own, after: {compare(got.logits[~clean], want.logits[~clean])}")


def quantized(source=None):
    """Turns that quantize keys and values in the middle of chunks."""

    def make(*lengths, seed=0):
        return turn(*lengths, seed=seed, source=source)

    return {
        "chunked": chunks(make(300), 100, 4),
        "chunked-left": chunks(make(300, 40, 129), 64, 4),
        "chat": [(make(140), 3), (make(130, seed=1), 3), (make(5, seed=2), 4)],
        "chat-left": [(make(140, 30), 3), (make(20, 135, seed=1), 3), (make(150, 1, seed=2), 4)],
    }


@pytest.mark.parametrize("name", ["chunked", "chunked-left", "chat", "chat-left"])
@pytest.mark.parametrize("bits", [2, 4])
def test_conformance_of_a_tiny_model(llama, name, bits):
    check(llama, quantized()[name], bits)


@pytest.mark.slow
@pytest.mark.skipif(smollm2.missing() is not None, reason=f"SmolLM2: {smollm2.missing()}")
@pytest.mark.parametrize("name", ["chunked", "chunked-left", "chat", "chat-left"])
def test_conformance_of_smollm2(name):
    model, text = smollm2.load()
    check(model, quantized(text)[name], bits=2)

"""The compiled cache against a plain-torch KIVI in the same model, on the reference's tokens.

Each case is run twice. With the reference's keys and values stored (see `tape.py`), every
position counts. With the cache's own, positions count until the first generated token is
quantized; from there a flipped code may legitimately move the logits, and the test prints by how
much.
"""

from __future__ import annotations

import pytest
import torch
from hf import smollm2
from hf.compare import MAX_ERROR, compare, run
from hf.tape import RecordingTorchCache, ReplayingCache, distance
from hf.tiny import pad, prompt, tiny_llama
from transformers import DynamicCache

from kivi_tvm.hf import KiviCache

R = 128
MAX_EXCUSED = 0.01
LENGTHS = (1, 127, 128, 300, 1500)


@pytest.fixture(autouse=True)
def one_thread():
    """Reference and cache alternate small operations: a second thread mostly waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def before_quantized(lengths, steps):
    """bool `[steps, B]`: no generated key or value has been quantized yet."""
    step = torch.arange(steps)[:, None]
    flush = torch.tensor([(n // R + 1) * R - n - 1 for n in lengths])
    return (step < flush) & (step < R)


def check(model, inputs, bits, steps):
    options = {"key_bits": bits, "value_bits": bits, "residual_length": R}
    lengths = inputs["attention_mask"].sum(1).tolist()
    reference = RecordingTorchCache(model.config, **options)
    want, tokens = run(model, reference, inputs, steps)

    shared = ReplayingCache(model.config, tape=reference.tape, **options)
    got, _ = run(model, shared, inputs, steps, tokens)
    result = compare(got, want)
    print(f"\nprompts {lengths}, {bits} bits, stored keys and values shared: {result}")
    print(f"  keys and values the model made: relative L2 at most {reference.tape.worst:.1e}")
    assert result.excused <= MAX_EXCUSED * result.positions
    assert reference.tape.worst < MAX_ERROR

    own = KiviCache(model.config, **options)
    got, _ = run(model, own, inputs, steps, tokens)
    assert own.lengths == shared.lengths == [n + steps for n in lengths]
    for name, which in (
        ("before", before_quantized(lengths, steps)),
        ("after", ~before_quantized(lengths, steps)),
    ):
        if not which.any():
            continue
        result = compare(got[which], want[which])
        print(f"  its own, {name} generated tokens are quantized: {result}")
        if name == "before":
            assert result.excused <= MAX_EXCUSED * result.positions


def single(ids):
    return {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None]}


@pytest.mark.parametrize("bits", [2, 4])
def test_tiny_model(bits):
    model = tiny_llama()
    for n in (1, 127, 128, 300):
        check(model, single(prompt(n)[0]), bits, steps=12)
    check(model, pad([prompt(n, seed=n)[0] for n in (1, 127, 128, 300)]), bits, steps=12)


@pytest.mark.slow
@pytest.mark.skipif(smollm2.missing() is not None, reason=f"SmolLM2: {smollm2.missing()}")
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("lengths", [*[(n,) for n in LENGTHS], LENGTHS], ids=str)
def test_smollm2(bits, lengths):
    model, text = smollm2.load()
    # Other passages for other rows, so that rows cannot be mistaken for each other.
    rows = [text[500 * i : 500 * i + n] for i, n in enumerate(lengths)]
    check(model, pad(rows), bits, steps=100)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_within_the_window(dtype):
    model = tiny_llama().to(dtype)
    inputs = pad([prompt(n, seed=n)[0] for n in (5, 33)])
    want, tokens = run(model, DynamicCache(config=model.config), inputs, steps=12)
    got, _ = run(model, KiviCache(model.config), inputs, 12, tokens)
    # One rounding to the dtype per layer and operation: 2^-8 for bfloat16, a few of them.
    assert distance(got.float(), want.float()) < 0.03

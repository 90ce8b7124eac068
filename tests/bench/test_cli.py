"""`kivi-tvm bench` from outside: one JSON object, one line per error."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from kivi_tvm.cli import main

SMALL = ["--model", "smollm2-135m", "--dtype", "float32", "--rounds", "1"]


def bench(*arguments):
    command = [sys.executable, "-m", "kivi_tvm", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_attention_prints_one_object_and_appends_records(tmp_path):
    path = tmp_path / "records.jsonl"
    options = ["--tokens", "300", "--state", "warm", "--peers", "torch-matmul-fp32"]
    done = bench("attention", *SMALL, *options, "--output", str(path), "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    ours, peer = result["records"]
    assert (ours["provider"], peer["provider"]) == ("kivi-tvm", "torch-matmul-fp32")
    assert ours["passed"] and ours["error"] <= 1e-5
    assert 0 < ours["p20_us"] <= ours["p50_us"] <= ours["p80_us"]
    assert [json.loads(line) for line in path.read_text().splitlines()] == result["records"]


def test_overhead_names_its_kernels():
    done = bench("overhead", *SMALL, "--json")
    result = json.loads(done.stdout)
    assert result["benchmark"] == "overhead"
    assert {"append", "advance", "attend"} <= set(result["kernels_us"])
    assert all(time_us > 0 for time_us in result["kernels_us"].values())
    assert 0 < result["overhead"]["p50_us"] < result["call"]["p50_us"]
    # The limit itself is for a quiet machine; the exit status says how this run went.
    assert done.returncode == (0 if result["passed"] else 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "gpt-9"], ("`--model` must be one of", "'gpt-9'")),
        (["--bits", "3"], ("`key_bits` must be one of [2, 4, 8]", "3")),
        (["--data", "odd"], ("`data` must be one of", "'odd'")),
        (["--tokens", "-1"], ("`tokens` must not be negative", "-1")),
        (["--peers", "flash"], ("`peers` must be among", "'flash'")),
        (["--rounds", "0"], ("`--rounds` must be at least 1", "0")),
    ],
    ids=lambda value: value[0].strip("-") if isinstance(value, list) else "",
)
def test_user_errors_are_one_line(capsys, arguments, words):
    assert main(["bench", "attention", *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert len(printed.err.splitlines()) == 1
    for word in words:
        assert word in printed.err

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
    options += ["--compute", "auto"]
    done = bench("attention", *SMALL, *options, "--output", str(path), "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    ours, peer = result["records"]
    mode = ours["compute"]
    assert (ours["provider"], peer["provider"]) == (f"kivi-tvm-{mode}", "torch-matmul-fp32")
    assert (ours["auto"], ours["kind"], peer["kind"]) == (True, "ours", "32-bit")
    assert ours["passed"] and ours["error"] <= 1e-5
    assert 0 < ours["p20_us"] <= ours["p50_us"] <= ours["p80_us"]
    errors = result["errors"]
    assert [each["data"] for each in errors] == ["normal", "outlier", "peaked", "zero_mean"]
    assert all(each["error"] < each["quantization_error"] for each in errors)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == errors + result["records"]


def test_attention_prints_ratios_errors_and_a_picture(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib comes with the bench extra")
    path = tmp_path / "plot.png"
    options = ["--tokens", "200", "--batch-size", "2", "3", "--ragged", "--compute", "float"]
    peers = ["--peers", "torch-matmul-bf16", "torch-sdpa-rows-bf16"]
    small = [*SMALL, *options, *peers, "--state", "warm"]
    assert main(["bench", "attention", *small, "--plot", str(path)]) == 0
    printed = capsys.readouterr().out
    assert printed.count("rows of 100 to 200 tokens, warm") == 2
    assert printed.count("x the best padded 16-bit peer (torch-") == 2
    assert printed.count("% of the floor of ") == 2
    assert "error of decode by compute mode" in printed
    assert path.read_bytes().startswith(b"\x89PNG")


def test_attention_where_nothing_is_packed_yet(capsys):
    options = ["--tokens", "100", "--compute", "float", "--state", "warm", "--peers"]
    assert main(["bench", "attention", *SMALL, *options]) == 0
    [line] = [x for x in capsys.readouterr().out.splitlines() if x.split()[:1] == ["float"]]
    assert line.count("(-)") == 4  # shares of an error that there is not


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
        (["--tokens", "0"], ("`tokens` must be at least 1", "0")),
        (["--peers", "flash"], ("`peers` must be among", "'flash'")),
        (["--compute", "int7"], ("`compute` must be among", "'int7'")),
        (["--compute", "int8", "--bits", "8"], ("at most 4 bits for 'int8'", "got 8")),
        (["--queries-per-kv", "5"], ("`queries_per_kv` must divide num_heads=32", "5")),
        (["--head-dim", "100"], ("`head_dim` must be one of", "100")),
        (["--ragged"], ("`batch_size` must be at least 2 for ragged rows", "1")),
        (["--plot", "x.odd"], ("`--plot` must end in one of", "x.odd")),
        (["--plot", "no/x.png"], ("`--plot` must be in a folder that exists", "no/x.png")),
        (["--output", "no/x.jsonl"], ("`--output` must be in a folder that exists", "no/x.jsonl")),
        (["--output", "."], ("`--output` must be a file that can be written", "'.'")),
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


@pytest.mark.parametrize("flag", ["--output", "--markdown"])
@pytest.mark.parametrize("benchmark", ["cache", "generate"])
def test_files_without_a_folder_are_refused_at_once(capsys, benchmark, flag):
    assert main(["bench", benchmark, flag, "no/page.md"]) == 2
    assert f"`{flag}` must be in a folder that exists, got 'no/page.md'" in capsys.readouterr().err

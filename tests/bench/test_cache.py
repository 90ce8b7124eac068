"""`bench cache`: every operation is checked before it is timed, and bytes are what it takes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from kivi_tvm import layout
from kivi_tvm.bench import cache as bench
from kivi_tvm.bench.cache import OURS, Case
from kivi_tvm.cli import main
from kivi_tvm.errors import UserError
from kivi_tvm.workloads import MODELS

W = replace(MODELS["smollm2-135m"], tokens=256, batch_size=4, dtype="float32")
E = 80
SMALL = ["--model", "smollm2-135m", "--dtype", "float32", "--rounds", "1"]


@pytest.fixture(scope="module")
def records():
    return bench.run(W, rollback=E, rounds=1)


def test_every_operation_is_right_and_has_a_time(records):
    ours = [record for record in records if record.provider == OURS]
    peers = [record for record in records if record.provider != OURS]
    assert all(record.passed for record in records)
    alone = {each.operation for each in ours} - {each.operation for each in peers}
    assert alone == {"fork, full pool"}
    assert {each.operation.split("(")[0].split(",")[0] for each in ours} == {
        *("prefill", "decode", "extend", "crop", "reorder", "select", "repeat", "fork", "free"),
        *("copy", "save", "load"),
    }


def test_bytes_are_those_of_pages_and_windows(records):
    cfg, length = W.cfg, W.tokens + W.residual_length // 2
    page = sum(buffer.nbytes for buffer in layout.page_buffers(cfg, 1).values())
    window = sum(buffer.nbytes for buffer in layout.ring_buffers(cfg, 1, E).values())
    pages = layout.num_pages(cfg, layout.packed_keys(cfg, length))
    written = pages - layout.packed_values(cfg, length) // cfg.P
    found = {each.operation: each.bytes for each in records if each.provider == OURS}
    assert found["prefill"] == 4 * pages * page
    assert found["decode"] == found["reorder, permuted"] == 0
    assert found["repeat(4)"] == 3 * (written * page + window)
    assert found["fork"] == found["fork, full pool"] == written * page + window
    assert found["free"] == -(pages * page + window)
    assert found["copy"] == found["load"] == 4 * (pages * page + window)
    full = 2 * W.num_kv_heads * length * W.head_dim * 4
    beside = {each.operation: each.bytes for each in records if each.provider != OURS}
    assert beside["copy"] == beside["repeat(4)"] == 4 * full
    assert beside["crop(8), one window"] == 0
    assert beside["decode"] == 4 * full // length * (length + 1)


def test_a_wrong_result_gets_no_time():
    calls = []

    def case(right):
        return Case("op", "x", list, calls.append, lambda *_: right, lambda *_: 3)

    (nbytes, timing), (_, none) = bench.measure([case(True), case(False)], rounds=4)
    assert (nbytes, timing.samples, none) == (3, 4, None)
    assert len(calls) == 2 + 4
    assert len({id(subject) for subject in calls}) == 6


def test_cli_prints_one_object_and_writes_both_files(tmp_path, capsys):
    lines, page = tmp_path / "records.jsonl", tmp_path / "page.md"
    files = ["--output", str(lines), "--markdown", str(page)]
    options = ["--tokens", "256", "--batch-size", "2", "--rollback", "8"]
    assert main(["bench", "cache", *SMALL, *options, *files, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["benchmark"] == "cache"
    assert [json.loads(line) for line in lines.read_text().splitlines()] == result["records"]
    text = page.read_text()
    assert "`kivi-tvm bench cache --tokens 256 --batch-size 2 --rollback 8 --model" in text
    assert "torch " + result["records"][0]["versions"]["torch"] in text
    rows = [line for line in text.splitlines() if line.startswith("| crop(")]
    assert len(rows) == 2  # a flush is further back than 8 tokens
    assert main(["bench", "cache", *SMALL, *options]) == 0
    printed = capsys.readouterr().out
    assert "crop(136), beyond rollback" in printed
    assert "narrow (a view)" in printed


@pytest.mark.parametrize(
    ("change", "rollback", "words"),
    [
        ({"tokens": 207}, 80, "`tokens` must be at least 208 here, got 207"),
        ({"batch_size": 1}, 80, "`batch_size` must be at least 2 here, got 1"),
        ({}, 7, "`rollback` must be at least 8 here, got 7"),
        ({"lengths": (256, 1, 2, 3)}, 80, "`lengths` must be None"),
    ],
)
def test_what_the_operations_need(change, rollback, words):
    with pytest.raises(UserError, match=words):
        bench.run(replace(W, **change), rollback=rollback)

"""Records: one flat JSON object per line, with what is needed to judge it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from kivi_tvm import host
from kivi_tvm.bench import record, report
from kivi_tvm.bench.harness import Timing


@pytest.fixture
def records():
    environment = record.Environment.current()
    common = {
        "op": "decode_attention",
        "workload": "B1-H8-Hkv2-T500-D64-b2-G32",
        "tokens": 500,
        "target": "native",
        "state": "cold",
        "tolerance": 1e-5,
        "bytes": 2_000_000,
        "read_gb_per_s": 40.0,
        "environment": environment,
    }
    timing = Timing(90.0, 100.0, 130.0, 8)
    return [
        record.Record(provider="kivi-tvm", source="default", error=1e-6, timing=timing, **common),
        record.Record(provider="broken", source="peer", error=0.5, timing=None, **common),
    ]


def test_jsonl_appends_complete_lines(tmp_path, records):
    path = tmp_path / "records.jsonl"
    record.append_jsonl(path, records[:1])
    record.append_jsonl(path, records[1:])
    good, bad = [json.loads(line) for line in path.read_text().splitlines()]
    assert good["p50_us"] == 100.0
    assert good["gb_per_s"] == 20.0
    assert good["threads"] == torch.get_num_threads()
    assert good["versions"]["torch"] and good["device"]
    assert "commit" in good
    assert (good["passed"], bad["passed"]) == (True, False)
    assert "p50_us" not in bad


def test_table_shows_no_number_for_a_failed_check(capsys, records):
    report.print_attention(records)
    lines = capsys.readouterr().out.splitlines()
    assert any("kivi-tvm" in line and "0.1 " in line and "50%" in line for line in lines)
    (broken,) = [line for line in lines if "broken" in line]
    assert broken.split() == ["broken", "wrong", "5.0e-01"]


def test_plot_is_a_picture(tmp_path, records):
    pytest.importorskip("matplotlib", reason="matplotlib comes with the bench extra")
    report.plot_attention(records, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_commit_is_none_outside_a_checkout(tmp_path):
    assert host._git(tmp_path, "ls-files", "--error-unmatch", "x") is None


def test_numbers_are_not_cut_without_a_terminal(records, capsys):
    """A provider's name takes 20 columns, and rich 80 in a pipe."""
    report.print_attention([replace(each, provider="torch-sdpa-rows-bf16") for each in records])
    out = capsys.readouterr().out
    assert "1.0e-06" in out and "5.0e-01" in out and "\u2026" not in out

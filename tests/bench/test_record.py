"""Records: one flat JSON object per line, with what is needed to judge it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from kivi_tvm import host
from kivi_tvm.bench import attention_plot, attention_report, record
from kivi_tvm.bench.harness import Timing
from kivi_tvm.workloads import Workload


@pytest.fixture
def records():
    environment = record.Environment.current()
    common = {
        "op": "decode_attention",
        "workload": Workload(8, 2, 64, 500),
        "padded": False,
        "target": "native",
        "state": "cold",
        "tolerance": 1e-5,
        "bytes": 2_000_000,
        "read_gb_per_s": 40.0,
        "environment": environment,
    }
    ours = {"kind": "ours", "compute": "int8", "source": "tuned"}
    peer = {"compute": None, "auto": False, "source": "peer"}

    def time(p50_us):
        return Timing(p50_us - 10, p50_us, p50_us + 30, 8)

    made = [
        ("kivi-tvm-int8", {**ours, "auto": True}, 1e-6, time(100.0)),
        ("broken", {**peer, "kind": "16-bit"}, 0.5, None),
        ("half", {**peer, "kind": "16-bit"}, 1e-6, time(310.0)),
        ("codes", {**peer, "kind": "quantized"}, 1e-6, time(200.0)),
        ("wide", {**peer, "kind": "32-bit"}, 1e-6, time(150.0)),
    ]
    return [
        record.Record(provider=name, error=error, timing=timing, **rest, **common)
        for name, rest, error, timing in made
    ]


def test_jsonl_appends_complete_lines(tmp_path, records):
    path = tmp_path / "records.jsonl"
    record.append_jsonl(path, records[:1])
    record.append_jsonl(path, records[1:2])
    good, bad = [json.loads(line) for line in path.read_text().splitlines()]
    assert good["p50_us"] == 100.0
    assert good["gb_per_s"] == 20.0
    assert (good["workload"], good["tokens"]) == ("B1-H8-Hkv2-T500-D64-b2-G32", 500)
    assert (good["compute"], good["data"], good["floor_us"]) == ("int8", "normal", 50.0)
    assert good["threads"] == torch.get_num_threads()
    assert good["versions"]["torch"] and good["device"]
    assert "commit" in good
    assert (good["passed"], bad["passed"]) == (True, False)
    assert "p50_us" not in bad


def test_table_shows_no_number_for_a_failed_check(capsys, records):
    attention_report.print_attention(records, {})
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if "kivi-tvm int8 (auto, tuned)" in line)
    assert row.split()[4:9] == ["ours", "3.10", "50%", "0.1", "0.09-0.13"]
    (broken,) = [line for line in lines if "broken" in line]
    assert broken.split() == ["broken", "16-bit", "wrong", "5.0e-01"]


def test_summary_compares_with_the_best_of_each_kind(records):
    (line,) = attention_report.summary(records)
    assert line == (
        "kivi-tvm int8 (auto, tuned) is 3.1x the best 16-bit peer (half), "
        "2.0x the best quantized peer (codes), 1.5x the best other peer (wide), "
        "50% of the floor of 0.05 ms (2.0 MB at 40.0 GB/s); 0.1 ms"
    )
    (alone,) = attention_report.summary(records[:1])
    assert "is 50% of the floor" in alone
    (wrong,) = attention_report.summary([replace(records[0], timing=None), records[2]])
    assert wrong == "kivi-tvm int8 (auto, tuned) is wrong: error 1.0e-06 above 1e-05"


def test_padded_peers_have_a_ratio_of_their_own(records):
    padded = replace(records[2], provider="padded", padded=True, timing=records[3].timing)
    (line,) = attention_report.summary([*records[:4], padded])
    assert "2.0x the best padded 16-bit peer (padded), 2.0x the best 16-bit peer (padded)" in line


def test_peers_left_out_are_named_with_their_reason(capsys, records):
    attention_report.print_attention(records, {"a": "no x here", "b": "no x here", "c": "y"})
    printed = capsys.readouterr().out
    assert "left out: a, b: no x here\nleft out: c: y\n" in printed


@pytest.mark.parametrize("change", [{"tokens": 1000}, {"head_dim": 128}, {}], ids=str)
def test_plot_is_a_picture(tmp_path, records, change):
    pytest.importorskip("matplotlib", reason="matplotlib comes with the bench extra")
    other = [replace(r, workload=replace(r.workload, **change), state="warm") for r in records]
    attention_plot.plot_attention([*records, *other], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_commit_is_none_outside_a_checkout(tmp_path):
    assert host._git(tmp_path, "ls-files", "--error-unmatch", "x") is None


def test_numbers_are_not_cut_without_a_terminal(records, capsys):
    """A provider's name takes 20 columns, and rich 80 in a pipe."""
    named = [replace(each, provider="torch-sdpa-rows-bf16") for each in records]
    attention_report.print_attention(named, {})
    out = capsys.readouterr().out
    assert "1.0e-06" in out and "5.0e-01" in out and "\u2026" not in out

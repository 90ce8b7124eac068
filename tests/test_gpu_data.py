"""What a GPU measured: every line is complete, and the README says what the lines say."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILE = ROOT / "docs" / "gpu-h100.jsonl"


@pytest.fixture(scope="module")
def records():
    return [json.loads(line) for line in FILE.read_text().splitlines()]


def test_every_result_was_right_and_says_where_it_is_from(records):
    assert len(records) >= 40
    for record in records:
        assert record["passed"] and record["error"] <= 5e-3
        for name in ("device", "driver", "cuda", "commit"):
            assert record[name] and record[name] != "COMMIT"
        assert record["versions"]["torch"] and record["versions"]["apache-tvm"]
        assert record["speedup"] == pytest.approx(record["peer_us"] / record["step_us"], rel=2e-3)


def test_the_readme_says_the_same(records):
    def found(kv_heads, batch, tokens, name):
        [value] = (
            record[name]
            for record in records
            if (record["bits"], record["group_size"]) == (2, 32)
            and (record["kv_heads"], record["batch"], record["tokens"]) == (kv_heads, batch, tokens)
        )
        return value

    text = " ".join((ROOT / "README.md").read_text().split())
    said = re.search(
        r"packed memory at ([\d.]+) of the bandwidth.*? is ([\d.]+) times faster.*?"
        r"a step is ([\d.]+) times faster at 128k.*?slower: ([\d.]+) times as fast at 1k",
        text,
    )
    expected = (
        found(8, 8, 32768, "share_of_copy"),
        found(8, 8, 32768, "speedup"),
        found(32, 1, 131072, "speedup"),
        found(8, 1, 1024, "speedup"),
    )
    assert [float(x) for x in said.groups()] == pytest.approx(expected, rel=0.04)

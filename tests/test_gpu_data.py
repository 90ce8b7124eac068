"""What a GPU measured: every line is complete, and the README says what the lines say."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHECKS, STEPS, MODELS = (
    ROOT / "docs" / name
    for name in ("gpu-checks-h100.jsonl", "gpu-h100.jsonl", "gpu-decode-h100.jsonl")
)


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def records():
    return read(STEPS)


@pytest.fixture(scope="module")
def models():
    return read(MODELS)


def test_every_result_was_right_and_says_where_it_is_from(records):
    assert len(records) >= 40
    for record in records:
        assert record["passed"] and record["error"] <= 5e-3
        for name in ("device", "driver", "cuda", "commit"):
            assert record[name] and record[name] != "COMMIT"
        assert record["versions"]["torch"] and record["versions"]["apache-tvm"]
        assert record["speedup"] == pytest.approx(record["peer_us"] / record["step_us"], rel=2e-3)


def test_every_check_passed():
    checks = read(CHECKS)
    assert [each["check"] for each in checks] == ["tests", "memcheck", "racecheck", "synccheck"]
    for each in checks:
        assert each["passed"] and each["errors"] == 0 and each["commit"]
    assert checks[0]["tests"] > 2000 and checks[0]["failures"] == checks[0]["skipped"] == 0


def test_models_at_equal_memory_say_how_they_compare(models):
    for record in models:
        assert record["commit"] and record["device"] and record["versions"]["torch"]
        assert record["batch"] == record["memory_bytes"] // record["row_bytes"]
        rate = record["batch"] / record["step_ms"] * 1e3
        assert record["tokens_per_s"] == pytest.approx(rate, rel=2e-3)
        [exact] = (
            other["tokens_per_s"]
            for other in models
            if (other["model"], other["tokens"]) == (record["model"], record["tokens"])
            and other["cache"] == "bfloat16, exact"
        )
        assert record["throughput_ratio"] == pytest.approx(rate / exact, rel=2e-3)
        assert record.get("error", 0) <= 5e-3


def test_the_page_is_made_of_the_data(records, models):
    spec = importlib.util.spec_from_file_location("gpu_page", ROOT / "tools" / "gpu_page.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    assert (ROOT / "docs" / "gpu.md").read_text() == tool.page(read(CHECKS), records, models)


def test_the_readme_says_the_same(records, models):
    def found(kv_heads, batch, tokens, name):
        [value] = (
            record[name]
            for record in records
            if (record["bits"], record["group_size"]) == (2, 32)
            and (record["kv_heads"], record["batch"], record["tokens"]) == (kv_heads, batch, tokens)
        )
        return value

    def ratio(tokens, window, model="Llama-3-8B"):
        [value] = (
            each["throughput_ratio"]
            for each in models
            if (each["model"], each["full_tokens"]) == (model, tokens)
            and each["cache"].endswith(window)
        )
        return value

    def batches(model):
        """How many times as many sequences the memory holds with R=32 in the paper's setting."""
        exact, *_, kivi = (
            each for each in models if (each["model"], each["full_tokens"]) == (model, 499)
        )
        return kivi["batch"] / exact["batch"]

    def bound(model):
        """What throughput would be if attention took no time, with R=32 in the paper's setting."""
        exact, *_, kivi = (
            each for each in models if (each["model"], each["full_tokens"]) == (model, 499)
        )
        return kivi["batch"] / kivi["rest_ms"] * 1e3 / exact["tokens_per_s"]

    def over_joined(model):
        """Throughput with R=32 in the paper's setting, against a cache that is joined anew."""
        return ratio(499, "R=32", model) / ratio(499, "concatenated", model)

    text = " ".join((ROOT / "README.md").read_text().split())
    said = re.search(
        r"packed memory at ([\d.]+) of the bandwidth.*? is ([\d.]+) times faster.*?"
        r"with 4 KV heads it is ([\d.]+) times faster.*?"
        r"a step is ([\d.]+) times faster at 128k.*?slower: ([\d.]+) times as fast at 1k.*?"
        r"([\d.]+) times at 1k tokens of 32.*?decodes ([\d.]+) times as many .*?, "
        r"and ([\d.]+) to ([\d.]+) times as many .*?Llama-2-7B's ([\d.]+), "
        r"and ([\d.]+) to ([\d.]+) times.*?holds ([\d.]+) and ([\d.]+) times as many.*?"
        r"would be ([\d.]+) and ([\d.]+) times.*?"
        r"it is ([\d.]+) and ([\d.]+) times there.*?"
        r"first (\d+) tests",
        text,
    )
    expected = (
        found(8, 8, 32768, "share_of_copy"),
        found(8, 8, 32768, "speedup"),
        found(4, 8, 32768, "speedup"),
        found(32, 1, 131072, "speedup"),
        found(8, 1, 1024, "speedup"),
        found(8, 32, 1024, "speedup"),
        ratio(32768, "R=128"),
        ratio(499, "R=128"),
        ratio(499, "R=32"),
        ratio(32768, "R=128", "Llama-2-7B"),
        ratio(499, "R=128", "Llama-2-7B"),
        ratio(499, "R=32", "Llama-2-7B"),
        batches("Llama-3-8B"),
        batches("Llama-2-7B"),
        bound("Llama-3-8B"),
        bound("Llama-2-7B"),
        over_joined("Llama-3-8B"),
        over_joined("Llama-2-7B"),
    )
    *measured, tests = (float(x) for x in said.groups())
    assert measured == pytest.approx(expected, rel=0.04)
    assert tests == read(CHECKS)[0]["tests"]
    said = re.search(r"256 sequences of 330 tokens.*? are ([\d.]+) .*? to ([\d.]+) times", text)
    short = [each["speedup"] for each in records if each["batch"] == 256]
    expected = min(short), max(short)
    assert [float(x) for x in said.groups()] == pytest.approx(expected, rel=0.04)

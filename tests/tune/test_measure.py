"""The stand-alone script: timing, comparing, its worker, and a folder measured elsewhere."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tune.tasks import TINY, faulty, library

from kivi_tvm import cuda
from kivi_tvm.layout import Buffer
from kivi_tvm.tune import measure
from kivi_tvm.tune.candidate import Task
from kivi_tvm.tune.cases import make_case
from kivi_tvm.tune.cases.case import Call, fill, scalar


def timed(nbytes, cold=True):
    buffer = Buffer((nbytes // 4,), "float32")
    call = Call([fill(buffer, "normal", cold=cold), scalar(1)])
    return measure.TimedCall(call.to_dict(), "cpu")


def test_copies_exceed_the_cache_within_the_memory_cap():
    assert measure.copies_of(1 << 20, 32 << 20) == 128
    assert measure.copies_of(1 << 30, 32 << 20) == 1
    assert measure.copies_of(400 << 20, 32 << 20) == 2
    assert measure.copies_of(100 << 20, 4 << 30) == 15


def test_calls_rotate_over_cold_copies_alone(monkeypatch):
    monkeypatch.setattr(measure, "cache_bytes", lambda device: 1 << 20)
    call, seen = timed(1 << 20), []
    call.run(lambda x, n: seen.append(torch.from_dlpack(x).data_ptr()), 9)
    assert len(set(seen)) == 4 and seen[:4] == seen[4:8]
    assert len(timed(1 << 20, cold=False).rows) == 1


@pytest.mark.parametrize("how", measure.FILLS)
def test_fills_repeat_after_a_block(how, monkeypatch):
    monkeypatch.setattr(measure, "FILL_BLOCK", 100)
    argument = fill(Buffer((3, 70), "float16" if how != "words" else "uint32"), how)
    x = measure.filled(argument, 1)
    assert x.shape == (3, 70) and torch.equal(x.flatten()[100:200], x.flatten()[:100])
    assert torch.equal(x, measure.filled(argument, 1))


def test_machine_code_behind_a_source():
    source = cuda.with_machine_code("int x;\n", b"\0code")
    assert measure.machine_code(source) == b"\0code"
    with pytest.raises(RuntimeError, match="must carry its machine code"):
        measure.machine_code("int x;\n")


@pytest.mark.cuda
def test_a_gpu_is_timed_by_graphs():
    call = Call([fill(Buffer((1 << 20,), "float32"), "normal")]).to_dict()
    timed, seen = measure.TimedCall(call, "cuda"), []

    def kernel(x):
        seen.append(torch.from_dlpack(x).data_ptr())
        torch.from_dlpack(x).add_(1)

    times = timed.run(kernel, 3 * len(timed.rows))
    assert len(times) == 3 and 1 < min(times) < 1e3
    assert len(set(seen)) == len(timed.rows)
    before = len(seen)
    assert measure.time_call(timed, kernel) and len(seen) == before  # captured once


def test_comparing_takes_turns():
    order = []
    kernels = [lambda x, n, i=i: order.append(i) for i in range(3)]
    samples = measure.compare_kernels([timed(4096)], kernels, 4, lambda i: None)
    assert [len(s) for s in samples] == [4, 4, 4]
    turns = [i for i, before in zip(order, [None, *order], strict=False) if i != before]
    assert turns == [0, 1, 2, 1, 0, 1, 2, 1, 0]


def test_the_slower_kernel_is_found():
    import time

    calls = [timed(4096)]
    kernels = [lambda x, n, s=s: time.sleep(s) for s in (0.001, 0.0015)]
    fast, slow = measure.compare_kernels(calls, kernels, 5, lambda i: None)
    assert max(fast) < min(slow)


def test_the_last_cache_is_the_largest(tmp_path):
    for index, size in enumerate(["32K", "1024K", "32M"]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert measure.cache_bytes("cpu", tmp_path) == 32 << 20
    assert measure.cache_bytes("cpu", tmp_path / "none") == measure.FALLBACK_CACHE_BYTES


def test_relative_l2_of_nothing_but_zeros_is_the_error():
    assert measure.relative_l2(torch.zeros(2), torch.zeros(2)) == 0
    assert measure.relative_l2(torch.tensor([3.0, 4.0]), torch.zeros(2)) == 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Candidates as `tune --emit` leaves them: good, crashing, wrong, absent."""
    path = tmp_path_factory.mktemp("emitted")
    (path / "cases").mkdir()
    make_case(Task("advance", TINY)).save(path / "cases" / "advance.pt")
    bodies = {"wrong": "", "crash": "*(volatile int*)0 = 1"}
    libraries = {name: faulty(path, name, "advance", body) for name, body in bodies.items()}
    libraries |= {"good": Path(library(TINY).origin), "absent": Path("absent.so")}
    candidates = [
        {
            "id": name,
            "task": "advance",
            "decisions": {} if name == "good" else {"changed": 1},
            "library": str(libraries[name]),
            "case": "cases/advance.pt",
        }
        for name in ("good", "crash", "wrong", "absent")
    ]
    candidates.append({**candidates[0], "id": "good again", "decisions": {"changed": 1}})
    names = {each[file] for each in candidates for file in ("library", "case")} - {"absent.so"}
    content = {
        "complete": True,
        "checksum": "0123",
        "device": "cpu",
        "rounds": 3,
        "files": {name: measure.sha256(path / name) for name in names},
        "candidates": candidates,
    }
    (path / "candidates.json").write_text(json.dumps(content))
    return path


def run_batch(folder):
    """The script alone: neither kivi_tvm nor tvm may be imported."""
    script = folder / "measure.py"
    text = Path(measure.__file__).read_text()
    script.write_text(
        'import sys; sys.modules["kivi_tvm"] = sys.modules["tvm"] = None\n'
        + text.replace("from __future__ import annotations", "")
    )
    subprocess.run([sys.executable, script, "batch", folder], check=True, timeout=120)
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_a_batch_isolates_candidates_and_goes_on_where_it_was_cut_off(folder):
    head, *lines = run_batch(folder)
    assert head["device"]["kind"] == "cpu" and head["read_gb_per_s"] > 0
    *lines, last = lines
    assert last["task"] == "advance" and not last["failed"]
    assert {name: len(times) for name, times in last["compared"].items()} == {
        "good": 3, "good again": 3,
    }  # fmt: skip
    kinds = {line["id"]: line.get("failure", {}).get("kind") for line in lines}
    assert kinds == {
        "good": None, "crash": "crash", "wrong": "wrong", "absent": "load",
        "good again": None,
    }  # fmt: skip
    assert all(min(line["times_us"]) > 0 for line in lines if "times_us" in line)
    path = folder / "results.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: whole.rindex(b'{"id": "absent"') + 10])
    head_again, *rest, last = run_batch(folder)
    assert set(last["compared"]) == {"good", "good again"}
    assert head_again == head
    assert [line["id"] for line in rest] == [line["id"] for line in lines]
    assert rest[:3] == lines[:3]

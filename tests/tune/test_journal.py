"""Journals: nothing finished is lost, nothing foreign is mixed in."""

import json
import math
import os
import subprocess
import sys

import pytest
from tuning import FACTS, task

from kivi_tvm.errors import UserError
from kivi_tvm.tune.candidate import Candidate, Failure, Measured
from kivi_tvm.tune.journal import Journals, Trial

GOOD = Trial({"tile": 4, "order": "row"}, "0123", "record", (2.0, 3.0, 9.0), 1e-4, 1e-3, None, 0.5)
BAD = Trial({}, "4567", "default", failure=Failure("wrong", "relative error 0.5\nof 0.001"))


def write(folder, *trials, facts=FACTS, said=None):
    """Open the journal of `attend`, append, and return what it held before."""
    with Journals(folder, facts, (said if said is not None else []).append) as journals:
        journal = journals.open(task())
        before = list(journal.trials)
        journal.append(trials)
        assert journal.trials == [*before, *trials]
        return journal.path, before


def test_trials_come_back(tmp_path):
    said = []
    path, _ = write(tmp_path / "new" / "folder", GOOD, BAD, said=said)
    assert write(path.parent, said=said) == (path, [GOOD, BAD])
    assert not said and path.name == f"attend-{task().workload.id}.jsonl"
    assert (GOOD.us, BAD.us) == (3.0, math.inf)
    assert json.loads(path.read_text().splitlines()[0])["sources"] == "digest"


def test_trial_of_a_measurement():
    measured = Measured(Candidate(task(), {"a": 1}, "ff", "search"), (1.0,), 0.0, 0.0)
    assert Trial.of(measured, 1.5) == Trial({"a": 1}, "ff", "search", (1.0,), 0.0, 0.0, None, 1.5)


@pytest.mark.parametrize("cut", [1, 20, 100])
def test_a_half_written_line_is_dropped(tmp_path, cut):
    path, _ = write(tmp_path, GOOD, BAD)
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size - cut)
    said = []
    _, before = write(tmp_path, BAD, said=said)
    assert before == [GOOD] and "half-written last line" in said[0]
    assert write(tmp_path)[1] == [GOOD, BAD]


def test_a_half_written_first_line(tmp_path):
    path, _ = write(tmp_path)
    path.write_text(path.read_text()[:10])
    assert write(tmp_path, GOOD)[1] == []
    assert write(tmp_path)[1] == [GOOD]


def test_damaged_lines_are_left_out(tmp_path):
    path, _ = write(tmp_path, GOOD)
    with path.open("ab") as file:
        file.write(b'\x00\xff\n{"decisions": 3}\n[]\n')
    said = []
    write(tmp_path, BAD, said=said)
    assert said == [f"{path.name}: 3 damaged lines are left out"]
    assert write(tmp_path, said=[])[1] == [GOOD, BAD]


@pytest.mark.parametrize("name", FACTS)
def test_other_facts_set_a_journal_aside(tmp_path, name):
    path, _ = write(tmp_path, GOOD)
    old, said = path.read_text(), []
    assert write(tmp_path, BAD, facts={**FACTS, name: "other"}, said=said)[1] == []
    assert name in said[0] and len(said) == 1
    (aside,) = tmp_path.glob("*.aside-1")
    assert aside.read_text() == old
    write(tmp_path, said=[])
    assert len(list(tmp_path.glob("*.aside-*"))) == 2


def test_a_file_that_is_no_journal_is_set_aside(tmp_path):
    path, _ = write(tmp_path)
    path.write_text("hello\n")
    assert write(tmp_path, GOOD)[1] == []
    assert (tmp_path / path.with_suffix(".aside-1").name).read_text() == "hello\n"


def test_a_second_process_keeps_its_own_file(tmp_path):
    code = (
        "import sys; from pathlib import Path; from tuning import FACTS, task\n"
        "from kivi_tvm.tune.journal import Journals\n"
        "with Journals(Path(sys.argv[1]), FACTS, lambda line: None) as journals:\n"
        "    journals.open(task()); print('open', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert process.stdout.readline() == b"open\n"
    said = []
    path, _ = write(tmp_path, GOOD, said=said)
    process.communicate(b"")
    assert path.name.endswith(".2.jsonl") and len(said) == 1 and "another process" in said[0]
    # the first file is free again, and the second is read
    path, trials = write(tmp_path)
    assert path.name == f"attend-{task().workload.id}.jsonl" and trials == [GOOD]


def test_an_unwritable_directory_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="`--log-dir` must be a directory that can be written"):
        Journals(tmp_path / "file" / "below", FACTS, print)

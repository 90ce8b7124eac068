"""Candidates measured in a folder elsewhere: emitted, measured without kivi_tvm, collected."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from tune.tasks import TINY, faulty

from kivi_tvm import build, cli, database, targets
from kivi_tvm.cuda import find_nvcc
from kivi_tvm.cuda_tools import cuda_images, cuda_source
from kivi_tvm.errors import UserError
from kivi_tvm.tune import collect as collecting
from kivi_tvm.tune import emit as emitting
from kivi_tvm.tune import measure
from kivi_tvm.tune.candidate import Task
from kivi_tvm.tune.collect import collect
from kivi_tvm.tune.detached import read_folder
from kivi_tvm.tune.emit import emit
from kivi_tvm.tune.outcome import Options

ROUNDS = 3
BLOCK = 'import sys\nsys.modules["kivi_tvm"] = sys.modules["tvm"] = None\n'


def write(path, functions=("combine",), trials=3, seeds=lambda task: [], seed=0, said=None):
    tasks = [Task(name, TINY) for name in functions]
    options = Options(trials, seed=seed, rounds=ROUNDS)
    say = [].append if said is None else said.append
    return emit(tasks, targets.resolve("native"), path, options, seeds, say)


@pytest.fixture(scope="module")
def emitted(tmp_path_factory):
    path = tmp_path_factory.mktemp("emitted") / "folder"
    write(path)
    return path


@pytest.mark.slow
@pytest.mark.skipif(find_nvcc() is None, reason="needs nvcc")
def test_candidates_for_a_gpu_carry_machine_code(tmp_path):
    workload = replace(TINY, dtype="float16", compute="half")
    target = targets.resolve({"kind": "cuda", "arch": "sm_90"})
    tasks = [Task("combine_window", workload)]
    folder = emit(tasks, target, tmp_path, Options(2, rounds=1), lambda task: [], [].append)
    assert folder.device == "cuda" and read_folder(tmp_path) == folder
    [default, other] = folder.tasks[0].candidates
    assert other.candidate.decisions and not default.candidate.decisions
    for each in (default, other):
        source = cuda_source((tmp_path / each.library).read_bytes())
        [image] = cuda_images(measure.machine_code(source))
        assert len(image) > 1000


@pytest.fixture(scope="module")
def blocked(tmp_path_factory):
    """Variables of a process that cannot import kivi_tvm or tvm."""
    folder = tmp_path_factory.mktemp("blocked")
    (folder / "sitecustomize.py").write_text(BLOCK)
    return {**os.environ, "PYTHONPATH": str(folder)}


@pytest.fixture
def copy(emitted, tmp_path):
    return shutil.copytree(emitted, tmp_path / "folder")


def start(folder, environment):
    command = [sys.executable, "measure.py", "batch", ".", "--threads", "1"]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE)


def run_batch(folder, environment):
    process = start(folder, environment)
    said = process.communicate(timeout=200)[1].decode()
    return process.returncode, said


def lines(folder):
    return measure.parse_results((folder / measure.RESULTS).read_bytes())


def seal(folder, *found):
    """Write results as the script does."""
    with (folder / measure.RESULTS).open("wb") as out:
        for line in found:
            measure.put(out, line)


def results(folder, compared=True):
    """What a device would have found, the second candidate twice as fast as the default."""
    content = read_folder(folder).to_dict()
    device = {"name": "a device", "kind": "cpu", "threads": 3}
    header = {"folder": content["checksum"], "device": device, "read_gb_per_s": 10.0}
    found = [{**header, "versions": {"apache-tvm-ffi": "0.1.99"}}]
    for i, each in enumerate(content["candidates"]):
        times = {"times_us": [(10.0, 5.0, 20.0)[i]] * 3, "max_error": 0.0, "error_limit": 1e-5}
        found.append({"id": each["id"], **times, "seconds": 1.0})
    if compared:
        times = {line["id"]: line["times_us"] for line in found[1:]}
        task = content["candidates"][0]["task"]
        found.append({"task": task, "compared": times, "failed": {}, "seconds": 1.0})
    return found


def plant_wrong_kernel(folder):
    """Put another library in the place of the last candidate's, as if it had been emitted."""
    name = read_folder(folder).tasks[0].candidates[2].library
    (folder / name).write_bytes(faulty(folder, "wrong", "combine", "").read_bytes())
    found = read_folder(folder)
    files = {**found.files, name: measure.sha256(folder / name)}
    replace(found, files=files).write(folder)


@pytest.mark.slow
def test_a_batch_is_killed_goes_on_and_drops_what_is_wrong(copy, blocked, tmp_path):
    plant_wrong_kernel(copy)
    tampered = copy / read_folder(copy).tasks[0].candidates[1].library
    tampered.write_bytes(tampered.read_bytes() + b"x")
    process = start(copy, blocked)
    path, end = copy / measure.RESULTS, time.monotonic() + 100
    while time.monotonic() < end and not (path.exists() and path.read_bytes().count(b"\n") >= 2):
        time.sleep(0.02)
    process.kill()
    process.communicate()
    before = lines(copy)
    assert len(before) >= 2
    with path.open("ab") as out:
        out.write(b'{"id": "half')
    assert run_batch(copy, blocked) == (0, "")
    assert lines(copy)[: len(before)] == before and len(lines(copy)) == 5
    done = collect(copy, tmp_path / "logs")
    (outcome,) = done.result.outcomes
    assert outcome.error is None and outcome.failures == {"wrong": 1, "load": 1}
    assert outcome.decisions == {} and outcome.ratio == 1
    assert done.runner.device.name == measure.device_name("cpu")
    (found,) = database.entries(tmp_path / "logs")
    record = found.records["combine"]
    assert (record.runner, record.kind, record.threads) == ("detached", "measured", 1)


def test_the_folder_has_what_it_names(emitted):
    folder = read_folder(emitted)
    assert folder.complete and folder.facts["target"]["kind"] == "llvm"
    (task,) = folder.tasks
    assert [each.candidate.origin for each in task.candidates] == ["default", "search", "search"]
    assert {*folder.files} == {task.case, *(each.library for each in task.candidates)}
    assert {path.name for path in emitted.iterdir()} == {
        "candidates.json", "cases", "lib", "measure.py", "README.txt",
    }  # fmt: skip


def test_tasks_and_their_candidates_keep_their_order(emitted, tmp_path):
    found = read_folder(emitted)
    (task,) = found.tasks
    other = Task("append", TINY)
    moved = [replace(e, candidate=replace(e.candidate, task=other)) for e in task.candidates]
    both = replace(found, tasks=(task, replace(task, task=other, candidates=tuple(moved))))
    both.write(tmp_path)
    assert read_folder(tmp_path) == both
    assert read_folder(tmp_path).to_dict() == json.loads((tmp_path / "candidates.json").read_text())


def test_emitting_again_keeps_libraries_and_results_of_the_same_candidates(copy):
    seal(copy, *results(copy))
    before = {path: path.stat().st_mtime_ns for path in copy.glob("lib/*.so")}
    write(copy)
    assert {path: path.stat().st_mtime_ns for path in copy.glob("lib/*.so")} == before
    assert len(lines(copy)) == 5
    said = []
    write(copy, seed=1, said=said)
    assert not (copy / measure.RESULTS).exists() and (copy / "results-1.jsonl").exists()
    assert any("results-1.jsonl" in line for line in said)


def test_emitting_for_other_code_compiles_anew(copy, monkeypatch):
    other = {**read_folder(copy).facts, "sources": "others"}
    monkeypatch.setattr(emitting, "facts", lambda target: other)
    monkeypatch.setattr(emitting, "Builder", None)  # nothing is compiled in this test
    with pytest.raises(TypeError):
        write(copy)
    assert not list(copy.glob("lib/*.so")) and not read_folder(copy).complete


def test_a_directory_of_something_else_is_refused(tmp_path):
    (tmp_path / "letter.txt").write_text("keep")
    with pytest.raises(UserError, match="`--emit` must be an empty directory"):
        write(tmp_path)
    with pytest.raises(UserError, match="got the file"):
        write(tmp_path / "letter.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


def test_the_faster_candidate_becomes_a_record(copy, tmp_path):
    seal(copy, *results(copy))
    done = collect(copy, tmp_path / "logs")
    (outcome,) = done.result.outcomes
    assert (outcome.ratio, done.result.new_trials, done.result.seconds) == (2.0, 3, 4.0)
    (found,) = database.entries(tmp_path / "logs")
    record = found.records["combine"]
    assert record.decisions == read_folder(copy).tasks[0].candidates[1].candidate.decisions != {}
    assert (record.device, record.threads, record.read_gb_per_s) == ("a device", 3, 10.0)
    assert record.versions["tvm_ffi"] == "0.1.99"


@pytest.mark.parametrize(("kept", "said"), [(2, "2 of 3 candidates"), (4, "are not compared")])
def test_incomplete_results_publish_nothing_and_say_what_is_missing(copy, tmp_path, kept, said):
    seal(copy, *results(copy)[:kept])
    with (copy / measure.RESULTS).open("ab") as out:
        out.write(b'{"id": "half a li')
    (outcome,) = collect(copy, tmp_path / "logs").result.outcomes
    assert said in outcome.error and not database.entries(tmp_path / "logs")


def test_a_schedule_that_is_another_one_now_is_not_published(copy, tmp_path, monkeypatch):
    seal(copy, *results(copy))
    monkeypatch.setattr(collecting, "schedule_hash", lambda name, schedule: "0" * 16)
    (outcome,) = collect(copy, tmp_path / "logs").result.outcomes
    assert "its schedule gives 0000" in outcome.error
    assert not database.entries(tmp_path / "logs")


def damage_content(folder):
    path = folder / "candidates.json"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 1'))


def damage_results(folder):
    path = folder / measure.RESULTS
    path.write_text(path.read_text().replace("5.0", "1.0"))


def other_version(folder):
    path = folder / "candidates.json"
    path.write_text(path.read_text().replace('"format_version": 2', '"format_version": 1'))


def drop_results(folder):
    (folder / measure.RESULTS).unlink()


def foreign_results(folder):
    first, *rest = results(folder)
    seal(folder, {**first, "folder": "another"}, *rest)


def other_code(folder):
    found = read_folder(folder)
    replace(found, facts={**found.facts, "sources": "others"}).write(folder)


def foreign_content(folder):
    (folder / "candidates.json").write_text("[]")


def gone(folder):
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_content, "its checksum does not hold"),
        (other_version, "must have `format_version` 2, got 1: another version wrote it"),
        (damage_results, "line 3 of results.jsonl is damaged"),
        (drop_results, "run `python measure.py batch .`"),
        (foreign_results, "results of other candidates"),
        (other_code, "emitted with other sources"),
        (foreign_content, "candidates.json is damaged: TypeError"),
        (gone, "must be a folder of `tune --emit`"),
    ],
)
def test_bad_folders_are_one_line_and_exit_code_2(copy, tmp_path, capsys, damage, said):
    seal(copy, *results(copy))
    damage(copy)
    logs = tmp_path / "logs"
    assert cli.main(["tune", "--collect", str(copy), "--log-dir", str(logs)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and said in error and "UserError" not in error
    assert not database.entries(logs)


@pytest.mark.slow
def test_the_next_build_uses_what_was_collected(copy, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("KIVI_TVM_TUNING_DIR", str(tmp_path / "logs"))
    seal(copy, *results(copy))
    assert cli.main(["tune", "--collect", str(copy), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["runner"], report["functions"][0]["ratio"]) == ("detached", 2.0)
    assert build(TINY.cfg).manifest["sources"]["combine"] == "tuned"


@pytest.mark.slow
def test_results_of_another_device_or_other_candidates_are_not_continued(copy, blocked):
    first, *rest = results(copy)
    for changed, said in ((first, "of another device"), ({**first, "folder": "x"}, "of another")):
        seal(copy, changed, *rest)
        code, text = run_batch(copy, blocked)
        assert code == 1 and said in text and "Traceback" not in text
        assert len(lines(copy)) == 5


@pytest.mark.slow
def test_attend_gets_half_and_records_come_before_chance(tmp_path, blocked):
    space = emitting.Space(emitting.explorer("attend", TINY.cfg.kernel_key(), native()))
    name, choice = next(iter(space.default.choices.items()))
    decisions = {name: next(each for each in choice.options if each != choice.default)}
    folder = write(
        tmp_path / "f",
        ("attend", "append"),
        8,
        lambda task: [decisions] if task.function == "attend" else [],
    )
    attend, append = folder.tasks
    assert len(attend.candidates) + len(append.candidates) == 8
    assert len(attend.candidates) >= 4
    assert [each.candidate.origin for each in attend.candidates[:2]] == ["default", "record"]
    assert run_batch(tmp_path / "f", blocked) == (0, "")
    found = collect(tmp_path / "f", tmp_path / "logs").result.outcomes
    assert [each.error for each in found] == [None, None]


def native():
    return targets.resolve("native")

"""The local runner: a candidate that crashes, hangs or exits costs only itself."""

import contextlib

import pytest
from tune.tasks import TINY, built, faulty

from kivi_tvm.tune.candidate import Built, Failure, Task
from kivi_tvm.tune.local import LocalRunner

TASK = Task("advance", TINY)
FAULTS = {
    "segfault": ('fprintf(stderr, "last words"); *(volatile int*)0 = 1', "crash", "SIGSEGV"),
    "sleep": ("sleep(1000)", "timeout", "no answer in time"),
    "exit": ("_exit(0)", "crash", "status 0"),
    "wrong": ("", "wrong", "elements differ"),
    "chatty": (r'printf("{\"times_us\": [1]}\n"); fflush(stdout)', "wrong", "elements differ"),
}


@pytest.fixture(scope="module")
def quiet():
    return {"entered": 0}


@pytest.fixture(scope="module")
def runner(quiet):
    @contextlib.contextmanager
    def counted():
        quiet["entered"] += 1
        yield

    with LocalRunner(counted, timeout_s=3) as runner:
        yield runner


@pytest.fixture(scope="module")
def candidates(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faulty")
    return {
        name: built(TASK, faulty(folder, name, "advance", body))
        for name, (body, _, _) in FAULTS.items()
    }


def test_faulty_candidates_cost_only_themselves(runner, candidates, quiet):
    failed = Built(built(TASK).candidate, None, 0.0, Failure("build", "no luck"))
    before = quiet["entered"]
    good, *others, unbuilt, last = runner.measure(
        [built(TASK), *candidates.values(), failed, built(TASK)]
    )
    assert quiet["entered"] == before + 2  # what fails is never timed
    for found in (good, last):
        assert found.failure is None and found.us < 1e4
        assert (found.max_error, found.error_limit) == (0, 0)
    assert unbuilt.failure == failed.failure
    for found, (_, kind, message) in zip(others, FAULTS.values(), strict=True):
        assert found.failure.kind == kind and message in found.failure.message
        assert found.times_us == ()
    assert "last words" in others[0].failure.message


def test_comparing_leaves_faulty_candidates_out(runner, candidates):
    faults = [candidates["segfault"], candidates["wrong"]]
    first, crash, wrong, second = runner.compare([built(TASK), *faults, built(TASK)], rounds=5)
    assert [len(x.times_us) for x in (first, second)] == [5, 5]
    assert (crash.failure.kind, wrong.failure.kind) == ("crash", "wrong")


def test_a_candidate_that_crashes_while_it_is_compared(runner, tmp_path):
    """It behaves during the check: the first call that finds a file of its own crashes."""
    mark = tmp_path / "mark"
    body = f'if (!access("{mark}", F_OK)) abort()'
    late = built(Task("dequantize_key", TINY), faulty(tmp_path, "late", "dequantize_key", body))
    good = built(Task("dequantize_key", TINY))
    check = runner._check

    def pass_check(each):
        found = check(good)
        mark.touch()
        return found

    runner._check = pass_check
    try:
        found = runner.compare([good, late, good], rounds=3)
    finally:
        runner._check = check
    assert [x.failure and x.failure.kind for x in found] == [None, "crash", None]


def test_a_candidate_that_raises_while_it_is_compared_fails_alone(runner, tmp_path):
    body = (
        "extern void TVMFFIErrorSetRaisedFromCStr(const char*, const char*); "
        'TVMFFIErrorSetRaisedFromCStr("RuntimeError", "out of workspace"); return -1'
    )
    late = built(Task("dequantize_key", TINY), faulty(tmp_path, "raises", "dequantize_key", body))
    good = built(Task("dequantize_key", TINY))
    check = runner._check
    runner._check = lambda each: check(good)
    try:
        found = runner.compare([good, late, good], rounds=3)
    finally:
        runner._check = check
    assert [x.failure and x.failure.kind for x in found] == [None, "crash", None]
    assert "out of workspace" in found[1].failure.message
    assert all(len(x.times_us) == 3 for x in (found[0], found[2]))


def test_bandwidth_and_device(runner):
    assert runner.read_gb_per_s() > 0.5
    assert runner.device.kind == "cpu" and runner.device.threads >= 1 and runner.method == "local"


def test_errors(runner):
    with pytest.raises(ValueError, match="`rounds` must be at least 1, got 0"):
        runner.compare([built(TASK)], rounds=0)
    with pytest.raises(ValueError, match="`built` must be candidates of one task"):
        runner.compare([built(TASK), built(Task("combine", TINY))], rounds=1)

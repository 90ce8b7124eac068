"""The builder: isolated compile processes that stand still on demand and never stay behind."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from tune.tasks import TINY

from kivi_tvm import compile, targets
from kivi_tvm.tune.builder import Builder, Pause
from kivi_tvm.tune.candidate import Candidate, Task


@pytest.fixture(scope="module")
def target():
    return targets.resolve("native")


def candidate(function, target):
    schedule = compile.scheduled_function(function, TINY.cfg.kernel_key(), target)
    digest = compile.schedule_hash(function, schedule)
    return Candidate(Task(function, TINY), {}, digest, "default")


@pytest.fixture(scope="module")
def builder(tmp_path_factory, target):
    with Builder(target, tmp_path_factory.mktemp("built"), processes=1) as builder:
        yield builder


def states(group):
    """The states of all processes of a group, as /proc has them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == group:
            found.append(fields[0])
    return found


def wait_for(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def test_builds_and_finds_again(builder, target):
    wanted = candidate("advance", target)
    built = builder.submit(wanted).result(60)
    assert built.failure is None and built.library == builder.path(wanted)
    assert built.library.name == f"{wanted.schedule_hash}-advance.so"
    again = builder.submit(wanted).result(0)
    assert (again.library, again.seconds) == (built.library, 0.0)
    assert [p.name for p in built.library.parent.iterdir()] == [built.library.name]


def test_what_cannot_be_scheduled(builder, target):
    wanted = candidate("advance", target)
    odd = Candidate(wanted.task, {"absent": 1}, "0" * 16)
    failure = builder.submit(odd).result(60).failure
    assert failure.kind == "schedule" and "`decisions` of advance must be" in failure.message
    odd = Candidate(wanted.task, {}, "0" * 16)
    failure = builder.submit(odd).result(60).failure
    assert failure.kind == "schedule" and f"got {'0' * 16}" in failure.message


def test_a_compile_process_that_dies_is_replaced(builder, target):
    (group,) = builder.groups
    with builder.paused():
        future = builder.submit(candidate("attend", target))
        os.killpg(group, signal.SIGKILL)
    failure = future.result(60).failure
    assert failure.kind == "build" and "SIGKILL" in failure.message
    assert builder.submit(candidate("combine", target)).result(60).failure is None


def test_paused_stops_everything_and_always_goes_on(builder, target):
    future = builder.submit(candidate("extend_window", target))
    assert wait_for(lambda: builder.groups)
    (group,) = builder.groups

    def fail_while_paused():
        with builder.paused(), builder.paused():
            assert wait_for(lambda: set(states(group)) == {"T"})
            before = future.done()
            time.sleep(0.3)
            assert set(states(group)) == {"T"} and future.done() == before
            raise KeyError

    with pytest.raises(KeyError):
        fail_while_paused()
    assert wait_for(lambda: "T" not in states(group))
    assert future.result(60).failure is None


def test_a_build_that_takes_too_long(tmp_path, target):
    with Builder(target, tmp_path, processes=1, timeout_s=0.02) as builder:
        failure = builder.submit(candidate("append", target)).result(60).failure
        assert failure.kind == "build timeout"


def test_deadlines_leave_pauses_out():
    pause = Pause()
    left = pause.deadline(1)
    with pause.held():
        before = left()
        time.sleep(0.2)
        assert left() == pytest.approx(before, abs=0.05)
    time.sleep(0.2)
    assert left() < before - 0.15


def test_closing_cancels_what_is_left(tmp_path, target):
    builder = Builder(target, tmp_path, processes=1)
    futures = [builder.submit(candidate(name, target)) for name in ("attend", "append", "combine")]
    builder.close()
    builder.close()
    assert futures[-1].cancelled()
    assert builder.groups == []


def test_nothing_stays_behind_when_the_parent_is_killed(tmp_path):
    script = """
        import os, signal, sys, time
        from pathlib import Path
        from kivi_tvm import targets
        from kivi_tvm.tune.builder import Builder
        from kivi_tvm.tune.candidate import Candidate, Task
        from kivi_tvm.workloads import MODELS
        builder = Builder(targets.resolve("native"), Path(sys.argv[1]), processes=1)
        builder.submit(Candidate(Task("attend", MODELS["llama3-8b"]), {}, "0" * 16))
        while not builder.groups:
            time.sleep(0.01)
        with builder.paused():
            print(*builder.groups, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), tmp_path],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    group = int(done.stdout)
    assert wait_for(lambda: set(states(group)) <= {"Z"})

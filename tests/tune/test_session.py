"""Sessions on planted landscapes: what is measured, kept, published, and survives."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tuning
from tuning import OPTIMUM, Builder, Runner, bad_kind, session, task

from kivi_tvm.tune import session as tune_session
from kivi_tvm.tune.outcome import geometric_mean

FUNCTIONS = ("attend", "attend_window", "append", "advance")


def child(folder, trials):
    process = subprocess.Popen(
        [sys.executable, tuning.__file__, folder, str(trials)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert process.stdout.readline() == "ready\n"
    return process


def go(process):
    process.stdin.write("\n")
    process.stdin.flush()


def lines(folder):
    return [x for path in Path(folder).glob("*.jsonl") for x in path.read_text().splitlines()[1:]]


def wait_for_trials(folder, count):
    while len(lines(folder)) < count:
        time.sleep(0.01)


def test_publishes_a_winner_per_function(tmp_path):
    result, published, observer = session(tmp_path, FUNCTIONS, trials=200, cost_model="random")
    assert observer.outcomes == list(result.outcomes)
    attend, window, append, advance = result.outcomes
    # a function without choices is measured, but there is nothing to publish
    assert published == [attend, window, append]
    assert attend.trials >= 100 and sum(each.trials for each in result.outcomes) == 199
    assert result.new_trials == 199 and not result.stopped
    for each in (attend, window):
        assert each.ratio > 1.5 and each.default_us == tuning.planted_us({})
        assert each.tuned_us == tuning.planted_us(each.decisions) == each.curve[-1]
        assert sorted(each.curve, reverse=True) == list(each.curve)
    # 8 programs in a space that was exhausted; no choices at all
    assert (append.trials, append.exhausted, append.failures) == (8, True, {"schedule": 1})
    assert (advance.trials, advance.decisions, advance.ratio) == (1, {}, 1.0)
    assert attend.bound_share == pytest.approx(1_000_000 / 10e9 * 1e6 / attend.tuned_us)
    assert geometric_mean(result.outcomes) == pytest.approx(
        math.prod(each.ratio for each in result.outcomes) ** (1 / 4)
    )


def test_trials_that_small_spaces_leave_go_to_the_others(tmp_path):
    result, published, observer = session(tmp_path, ("attend", "combine", "advance"), trials=80)
    # `combine` has 4 programs where 64 points were estimated; `attend` is published again
    assert [(each.task.function, each.trials) for each in published] == [
        ("attend", 40),
        ("combine", 4),
        ("attend", 75),
    ]
    assert list(result.outcomes)[:2] == [published[2], published[1]]
    assert [progress.done for progress in observer.tasks] == [75, 4, 1]


def test_builds_the_next_batch_before_it_measures(tmp_path):
    builder = Builder()
    pending = []
    runner = Runner(after=lambda r: pending.append(len(builder.submitted)))
    session(tmp_path, runner=runner, builder=builder, trials=24)
    assert pending == [16, 24, 24]
    assert [len(batch) for batch in runner.batches] == [8, 8, 8]


def test_wrong_candidates_are_counted_and_never_published(tmp_path):
    fast = Runner(bad=bad_kind, us=lambda d: 1.0 if d.get("b") == 8 else tuning.planted_us(d))
    result, (outcome,), _ = session(tmp_path, runner=fast, builder=Builder(bad_kind), trials=120)
    assert outcome.decisions.get("b") != 8 and outcome.tuned_us > 1
    assert set(outcome.failures) == {"wrong", "crash", "build timeout"}
    assert all(bad_kind(c) is None for compared in fast.compared for c in compared)
    assert all(bad_kind(c) != "build timeout" for batch in fast.batches for c in batch)
    assert result.new_trials == outcome.trials == 120


def test_a_gain_within_the_noise_keeps_the_default(tmp_path):
    _, (outcome,), _ = session(tmp_path, runner=Runner(us=lambda d: 100 - 1.9 * bool(d)))
    assert (outcome.decisions, outcome.ratio, outcome.tuned_us) == ({}, 1.0, 100)


def test_the_default_and_the_five_best_are_compared(tmp_path):
    runner = Runner()
    session(tmp_path, runner=runner, trials=40)
    (compared,) = runner.compared
    assert len(compared) == 6 and compared[0].decisions == {}


def test_records_of_other_kernels_come_after_the_default(tmp_path):
    runner = Runner()
    best = {name: option for name, option in OPTIMUM.items() if option != 1}
    _, (outcome,), _ = session(tmp_path, runner=runner, trials=8, seeds=[best, {"b": 4}])
    assert [c.origin for c in runner.batches[0][:4]] == ["default", "record", "record", "search"]
    assert outcome.decisions == best


def test_nothing_works(tmp_path):
    builder = Builder(lambda candidate: "build")
    result, published, observer = session(tmp_path, ("attend", "advance"), builder=builder)
    assert not published
    attend, advance = result.outcomes
    assert attend.error == advance.error == "the default failed: build: planted"
    assert attend.trials == 16 and advance.trials == 1  # given up while the second was built
    assert observer.outcomes == list(result.outcomes)


def test_a_default_that_fails_is_said(tmp_path):
    def bad(candidate):
        return None if candidate.decisions else "wrong"

    result, published, _ = session(tmp_path, runner=Runner(bad))
    (outcome,) = result.outcomes
    assert not published and outcome.trials == 16  # no others are tried: they have no result
    assert outcome.error == "the default failed: wrong: planted; 15 others work"


def test_failures_that_may_be_the_machine_s_are_tried_again(tmp_path):
    """A full disk, a timeout on a busy machine: the same command again gets a result."""
    _, published, _ = session(tmp_path, runner=Runner(lambda candidate: "timeout"))
    assert not published and lines(tmp_path)
    _, (outcome,), _ = session(tmp_path)
    assert outcome.error is None and not outcome.failures


def test_a_wrong_candidate_is_not_tried_again(tmp_path):
    def bad(candidate):
        return "wrong" if candidate.decisions else None

    session(tmp_path, runner=Runner(bad), trials=40)
    session(tmp_path, runner=Runner(bad), trials=80)
    hashes = [json.loads(line)["schedule_hash"] for line in lines(tmp_path)]
    assert len(set(hashes)) == len(hashes)


def test_resumed_trials_count(tmp_path):
    first, (half,), _ = session(tmp_path, trials=40)
    second, (whole,), _ = session(tmp_path, trials=100)
    assert (first.new_trials, second.new_trials, whole.trials) == (40, 60, 100)
    assert whole.curve[:40] == half.curve
    hashes = [json.loads(line)["schedule_hash"] for line in lines(tmp_path)]
    assert len(set(hashes)) == len(hashes) == 100
    again = Runner()
    third, (same,), _ = session(tmp_path, runner=again, trials=100)
    assert third.new_trials == 0 and not again.batches and len(again.compared) == 1
    assert same.decisions == whole.decisions


def test_a_session_is_deterministic(tmp_path):
    runs = [session(tmp_path / str(i), FUNCTIONS, trials=90, seed=5)[0] for i in range(2)]
    other = session(tmp_path / "other", FUNCTIONS, trials=90, seed=6)[0]
    first, second = ([each.curve for each in run.outcomes] for run in runs)
    assert first == second != [each.curve for each in other.outcomes]


def test_the_time_budget_ends_a_session(tmp_path):
    slow = Runner(after=lambda runner: time.sleep(0.05))
    start = time.monotonic()
    result, published, _ = session(
        tmp_path, ("attend", "attend_window"), runner=slow, trials=4000, time_budget_s=1.0
    )
    assert time.monotonic() - start < 3
    assert [each.task.function for each in published] == ["attend", "attend_window"]
    assert result.new_trials == sum(each.trials for each in published) < 400
    assert min(each.trials for each in published) >= 8


def test_ctrl_c_publishes_what_is_finished(tmp_path):
    def press(runner):
        if len(runner.batches) == 3:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    result, published, observer = session(
        tmp_path, ("attend", "attend_window"), runner=Runner(after=press), trials=400
    )
    assert result.stopped == "interrupted" and "interrupted" in observer.said[0]
    assert [(each.task.function, each.trials) for each in published] == [("attend", 24)]
    assert result.outcomes[1].error == "not reached"
    assert signal.getsignal(signal.SIGINT) is handler


def test_crashes_under_ctrl_c_say_nothing_about_candidates(tmp_path):
    def press(runner):
        if len(runner.batches) == 2:
            runner.bad = lambda candidate: "crash"
            os.kill(os.getpid(), signal.SIGINT)

    class Interrupted(Runner):
        def measure(self, built):
            self.batches.append(built)
            press(self)
            return [self._one(each.candidate) for each in built]

    session(tmp_path, runner=Interrupted(), trials=400)
    assert len(lines(tmp_path)) == 8 and not any("crash" in line for line in lines(tmp_path))


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    def press(runner):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        session(tmp_path, runner=Runner(after=press), trials=400)


def test_kill_9_loses_at_most_the_batch_in_flight(tmp_path):
    process = child(tmp_path, 4000)
    go(process)
    wait_for_trials(tmp_path, 16)
    process.kill()
    process.communicate()
    kept = len(lines(tmp_path))
    assert kept >= 16
    result, (outcome,), observer = session(tmp_path, trials=kept + 24)
    assert result.new_trials == 24 and outcome.trials == kept + 24
    assert not [line for line in observer.said if "damaged" in line]


def test_two_processes_on_one_directory(tmp_path):
    processes = [child(tmp_path, 40) for _ in range(2)]
    for process in processes:
        go(process)
    found = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    assert [each["trials"] for each in found] == [[40], [40]]
    assert sum("another process" in line for each in found for line in each["said"]) == 1
    assert len(lines(tmp_path)) == 80 and len(list(tmp_path.glob("*.jsonl"))) == 2


class Busy(Runner):
    """A machine that others slow by up to ten times, for a batch at a time."""

    in_turn = True

    def compare(self, built, rounds):
        self.slower = 1 + 9 * random.Random(len(self.compared)).random()
        if rounds == tune_session.SEARCH_ROUNDS:
            self.batches.append([each.candidate for each in built])
            assert sum(not each.candidate.decisions for each in built) == 1
        return super().compare(built, rounds)

    def measure(self, built):
        raise AssertionError("candidates of one device must be timed in turn")

    def _one(self, candidate):
        found = super()._one(candidate)
        return replace(found, times_us=tuple(us * self.slower for us in found.times_us))


def test_a_busy_machine_does_not_mislead_the_search(tmp_path):
    """Times go by the default's in the same batch, also those of an earlier run."""
    session(tmp_path, runner=Busy(), trials=60)
    result, (outcome,), _ = session(tmp_path, runner=Busy(), trials=160)
    assert result.new_trials == 100
    session(tmp_path / "quiet", trials=60)
    _, (best,), _ = session(tmp_path / "quiet", trials=160)
    assert outcome.ratio == pytest.approx(best.ratio)
    assert min(outcome.curve) == pytest.approx(outcome.curve[0] / best.ratio)


def test_tasks_have_names():
    assert task().id.startswith("attend B1-H9-Hkv3-T2048-D64")

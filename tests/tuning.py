"""A builder, a runner and an observer of sessions without compilers, on planted landscapes."""

import json
import sys
import time
from concurrent.futures import Future
from pathlib import Path

from landscapes import OPTIMUM, OPTIONS, branching, plain, planted_us, space

from kivi_tvm.tune.candidate import Built, Failure, Measured, Task
from kivi_tvm.tune.journal import Journals
from kivi_tvm.tune.outcome import Options
from kivi_tvm.tune.runner import DeviceInfo
from kivi_tvm.tune.session import Tools, tune
from kivi_tvm.workloads import MODELS

__all__ = ["OPTIMUM", "planted_us"]
FACTS = {"sources": "digest", "versions": {"tvm": "0.27"}, "device": "planted"}


def task(function="attend"):
    return Task(function, MODELS["smollm2-135m"])


def one_point(recipe):
    return "one program"


def deceptive(recipe):
    """Only one of several choices changes the program."""
    taken = [recipe.choose(name, OPTIONS, 1) for name in "abcd"]
    return taken[0]


RECIPES = {
    "combine": deceptive,
    "attend": plain,
    "attend_window": plain,
    "append": branching,
    "advance": one_point,
}


def bad_kind(candidate):
    """What is wrong with a candidate of `plain`; half of those with b = 8 are fast but wrong."""
    if candidate.decisions.get("b") == 8:
        return "wrong" if candidate.decisions.get("a", 1) < 4 else "crash"
    return "build timeout" if candidate.decisions.get("f") == 8 else None


class Builder:
    """Builds at once; notes what it was given."""

    def __init__(self, bad=lambda candidate: None):
        self.bad, self.submitted = bad, []

    def submit(self, candidate):
        self.submitted.append(candidate)
        kind = self.bad(candidate)
        failure = Failure(kind, "planted") if kind in ("build", "build timeout") else None
        future = Future()
        path = None if failure else Path("library.so")
        future.set_result(Built(candidate, path, 0.25, failure))
        return future


class Runner:
    """Planted times; wrong candidates would be the fastest of all."""

    device, method, in_turn = DeviceInfo("planted", "cpu", 1), "local", False

    def __init__(self, bad=lambda candidate: None, us=planted_us, after=lambda runner: None):
        self.bad, self.us, self.after = bad, us, after
        self.batches, self.compared = [], []

    def measure(self, built):
        self.batches.append([each.candidate for each in built])
        found = [self._one(each.candidate) for each in built]
        self.after(self)
        return found

    def compare(self, built, rounds):
        self.compared.append([each.candidate for each in built])
        return [self._one(each.candidate) for each in built]

    def _one(self, candidate):
        kind = self.bad(candidate)
        if kind is not None:
            return Measured(candidate, failure=Failure(kind, "planted"))
        return Measured(candidate, (self.us(candidate.decisions),), 1e-4, 1e-3)

    def read_gb_per_s(self):
        return 10.0

    def close(self):
        """Nothing to close."""


class Observer:
    """Notes what it is told."""

    def __init__(self):
        self.tasks, self.outcomes, self.said = [], [], []

    def begin(self, tasks, options):
        self.tasks = tasks

    def changed(self, progress):
        """Progress is read from `tasks`."""

    def finished(self, outcome):
        self.outcomes.append(outcome)

    def say(self, message):
        self.said.append(message)


def session(folder, functions=("attend",), runner=None, builder=None, seeds=(), **options):
    """Run a session; its result, published outcomes, and observer."""
    published, observer = [], Observer()
    options = Options(**{"trials": 40, "batch": 8, **options})
    with Journals(folder, FACTS, observer.say) as journals:
        tools = Tools(
            builder=builder or Builder(),
            runner=runner or Runner(),
            journals=journals,
            observer=observer,
            space=lambda each: space(RECIPES[each.function]),
            seeds=lambda each: seeds,
            publish=published.append,
            nbytes=lambda each: 1_000_000,
        )
        result = tune([task(name) for name in functions], options, tools)
    return result, published, observer


if __name__ == "__main__":
    # A session that takes 0.1 s per batch, for tests that kill it; it waits for a line first.
    slow = Runner(after=lambda runner: time.sleep(0.1))
    folder, trials = Path(sys.argv[1]), int(sys.argv[2])
    print("ready", flush=True)
    sys.stdin.readline()
    result, published, observer = session(folder, runner=slow, trials=trials)
    facts = {
        "new": result.new_trials,
        "stopped": result.stopped,
        "trials": [each.trials for each in published],
        "said": observer.said,
    }
    print(json.dumps(facts))

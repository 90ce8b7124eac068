"""Random sequences of all operations on a ragged batch, against the plain-torch KIVI."""

import itertools
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from twins import SMALL, WIDE, Twins

MOST_ROWS, LONGEST = 5, 260
WINDOWS, ROLLBACKS, SINKS = ("kivi", "exact"), (0, 9), (0, 5)
MODES = [
    {"window": window, "rollback": rollback, "sink_tokens": sinks}
    for window, rollback, sinks in itertools.product(WINDOWS, ROLLBACKS, SINKS)
]


def mode_id(mode):
    return f"{mode['window']}-E{mode['rollback']}-sinks{mode['sink_tokens']}"


class CacheMachine(RuleBasedStateMachine):
    """Two layers and at most five rows; `cfg` and `mode` are set by the subclass of a test."""

    cfg, mode = None, None

    def __init__(self):
        super().__init__()
        self.twins = Twins(self.cfg, 3, **self.mode)

    @property
    def room(self):
        """Tokens that the longest row may still take."""
        return LONGEST - max(self.twins.lengths)

    @property
    def is_any_active(self):
        return bool(self.twins.active)

    def tokens(self, most):
        """How many tokens: few, or around a block or a page."""
        R, P = self.cfg.R, self.cfg.P
        edges = [n + d for n in (R, 2 * R, P, 2 * P) for d in (-1, 0, 1)]
        few = st.integers(0, 4)
        return st.one_of(few, st.sampled_from(edges), st.integers(0, 2 * P)).map(
            lambda n: min(n, most)
        )

    def any_row(self):
        return st.sampled_from(self.twins.active)

    def any_rows(self, most):
        """Rows to take, any number of times, inactive ones included."""
        count = len(self.twins.rows)
        return st.lists(st.integers(0, count - 1), min_size=1, max_size=most)

    @precondition(lambda self: 0 in self.twins.lengths)
    @rule(data=st.data())
    def prefill(self, data):
        empty = [i for i, n in enumerate(self.twins.lengths) if n == 0]
        rows = data.draw(st.lists(st.sampled_from(empty), min_size=1, unique=True), "rows")
        lengths = [data.draw(self.tokens(LONGEST), "tokens") for _ in rows]
        if any(lengths):
            self.twins.prefill(rows, lengths)

    @precondition(lambda self: self.is_any_active and self.room > 0)
    @rule(data=st.data())
    def decode(self, data):
        self.twins.decode(data.draw(st.integers(1, min(self.room, 2 * self.cfg.R)), "steps"))

    @precondition(lambda self: self.room > 0)
    @rule(data=st.data())
    def extend(self, data):
        lengths = [data.draw(self.tokens(self.room), "tokens") for _ in self.twins.rows]
        if any(lengths):
            self.twins.extend(lengths)

    @precondition(lambda self: self.is_any_active)
    @rule(data=st.data())
    def crop_within_rollback(self, data):
        most = [min(n, self.twins.rollback) for n in self.twins.lengths]
        self.twins.crop([data.draw(st.integers(0, n), "tokens") for n in most])

    @precondition(lambda self: self.is_any_active)
    @rule(data=st.data())
    def crop_any(self, data):
        counts = [data.draw(self.tokens(n), "tokens") for n in self.twins.lengths]
        self.twins.crop(counts)

    @precondition(lambda self: self.is_any_active)
    @rule(data=st.data())
    def crop_all_alike(self, data):
        most = min(self.twins.lengths[row] for row in self.twins.active)
        self.twins.crop(data.draw(self.tokens(most), "tokens"))

    @precondition(lambda self: self.is_any_active)
    @precondition(lambda self: None in self.twins.rows or len(self.twins.rows) < MOST_ROWS)
    @rule(data=st.data())
    def fork(self, data):
        self.twins.fork(data.draw(self.any_row(), "row"))

    @precondition(lambda self: self.is_any_active)
    @rule(data=st.data())
    def free(self, data):
        self.twins.free(data.draw(self.any_row(), "row"))

    @rule(data=st.data())
    def reorder(self, data):
        count = len(self.twins.rows)
        index = st.lists(st.integers(0, count - 1), min_size=count, max_size=count)
        self.twins.reorder(data.draw(index, "index"))

    @rule(data=st.data())
    def select(self, data):
        self.twins.select(data.draw(self.any_rows(MOST_ROWS), "index"))

    @precondition(lambda self: 2 * len(self.twins.rows) <= MOST_ROWS)
    @rule()
    def repeat(self):
        self.twins.repeat(2)

    @precondition(lambda self: max(self.twins.lengths) > LONGEST // 2)
    @rule()
    def reset(self):
        self.twins.reset()

    @precondition(lambda self: self.twins.rollback < 12)
    @rule(more=st.integers(0, 4))
    def enable_rollback(self, more):
        self.twins.enable_rollback(self.twins.rollback + more)

    @rule(pages=st.integers(0, 3))
    def reserve(self, pages):
        self.twins.cache.reserve(pages * self.cfg.P)

    @rule()
    def copy(self):
        self.twins.copy()

    @rule()
    def save_and_load(self):
        with tempfile.TemporaryDirectory() as directory:
            self.twins.save_and_load(Path(directory) / "cache.safetensors")

    @invariant()
    def holds_what_the_reference_says(self):
        self.twins.check()


def run(cfg, mode, examples, steps):
    machine = type("Machine", (CacheMachine,), {"cfg": cfg, "mode": mode})
    limits = settings(
        max_examples=examples,
        stateful_step_count=steps,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=limits)


@pytest.mark.parametrize("mode", MODES, ids=mode_id)
def test_any_operations(mode):
    run(SMALL, mode, examples=2, steps=25)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES, ids=mode_id)
def test_hundreds_of_operations(mode):
    run(SMALL, mode, examples=4, steps=250)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES, ids=mode_id)
def test_another_window(mode):
    run(WIDE, mode, examples=2, steps=120)

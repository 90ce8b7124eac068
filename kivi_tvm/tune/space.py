"""The space of a schedule function: every way it can be decided, explored by running it."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from statistics import fmean

from tvm.target import Target

from kivi_tvm.compile import Scheduler, schedule_hash
from kivi_tvm.config import KernelKey
from kivi_tvm.schedules.choices import Choice, ForeignDecisionError, Option

Decisions = Mapping[str, Option]
# Rounds in which draws may make further choices appear; schedules branch once or twice.
MAX_ROUNDS = 20
# Runs of a schedule function (20 to 60 ms each) that an exact count may cost.
COUNTED_POINTS = 64


@dataclass(frozen=True, slots=True)
class Point:
    """One run of a schedule function.

    Parameters
    ----------
    decisions : mapping of str to int or str
        What was decided otherwise than by default.
    choices : mapping of str to Choice
        What the function offered under these decisions, in its order; of a failing run, what it
        offered before it failed.
    schedule_hash : str
        Of the scheduled function; empty for a failing run.
    failure : str or None
        Why the function could not be scheduled like this.
    """

    decisions: Decisions
    choices: Mapping[str, Choice]
    schedule_hash: str
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Size:
    """How many points a space has; estimated unless they were counted one by one."""

    points: int
    exact: bool

    def __str__(self) -> str:
        if self.exact:
            return f"{self.points}"
        return (
            f"~{float(f'{self.points:.1e}'):,.0f}" if self.points < 1e6 else f"~{self.points:.0e}"
        )


Explore = Callable[[Decisions], Point]


def explorer(name: str, key: KernelKey, target: Target) -> Explore:
    """What makes and schedules the function `name` of `FUNCTIONS` with given decisions.

    Unlike `compile.scheduled_function` it tells what a failing schedule had offered, and takes
    decisions that are not offered as the default.
    """
    scheduler = Scheduler(name, key, target)

    def run(decisions: Decisions) -> Point:
        schedule = scheduler.begin(decisions)
        try:
            scheduler.finish(schedule)
        except ForeignDecisionError:
            raise
        except Exception as error:  # TVM raises several types, InternalError among them
            return Point(dict(decisions), schedule.choices, "", _reason(error))
        return Point(dict(decisions), schedule.choices, schedule_hash(name, schedule))

    def explore(decisions: Decisions) -> Point:
        known = dict(decisions)
        while True:
            try:
                return run(known)
            except ForeignDecisionError as error:
                del known[error.name]

    return explore


def _reason(error: Exception) -> str:
    """The first line that says something: TVM's errors print the whole function below it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if "rror" in line or "`" in line] or lines
    return f"{type(error).__name__}: {said[0][:200] if said else ''}"


class Space:
    """The points of one schedule function, each run at most once.

    Parameters
    ----------
    explore : callable
        Runs the function with given decisions, as `explorer` returns it: decisions that are not
        offered count as the default, and a failure is in the point.
    """

    def __init__(self, explore: Explore) -> None:
        self._explore = explore
        self._points: dict[frozenset[tuple[str, Option]], Point] = {}
        self._sampled: list[int] = []

    @property
    def default(self) -> Point:
        """The point where nothing is decided otherwise."""
        return self.point({})

    def point(self, decisions: Decisions) -> Point:
        """The point of `decisions`; what is not offered there falls back to its default.

        Under some decisions a choice does not exist, or has other options: decisions of another
        kernel, or of a neighbour, are kept as far as they mean something.
        """
        known = self._points.get(frozenset(decisions.items()))
        if known is not None:
            return known
        found = self._explore(decisions)
        point = replace(found, decisions=_other_than_default(found))
        for way in (decisions, point.decisions):
            self._points.setdefault(frozenset(way.items()), point)
        return self._points[frozenset(point.decisions.items())]

    def is_known(self, decisions: Decisions) -> bool:
        """Tell whether the function was run with exactly these decisions."""
        return frozenset(decisions.items()) in self._points

    def sample(self, rng: random.Random) -> Point:
        """A random point: every choice it meets is drawn uniformly."""
        drawn: dict[str, Option] = {}
        point = self.default
        for _ in range(MAX_ROUNDS):
            missing = [
                name
                for name, choice in point.choices.items()
                if name not in drawn or choice.taken != drawn[name]
            ]
            if not missing:
                break
            drawn |= {name: rng.choice(point.choices[name].options) for name in missing}
            point = self.point(drawn)
        self._sampled.append(_product(point))
        return point

    def neighbours(self, point: Point) -> list[dict[str, Option]]:
        """Decisions that differ from those of `point` in one choice."""
        found = []
        for name, choice in point.choices.items():
            for option in choice.options:
                if option != choice.taken:
                    changed = {**point.decisions, name: option}
                    if option == choice.default:
                        del changed[name]
                    found.append(changed)
        return found

    def walk(self) -> Iterator[Point]:
        """Every point, failing ones too, depth first and defaults before other options."""
        path: list[tuple[str, list[Option]]] = []  # each choice with the options still to try
        while True:
            point = self.point({name: options[0] for name, options in path})
            on_path = {name for name, _ in path}
            for name, choice in point.choices.items():
                if name not in on_path:
                    others = [option for option in choice.options if option != choice.default]
                    path.append((name, [choice.default, *others]))
            yield point
            while path and len(path[-1][1]) == 1:
                path.pop()
            if not path:
                return
            path[-1][1].pop(0)

    def size(self, limit: int = COUNTED_POINTS) -> Size:
        """The number of points that can be scheduled.

        Counted if that takes at most `limit` runs; else estimated: the product of the options met
        on a random path is on average the number of points (Knuth 1975).
        """
        if _product(self.default) <= limit:
            walked = list(islice(self.walk(), limit + 1))
            if len(walked) <= limit:
                return Size(sum(point.failure is None for point in walked), exact=True)
        return Size(round(fmean([_product(self.default), *self._sampled])), exact=False)


def _other_than_default(point: Point) -> dict[str, Option]:
    return {
        name: choice.taken
        for name, choice in point.choices.items()
        if choice.taken != choice.default
    }


def _product(point: Point) -> int:
    return math.prod(len(choice.options) for choice in point.choices.values())

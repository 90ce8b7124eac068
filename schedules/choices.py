"""Choices of a schedule: each has a default, and a tuner may make them otherwise.

A schedule function asks `choose` for every size or order that a chip could want differently. On a
plain `Schedule` it gets the defaults; on a `GuidedSchedule` the decisions it was given, so that one
function is both the default schedule and the search space. The function is run again for every
candidate: unlike the replay of a trace, it may branch on what was chosen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tvm import IRModule
from tvm.s_tir import Schedule
from tvm.tirx import PrimFunc

Option = int | str
T = TypeVar("T", int, str)


@dataclass(frozen=True, slots=True)
class Choice:
    """One choice as it was offered, and what was taken."""

    options: tuple[Option, ...]
    default: Option
    taken: Option


class ForeignDecisionError(ValueError):
    """A decision that is not among the options of the choice `name`."""

    def __init__(self, name: str, options: Sequence[Option], decision: Option) -> None:
        super().__init__(f"`decision` of {name} must be one of {list(options)}, got {decision!r}")
        self.name = name


class GuidedSchedule(Schedule):
    """A schedule whose choices follow `decisions`; those that it does not name, the default.

    Attributes
    ----------
    decisions : mapping of str to int or str
    choices : dict of str to Choice
        What was offered so far, by name: at first what the operator's factory was given.
    """

    __slots__ = ("choices", "decisions")  # TVM objects have no __dict__

    def __init__(
        self,
        module: IRModule | PrimFunc,
        decisions: Mapping[str, Option] | None = None,
        choices: Mapping[str, Choice] | None = None,
    ) -> None:
        super().__init__(module)
        self.decisions = dict(decisions or {})
        self.choices = dict(choices or {})

    def unused(self) -> tuple[str, ...]:
        """Decisions that the schedule function never asked for."""
        return tuple(sorted(self.decisions.keys() - self.choices.keys()))


def choose(sch: Schedule, name: str, options: Sequence[T], default: T) -> T:
    """One of `options`: `default`, unless a guided schedule was told otherwise.

    Parameters
    ----------
    sch : Schedule
    name : str
        Unique within the schedule function; part of every tuning record.
    options : sequence of int or str
        All different; one of them is `default`.
    default : int or str
        What the schedule takes when nobody tunes.

    Raises
    ------
    ForeignDecisionError
        The decision is not an option.
    ValueError
        `default` is not an option, or the name was used before.
    """
    decisions: Mapping[str, Option] = {}
    if isinstance(sch, GuidedSchedule):
        if name in sch.choices:
            raise ValueError(f"`name` must be unique in a schedule, got {name!r} twice")
        decisions = sch.decisions
    choice = decide(name, options, default, decisions)
    if isinstance(sch, GuidedSchedule):
        sch.choices[name] = choice
    # The instruction keeps the choice in the schedule's trace.
    n = len(options)
    index = choice.options.index(choice.taken)
    sch.sample_categorical(list(range(n)), [1 / n] * n, decision=index)
    return choice.taken  # type: ignore[return-value]


def decide(
    name: str, options: Sequence[Option], default: Option, decisions: Mapping[str, Option]
) -> Choice:
    """The choice `name`, taken as `decisions` say or by default.

    Raises
    ------
    ForeignDecisionError
        The decision is not an option.
    ValueError
        `default` is not an option.
    """
    if default not in options:
        raise ValueError(f"`default` of {name} must be one of {list(options)}, got {default!r}")
    taken = decisions.get(name, default)
    if taken not in options:
        raise ForeignDecisionError(name, options, taken)
    return Choice(tuple(options), default, taken)

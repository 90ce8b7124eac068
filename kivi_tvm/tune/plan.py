"""How trials are dealt to tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

MAIN_FUNCTION = "attend"  # nearly all of a decode step over a long cache


@dataclass(frozen=True, slots=True)
class Need:
    """What a task could use: `room` new candidates at most (an estimate), `least` in any case."""

    function: str
    room: int
    least: int = 0

    @property
    def weight(self) -> float:
        """Local search takes about as many trials as the space has binary digits."""
        return math.log2(1 + self.room)


def deal(trials: int, needs: Sequence[Need]) -> list[int]:
    """Share trials: half to `attend`, the rest by the size of what is left of the spaces.

    A task gets no more than its room; what it leaves goes to the others. What a task must have
    (the measurement of its default) it gets even beyond `trials`.

    Parameters
    ----------
    trials : int
    needs : sequence of Need

    Returns
    -------
    list of int
        One share per need, together `trials` where there is room, and not less than they must.
    """
    shares = [need.least for need in needs]
    main = [i for i, need in enumerate(needs) if need.function == MAIN_FUNCTION]
    others = [i for i in range(len(needs)) if i not in main]
    half = math.ceil(trials / 2) - sum(shares[i] for i in main)
    _deal_among(main, min(half, trials - sum(shares)), needs, shares)
    _deal_among(others, trials - sum(shares), needs, shares)
    _deal_among(main, trials - sum(shares), needs, shares)
    return shares


def _deal_among(who: Sequence[int], trials: int, needs: Sequence[Need], shares: list[int]) -> None:
    """Give trials one by one to whoever has least of them for its weight; most of them at once."""
    if trials <= 0:
        return
    trials -= _deal_most(who, trials, needs, shares)
    for _ in range(trials):
        open_ = [i for i in who if shares[i] < needs[i].room]
        if not open_:
            return
        least = min(open_, key=lambda i: ((shares[i] + 1) / needs[i].weight, i))
        shares[least] += 1


def _deal_most(who: Sequence[int], trials: int, needs: Sequence[Need], shares: list[int]) -> int:
    """Give everyone what they would have before the last few trials of so many; how many that is.

    Dealt one by one, shares grow like their weights, up to the room there is: by bisection the
    most for a unit of weight that `trials` suffice for.
    """

    def filled(each: float, less: int = 0) -> list[int]:
        full = (int(each * needs[i].weight) - less for i in who)
        return [max(shares[i], min(needs[i].room, n)) for i, n in zip(who, full)]

    before = sum(shares[i] for i in who)
    low = 0.0
    high = max((2 * needs[i].room / needs[i].weight for i in who if needs[i].room), default=0.0)
    while low < (middle := (low + high) / 2) < high:
        if sum(filled(middle)) - before <= trials:
            low = middle
        else:
            high = middle
    for i, n in zip(who, filled(low, 1)):  # one less: of what rounding may change
        shares[i] = n
    return sum(shares[i] for i in who) - before

"""The search over one task's decisions: local search around the best, with random exploration."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence

from kivi_tvm.schedules.choices import Option
from kivi_tvm.tune.candidate import Candidate, Task
from kivi_tvm.tune.cost import CostModel
from kivi_tvm.tune.space import Point, Space

Decisions = Mapping[str, Option]
WARM_UP = 8  # measured points before the best of them say where to look
# Shares of random points in a batch, before that and after. A default made by hand is better than
# most points, so that even the first changes are changes of it.
EXPLORED_FIRST = 0.5
EXPLORED = 0.25
PARENTS = 6
CHILDREN = 40  # changed decisions per parent among which the cost model chooses
MORE_CHANGES = 0.3  # probability of each further change of a child
DRAWS = 10  # draws per wanted point before the space counts as nearly empty
BARREN = 300  # points of the walk in a row without a new program


class Search:
    """Proposes candidates of one task, never two that are the same program.

    The order is: the default, then `seeds`, then batches of random points and of mutations of the
    best measured ones. It depends on nothing but `seed`, the task and what was told.

    Parameters
    ----------
    task : Task
    space : Space
    model : CostModel
    seed : int
    seeds : iterable of mapping of str to int or str
        Decisions that were best for other kernel keys.
    """

    def __init__(
        self,
        task: Task,
        space: Space,
        model: CostModel,
        seed: int = 0,
        seeds: Iterable[Decisions] = (),
    ) -> None:
        self.exhausted = False
        self.failures: list[Point] = []  # points that cannot be scheduled, each once
        self._task, self._space, self._model = task, space, model
        self._rng = random.Random(f"{seed} {task.id}")
        self._opening = self._first(seeds)
        self._walk = space.walk()
        self._hashes: set[str] = set()
        self._failed: set[frozenset[tuple[str, Option]]] = set()
        self._results: list[tuple[Decisions, float]] = []

    def tell(self, decisions: Decisions, schedule_hash: str, us: float) -> None:
        """Take one result: microseconds, infinite for a failed candidate."""
        self._hashes.add(schedule_hash)
        self._results.append((dict(decisions), us))

    def tell_unschedulable(self, decisions: Decisions) -> None:
        """Take what an earlier run found not to be schedulable: it is no news again."""
        self._failed.add(frozenset(decisions.items()))

    def propose(self, n: int) -> list[Candidate]:
        """Up to `n` new candidates; fewer only when the space is exhausted."""
        found = self._new(self._opening, n)
        if len(found) < n:
            explored = EXPLORED if self._is_warm else EXPLORED_FIRST
            wanted = round((1 - explored) * (n - len(found)))
            found += self._new(self._mutations(4 * wanted), wanted)
        if len(found) < n:
            draws = (("search", self._space.sample(self._rng)) for _ in range(DRAWS * n))
            found += self._new(draws, n - len(found))
        if len(found) < n and not self.exhausted:
            left = n - len(found)
            found += self._new(self._remaining(), left)
        return found

    def _first(self, seeds: Iterable[Decisions]) -> Iterator[tuple[str, Point]]:
        yield "default", self._space.default
        for decisions in seeds:
            yield "record", self._space.point(decisions)

    def _new(self, points: Iterable[tuple[str, Point]], n: int) -> list[Candidate]:
        """Up to `n` candidates of `points` that are programs not proposed before."""
        found: list[Candidate] = []
        if n < 1:
            return found
        for origin, point in points:
            if point.failure is not None:
                self._remember_failure(point)
            elif point.schedule_hash not in self._hashes:
                self._hashes.add(point.schedule_hash)
                found.append(Candidate(self._task, point.decisions, point.schedule_hash, origin))
                if len(found) == n:
                    break
        return found

    def _remember_failure(self, point: Point) -> None:
        known = frozenset(point.decisions.items())
        if known not in self._failed:
            self._failed.add(known)
            self.failures.append(point)

    @property
    def _is_warm(self) -> bool:
        return sum(math.isfinite(us) for _, us in self._results) >= WARM_UP

    def _mutations(self, n: int) -> Iterator[tuple[str, Point]]:
        """The `n` most promising of many changes to the best points, at first to the default."""
        best = sorted((us, i) for i, (_, us) in enumerate(self._results) if math.isfinite(us))
        parents = [self._space.point(self._results[i][0]) for _, i in best[:PARENTS]]
        parents = parents if self._is_warm else [self._space.default]
        children: dict[frozenset[tuple[str, Option]], Decisions] = {}
        for parent in parents:
            for child in self._children(parent):
                if not self._space.is_known(child):
                    children.setdefault(frozenset(child.items()), child)
        self._model.fit(self._results)
        ranked = self._model.rank(list(children.values()), self._rng)
        for child in ranked[:n]:
            yield "search", self._space.point(child)

    def _children(self, parent: Point) -> Sequence[Decisions]:
        """Every neighbour of a point, or a random part of them with further changes to some."""
        neighbours = self._space.neighbours(parent)
        if not neighbours:
            return []
        children = [self._rng.choice(neighbours) for _ in range(CHILDREN)]
        for i, child in enumerate(children):
            while self._rng.random() < MORE_CHANGES:
                name, choice = self._rng.choice(list(parent.choices.items()))
                child = {**child, name: self._rng.choice(choice.options)}
            children[i] = _without_defaults(child, parent)
        return children

    def _remaining(self) -> Iterator[tuple[str, Point]]:
        """The points in order, once random draws find nothing new; notes when they end."""
        barren, before = 0, len(self._hashes)
        for point in self._walk:
            yield "search", point
            barren = barren + 1 if len(self._hashes) == before else 0
            before = len(self._hashes)
            if barren > BARREN:
                break
        self.exhausted = True


def _without_defaults(child: Decisions, parent: Point) -> dict[str, Option]:
    defaults = {name: choice.default for name, choice in parent.choices.items()}
    return {name: taken for name, taken in child.items() if taken != defaults.get(name)}

"""Cost models: which of many untried decisions to build first."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, Protocol

import numpy as np

from kivi_tvm.errors import UserError
from kivi_tvm.schedules.choices import Option

Decisions = Mapping[str, Option]
COST_MODELS = ("xgb", "random")
# Below this many measured points a regression over one-hot decisions says nothing.
MIN_RESULTS = 8
# A failed candidate counts as this many times the slowest one.
FAILED_FACTOR = 2.0
TREES = 60  # fitted in about 30 ms on 200 results


class CostModel(Protocol):
    """Puts decisions in the order in which they should be tried."""

    name: str

    def fit(self, results: Sequence[tuple[Decisions, float]]) -> None:
        """Learn from all results so far: decisions and microseconds, infinite if failed."""

    def rank(self, pool: Sequence[Decisions], rng: random.Random) -> list[Decisions]:
        """The same decisions, the most promising first."""


class RandomCost:
    """No model: a random order."""

    name = "random"

    def fit(self, results: Sequence[tuple[Decisions, float]]) -> None:
        """Nothing to learn."""

    def rank(self, pool: Sequence[Decisions], rng: random.Random) -> list[Decisions]:
        """The pool, shuffled."""
        return rng.sample(pool, len(pool))


class XgbCost:
    """Gradient-boosted trees that regress log time on one-hot decisions.

    A decision that is not made, because it is the default or because the choice does not exist,
    is 0 in every column.
    """

    name = "xgb"

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed
        self._columns: dict[tuple[str, Option], int] = {}
        self._model: Any = None

    def fit(self, results: Sequence[tuple[Decisions, float]]) -> None:
        """Fit anew: a few hundred rows take less time than compiling one candidate."""
        times = [us for _, us in results if math.isfinite(us)]
        if len(times) < MIN_RESULTS:
            return
        import xgboost

        pairs = sorted({pair for decisions, _ in results for pair in decisions.items()}, key=repr)
        self._columns = {pair: i for i, pair in enumerate(pairs)}
        failed = FAILED_FACTOR * max(times)
        log_us = np.log([us if math.isfinite(us) else failed for _, us in results])
        features = self._features([decisions for decisions, _ in results])
        # One thread: the timing of candidates must not meet a busy machine.
        options = {"max_depth": 4, "eta": 0.2, "nthread": 1, "seed": self._seed}
        self._model = xgboost.train(options, xgboost.DMatrix(features, log_us, nthread=1), TREES)

    def rank(self, pool: Sequence[Decisions], rng: random.Random) -> list[Decisions]:
        """The pool by predicted time; shuffled while there is no model."""
        shuffled = rng.sample(pool, len(pool))
        if self._model is None or not shuffled:
            return shuffled
        import xgboost

        rows = xgboost.DMatrix(self._features(shuffled), nthread=1)
        order = np.argsort(self._model.predict(rows), kind="stable")
        return [shuffled[i] for i in order]

    def _features(self, rows: Sequence[Decisions]) -> Any:
        features = np.zeros((len(rows), len(self._columns) + 1), np.float32)
        for row, decisions in zip(features, rows):
            for pair in decisions.items():
                if pair in self._columns:
                    row[self._columns[pair]] = 1
                else:
                    row[-1] += 1  # decisions nobody has measured
        return features


def default_cost_model() -> str:
    """The model "xgb" where xgboost is installed, else "random"."""
    return "xgb" if find_spec("xgboost") else "random"


def check_cost_model(name: str) -> None:
    """Refuse a cost model that cannot be made.

    Raises
    ------
    UserError
        There is none of that name, or it needs a package that is not installed.
    """
    if name not in COST_MODELS:
        raise UserError(f"`--cost-model` must be one of {list(COST_MODELS)}, got {name!r}")
    if name == "xgb" and not find_spec("xgboost"):
        raise UserError("`--cost-model xgb` needs xgboost: pip install 'kivi-tvm[tune]'")


def cost_model(name: str, seed: int = 0) -> CostModel:
    """A new cost model, for one task."""
    check_cost_model(name)
    return XgbCost(seed) if name == "xgb" else RandomCost()

"""Planted search spaces: schedule functions without TVM, and the time of each of their points."""

import hashlib
import math

from kivi_tvm.schedules.choices import Choice
from kivi_tvm.tune.candidate import Task
from kivi_tvm.tune.space import Point, Space
from kivi_tvm.workloads import MODELS

TASK = Task("attend", MODELS["smollm2-135m"])
OPTIONS = (1, 2, 4, 8)
# The best option of each choice of `plain`, and how much each step away from it costs.
OPTIMUM = {"a": 4, "b": 1, "c": 8, "d": 2, "e": 2, "f": 4}
STEP = {"a": 0.3, "b": 0.1, "c": 0.2, "d": 0.15, "e": 0.05, "f": 0.1}


class Recipe:
    """Stands for a `GuidedSchedule`: `choose` asks, and the run may fail by ValueError."""

    def __init__(self, decisions):
        self.decisions, self.choices = decisions, {}

    def choose(self, name, options, default):
        taken = self.decisions.get(name, default)
        if taken not in options:
            taken = default
        self.choices[name] = Choice(tuple(options), default, taken)
        return taken


def digest(thing):
    return hashlib.sha256(repr(thing).encode()).hexdigest()[:16]


def explore(recipe):
    """An `Explore` of a function over a `Recipe`, whose `runs` counts the calls."""

    def run(decisions):
        run.runs += 1
        asked = Recipe(dict(decisions))
        try:
            program = recipe(asked)
        except ValueError as error:
            return Point(dict(decisions), asked.choices, "", str(error))
        return Point(dict(decisions), asked.choices, digest(program))

    run.runs = 0
    return run


def plain(recipe):
    """4,096 points, every one another program; the default is all 1."""
    return [recipe.choose(name, OPTIONS, 1) for name in OPTIMUM]


def branching(recipe):
    """Choices that exist, and options that are offered, under some decisions only: 10 points.

    Tiles of 8 fail with deep unrolling, and lanes change nothing when serial.
    """
    if recipe.choose("order", ("serial", "tiled"), "serial") == "serial":
        recipe.choose("lanes", (4, 8), 4)
        return "serial"
    tile = recipe.choose("tile", (2, 4, 8), 4)
    unroll = recipe.choose("unroll", [u for u in (1, 2, 4) if u <= tile], 1)
    if (tile, unroll) == (8, 4):
        raise ValueError("too deep")
    return tile, unroll


def space(recipe=plain):
    return Space(explore(recipe))


def planted_us(decisions):
    """Time of a point of `plain`: separable but for `a`, which matters twice as much beside `b`."""
    taken = {name: decisions.get(name, 1) for name in OPTIMUM}
    off = {name: abs(math.log2(taken[name] / OPTIMUM[name])) for name in OPTIMUM}
    us = 100.0
    for name, steps in off.items():
        us *= 1 + STEP[name] * steps
    return us * (1 + 0.1 * off["a"] * off["b"])

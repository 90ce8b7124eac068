"""Schedules: how each operator's blocks run on a programming model.

`rule(op, hardware)` returns a function over an `s_tir.Schedule` that finds blocks by name. The
same function is the default (its choices carry a `decision`) and the search space.
"""

from __future__ import annotations

"""Where tokens of the window lie."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T


def slot_of(oldest: Any, count: Any, token: Any, ring: Any) -> Any:
    """The place in a ring of a token of the window; that of the last one where there is none.

    `oldest` is the place of the window's first token, `count` how many it has.
    """
    at = oldest + T.min(token, count - 1)
    return at - T.Select(at >= ring, ring, 0)

"""Lines for the person who waits, on stderr."""

from __future__ import annotations

import sys

_said: set[str] = set()


def announce(message: str) -> None:
    """One line on stderr, at once."""
    print(f"kivi-tvm: {message}", file=sys.stderr, flush=True)


def announce_once(message: str) -> None:
    """`announce`, unless this process has said the same before."""
    if message not in _said:
        _said.add(message)
        announce(message)

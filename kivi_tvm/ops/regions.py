"""What a block declares that it reads or writes, of several buffers at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.tirx import Buffer

ALL = slice(None)  # of an axis


def regions(buffers: Sequence[Buffer], *indices: Any) -> list[Any]:
    """The region of each buffer at leading indices, `ALL` among them; all of its other axes."""
    found = []
    for buffer in buffers:
        given = [*indices, *[ALL] * (len(buffer.shape) - len(indices))]
        places = zip(given, buffer.shape, strict=True)
        found.append(buffer[tuple(slice(0, n) if at is ALL else at for at, n in places)])
    return found

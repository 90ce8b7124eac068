"""What a cache is made with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from kivi_tvm.config import WINDOWS
from kivi_tvm.errors import UserError


@dataclass(frozen=True, slots=True)
class CacheOptions:
    """Arguments of `Module.new_cache`, which describes them.

    Raises
    ------
    UserError
        One or more break their rule; the message lists every one.
    """

    num_layers: int = 1
    batch_size: int = 1
    max_tokens: int | None = None
    device: Any = "cpu"
    rollback: int = 0
    window: str = "kivi"
    sink_tokens: int = 0

    def __post_init__(self) -> None:
        found = []
        least = {"num_layers": 1, "batch_size": 1, "max_tokens": 1, "rollback": 0, "sink_tokens": 0}
        for name, low in least.items():
            count = getattr(self, name)
            if name == "max_tokens" and count is None:
                continue
            if not isinstance(count, int) or isinstance(count, bool) or count < low:
                found.append(f"`{name}` must be an int of at least {low}, got {count!r}")
        if self.window not in WINDOWS:
            found.append(f"`window` must be one of {list(WINDOWS)}, got {self.window!r}")
        try:
            torch.device(self.device)
        except (RuntimeError, TypeError):
            found.append(f"`device` must be a torch device, got {self.device!r}")
        if found:
            raise UserError("; ".join(found))

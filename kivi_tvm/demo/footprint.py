"""Bytes of a cache, held and computed, beside those of a float16 cache of the same tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from kivi_tvm import layout
from kivi_tvm.config import KiviConfig

FLOAT16_BYTES = 2


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes for `tokens` tokens of one sequence, all layers.

    `packed`: codes, scales and zeros; `window`: recent tokens in the model's dtype; `other`:
    tables, state and scratch; `fp16`: keys and values in float16.
    """

    tokens: int
    packed_bytes: int
    window_bytes: int
    other_bytes: int
    fp16_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.packed_bytes + self.window_bytes + self.other_bytes

    @property
    def ratio(self) -> float:
        """Share of the float16 cache's bytes."""
        return self.total_bytes / self.fp16_bytes

    def to_dict(self) -> dict[str, float]:
        return asdict(self) | {"total_bytes": self.total_bytes, "ratio": self.ratio}


Parts = Sequence[tuple[KiviConfig, int]]  # configurations, and layers of each


def held(parts: Parts, tokens: int, nbytes: Mapping[str, int]) -> Footprint:
    """What a cache holds by its own account (`cache.nbytes`, by part and "total")."""
    packed, window = nbytes["packed"], nbytes["window"]
    other = nbytes["total"] - packed - window
    return Footprint(tokens, packed, window, other, float16_bytes(parts, tokens))


def computed(parts: Parts, tokens: int) -> Footprint:
    """The same from the memory layout alone: pages for `tokens`, and one sequence's rings."""
    packed = window = 0
    for cfg, num_layers in parts:
        pages = layout.num_pages(cfg, layout.packed_keys(cfg, tokens))
        packed += num_layers * _bytes(layout.page_buffers(cfg, pages))
        window += num_layers * _bytes(layout.ring_buffers(cfg, num_slots=1))
    return Footprint(tokens, packed, window, 0, float16_bytes(parts, tokens))


def float16_bytes(parts: Parts, tokens: int) -> int:
    """Keys and values of `tokens` tokens in float16."""
    elements = sum(2 * num_layers * cfg.H_kv * cfg.D for cfg, num_layers in parts)
    return elements * tokens * FLOAT16_BYTES


def _bytes(buffers: Mapping[str, layout.Buffer]) -> int:
    return sum(buffer.nbytes for buffer in buffers.values())

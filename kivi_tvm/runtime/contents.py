"""What a cache holds, apart from where it lies: the record that copies and files share.

Rings, slots, spare pages and reserved memory are no part of it. Full-precision tokens come in the
order of rows and tokens, so they fit into rings of any size.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple

from kivi_tvm import layout
from kivi_tvm.config import WINDOWS, KiviConfig


class StoredRow(NamedTuple):
    """One row of a cache.

    Attributes
    ----------
    active : bool
    length : int
        Tokens, sinks included.
    values_from, keys_from : int
        Body tokens from which on full-precision values and keys are held.
    refilled : int
        Tokens that crops replaced by their dequantized values.
    pages : tuple of int
        Its pages among those of the contents, in the order of the tokens; complete ones may belong
        to several rows.
    """

    active: bool
    length: int
    values_from: int
    keys_from: int
    refilled: int
    pages: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Contents:
    """What a cache holds, without the tensors."""

    num_layers: int
    window: str
    rollback: int
    sink_tokens: int
    num_pages: int
    rows: tuple[StoredRow, ...]

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(row.length for row in self.rows)

    def body(self, row: StoredRow) -> int:
        """Tokens of a row besides its sinks."""
        return max(0, row.length - self.sink_tokens)

    def tokens(self, name: str) -> list[range]:
        """The full-precision tokens of every row in window `name`; body tokens unless a sink."""
        if name.endswith("sink"):
            return [range(min(row.length, self.sink_tokens)) for row in self.rows]
        return [
            range(row.keys_from if name == "k_exact" else row.values_from, self.body(row))
            for row in self.rows
        ]

    def buffers(self, cfg: KiviConfig) -> dict[str, layout.Buffer]:
        """Shape and dtype of a layer's tensors: `num_pages` pages, windows `[H_kv, tokens, D]`."""
        found = layout.page_buffers(cfg, self.num_pages)
        for name in layout.ring_buffers(cfg, 0, self.rollback, self.window, self.sink_tokens):
            count = sum(map(len, self.tokens(name)))
            found[name] = layout.Buffer((cfg.H_kv, count, cfg.D), cfg.dtype)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"rows": [row._asdict() for row in self.rows]}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Contents:
        """The inverse of `to_dict`, of data that may be anything.

        Raises
        ------
        KeyError, TypeError, ValueError
            A field is missing or is not what it must be.
        """
        values = {field.name: plain[field.name] for field in fields(cls)}
        rows = [StoredRow(**row) for row in values["rows"]]
        found = cls(**values | {"rows": tuple(row._replace(pages=(*row.pages,)) for row in rows)})
        counts = [found.num_layers, found.rollback, found.sink_tokens, found.num_pages]
        for row in found.rows:
            counts += [row.length, row.values_from, row.keys_from, row.refilled, *row.pages]
        if not all(type(count) is int and count >= 0 for count in counts):
            raise ValueError("counts must be ints of at least 0")
        if not found.rows or not found.num_layers:
            raise ValueError("there must be at least one row and one layer")
        if found.window not in WINDOWS or any(type(row.active) is not bool for row in found.rows):
            raise ValueError(f"`window` must be one of {list(WINDOWS)} and `active` a bool")
        return found

    def problems(self, cfg: KiviConfig) -> list[str]:
        """Why no cache of this configuration can hold these rows."""
        found = [
            f"row {i} must have {rule}"
            for i, row in enumerate(self.rows)
            for rule in self._broken_rules(row, cfg)
        ]
        owners = Counter(page for row in self.rows for page in row.pages)
        for i, row in enumerate(self.rows):
            written = row.pages[layout.packed_values(cfg, self.body(row)) // cfg.P :]
            if any(owners[page] > 1 for page in written):
                found.append(f"row {i} must share complete pages only, got {row.pages}")
        return found

    def _broken_rules(self, row: StoredRow, cfg: KiviConfig) -> list[str]:
        length = self.body(row)
        keys, values = layout.packed_keys(cfg, length), layout.packed_values(cfg, length)
        exact_from = values if self.window == "exact" else keys
        rules = {
            "no tokens while it is inactive": row.active or not row.length,
            f"{layout.num_pages(cfg, keys)} pages below {self.num_pages}, got {row.pages}": (
                len(row.pages) == layout.num_pages(cfg, keys)
                and all(page < self.num_pages for page in row.pages)
            ),
            f"values of full precision from {values} on, got {row.values_from}": (
                row.values_from <= values
            ),
            f"keys of full precision from {exact_from} on, got {row.keys_from}": (
                row.keys_from <= exact_from
            ),
        }
        return [rule for rule, holds in rules.items() if not holds]

"""Inputs of the cases: small ragged rows for the check, recipes for what is timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kivi_tvm import layout
from kivi_tvm.config import KiviConfig
from kivi_tvm.layout import Buffer
from kivi_tvm.tune.candidate import Task
from kivi_tvm.tune.cases.case import Argument, fill, ints, tensor
from kivi_tvm.tune.pools import Pool
from kivi_tvm.workloads import Inputs, Workload, make_inputs

CHECKED_KV_HEADS = 2
BATCH_HEADS = 1024  # KV heads of all rows in a batch that fills a GPU
Lengths = Sequence[int | None]
KEYS = ("k_code", "k_scale", "k_zero")
VALUES = ("v_code", "v_scale", "v_zero")
RINGS = ("k_ring", "v_ring")
TABLES = ("table", "state", "slots")


def small(task: Task, lengths: Lengths, data: str = "normal", extra: int = 0) -> Workload:
    """The task's workload with few heads and these rows; None is an inactive one."""
    found = tuple(n or 0 for n in lengths)
    M = task.workload.cfg.M
    return replace(
        task.workload,
        num_heads=CHECKED_KV_HEADS * M,
        num_kv_heads=CHECKED_KV_HEADS,
        tokens=max(found) + extra,
        batch_size=len(found),
        lengths=found,
        data=data,
    )


def draw(
    task: Task, lengths: Lengths, data: str = "normal", steps: int = 1
) -> tuple[KiviConfig, Inputs]:
    """Configuration and inputs of a check."""
    workload = small(task, lengths, data)
    return workload.cfg, make_inputs(workload, steps)


def held(pool: Pool, names: Sequence[str], after: Pool | None = None) -> list[Argument]:
    """Buffers and tables of a pool as arguments; `after` holds what the call leaves in them."""

    def of(source: Pool, name: str) -> object:
        return source.buffers[name] if name in source.buffers else getattr(source, name)

    return [
        tensor(of(pool, n), None if after is None else of(after, n), n.endswith("code"))  # type: ignore[arg-type]
        for n in names
    ]


def repeated(task: Task, lengths: Sequence[int], heads: int) -> list[int]:
    """Rows of these lengths so many times that they have at least `heads` KV heads."""
    return list(lengths) * -(-heads // (len(lengths) * task.workload.cfg.H_kv))


class Timed:
    """Recipes for `B` rows of the task's workload in one layer of a cache.

    Parameters
    ----------
    task : Task
    lengths : sequence of int, optional
        Tokens of the rows, by default the workload's.
    """

    def __init__(self, task: Task, lengths: Sequence[int] | None = None) -> None:
        self.cfg = task.workload.cfg
        self.lengths = list(task.workload.row_lengths if lengths is None else lengths)
        self.B = len(self.lengths)
        self.counts = [layout.num_pages(self.cfg, length) for length in self.lengths]

    def pages(self, names: Sequence[str]) -> list[Argument]:
        """Codes, scales and zeros of all rows."""
        buffers = layout.page_buffers(self.cfg, max(1, sum(self.counts)))
        return [self._page_fill(name, buffers[name]) for name in names]

    def _page_fill(self, name: str, buffer: Buffer) -> Argument:
        if name.endswith("code"):
            return fill(buffer, "words")
        width = self.cfg.key_bits if name.startswith("k") else self.cfg.value_bits
        # a group of 32 normal numbers spans about 4
        return fill(buffer, "positive", 4 / 2**width) if "scale" in name else fill(buffer, "normal")

    def rings(self) -> list[Argument]:
        """Both rings, of one slot per row."""
        buffers = layout.ring_buffers(self.cfg, self.B)
        return [fill(buffers[name], "normal") for name in RINGS]

    def tables(self) -> list[Argument]:
        """Page table, state and slots: rows hold their pages in order."""
        width = max(1, *self.counts)
        table, first = [], 0
        for count in self.counts:
            row = list(range(first, first + count))
            table.append(row + [layout.NO_PAGE] * (width - count))
            first += count
        return [ints(table), *self.state()]

    def state(self) -> list[Argument]:
        """State and slots."""
        state = [
            [n, layout.packed_keys(self.cfg, n), layout.packed_values(self.cfg, n), 0]
            for n in self.lengths
        ]
        return [ints(state), ints(range(self.B))]

    def tokens(self, count: int, cold: bool = True) -> list[Argument]:
        """Keys and values `[B, H_kv, count, D]`."""
        cfg = self.cfg
        buffer = Buffer((self.B, cfg.H_kv, count, cfg.D), cfg.dtype)
        return [fill(buffer, "normal", cold=cold)] * 2

    def queries(self, rows: int) -> Argument:
        """Queries `[B, H rows, D]`."""
        cfg = self.cfg
        return fill(Buffer((self.B, cfg.H * rows, cfg.D), cfg.dtype), "normal", cold=False)

    def parts(self, rows: int, entries: int) -> list[Argument]:
        """Partial results: positive, so that sums can be divided by."""
        shape = (self.B, self.cfg.H * rows, entries)
        return [
            fill(Buffer((*shape, width), "float32"), "positive", cold=False)
            for width in (self.cfg.D, 2)
        ]


def nbytes(*arguments: Argument) -> int:
    """Bytes of tensors or recipes in full."""
    total = 0
    for argument in arguments:
        if "tensor" in argument:
            total += argument["tensor"].nbytes
        elif "fill" in argument:
            total += Buffer(tuple(argument["shape"]), argument["dtype"]).nbytes
    return total


def page_nbytes(cfg: KiviConfig, tokens: Sequence[int], names: Sequence[str]) -> int:
    """Bytes of the pages that hold so many tokens of every row."""
    buffers = layout.page_buffers(cfg, sum(layout.num_pages(cfg, n) for n in tokens))
    return sum(buffers[name].nbytes for name in names)


def token_nbytes(cfg: KiviConfig, tokens: int) -> int:
    """Bytes of so many tokens' keys, or values, in the model dtype."""
    return tokens * cfg.H_kv * cfg.D * layout.DTYPE_BYTES[cfg.dtype]

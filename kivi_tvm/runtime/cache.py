"""The cache of a batch: sequences, pages and lengths, shared by all layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from kivi_tvm.runtime import persistence, transfer
from kivi_tvm.runtime import rollback as rewinding
from kivi_tvm.runtime.checks import as_int, check_count, check_ints, check_rows
from kivi_tvm.runtime.layer import CacheLayer
from kivi_tvm.runtime.rollback import Cropped
from kivi_tvm.runtime.rows import Row
from kivi_tvm.runtime.step import SteppedCache
from kivi_tvm.runtime.surgery import rearrange


class Cache(SteppedCache):
    """KV cache of `batch_size` sequences and `num_layers` layers; `Module.new_cache` makes it.

    One forward is one step: `begin(n)`, then every layer once. The first layer called begins the
    step by itself if `begin` was not called.

    A row is active from the start, until `free`, and again when `prefill` or `extend` gives it
    tokens. Whatever raises leaves the cache as it was; in an open step, a layer that raised can be
    called again.
    """

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def batch_size(self) -> int:
        """Rows, active or not."""
        return len(self.rows)

    @property
    def rollback(self) -> int:
        """Tokens that `crop` takes back exactly."""
        return self.rows.rollback

    @property
    def sink_tokens(self) -> int:
        """First tokens of every row that stay in full precision."""
        return self.rows.sink_tokens

    @property
    def lengths(self) -> list[int]:
        """Tokens stored per row; 0 for inactive ones."""
        return self.rows.lengths

    @property
    def active(self) -> list[bool]:
        """Which rows take part in a step."""
        return self.rows.active

    @property
    def page_table(self) -> Tensor:
        return self.pages.table

    @property
    def nbytes(self) -> dict[str, int]:
        """Bytes actually held, by part.

        "packed" (codes, scales and zeros of the page pool), "window" (full-precision rings and
        sinks), "tables" (page table, lengths, slots), "workspace" (partial results and work lists,
        shared by all layers) and "total".
        """
        parts = {
            "packed": sum(layer.memory.packed_nbytes for layer in self.layers),
            "window": sum(layer.memory.window_nbytes for layer in self.layers),
            "tables": self.pages.table.nbytes + self.rows.nbytes,
            "workspace": self.lse.nbytes + sum(each.nbytes for each in self._workspaces()),
        }
        return {**parts, "total": sum(parts.values())}

    def report(self) -> dict[str, Any]:
        """What the cache is and holds, as plain data.

        "refilled" counts, per row, tokens whose dequantized values took the place of full-precision
        ones that were gone when `crop` needed them; "shared" pages have several rows.
        """
        return {
            "config": self.cfg.to_dict(),
            "num_layers": self.num_layers,
            "window": self.window,
            "rollback": self.rollback,
            "sink_tokens": self.sink_tokens,
            "max_tokens": self.max_tokens,
            "lengths": self.lengths,
            "active": self.active,
            "refilled": [row.refilled for row in self.rows.rows],
            "pages": {
                "capacity": self.pages.capacity,
                "used": self.pages.used,
                "shared": self.pages.shared,
            },
            "bytes": self.nbytes,
            "kernels": self.module.source,
        }

    def layer(self, index: int) -> CacheLayer:
        """Layer `index`.

        Raises
        ------
        TypeError, IndexError
            `index` is no int, or there is no such layer.
        """
        number = as_int(index)
        if number is None:
            raise TypeError(f"`index` must be an int, got {index!r}")
        if not 0 <= number < self.num_layers:
            raise IndexError(f"`index` must be in 0..{self.num_layers - 1}, got {index}")
        return self.layers[number]

    def __repr__(self) -> str:
        return (
            f"Cache(layers={self.num_layers}, lengths={self.lengths}, window={self.window!r}, "
            f"bytes={self.nbytes['total']:,})"
        )

    def prefill(
        self,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int] | Tensor | None = None,
        rows: Sequence[int] | None = None,
    ) -> None:
        """`CacheLayer.prefill` of a cache with one layer."""
        self._only_layer("prefill").prefill(k, v, lengths, rows)

    def decode(
        self,
        q: Tensor,
        k_new: Tensor,
        v_new: Tensor,
        scale: float | None = None,
        return_lse: bool = False,
        out: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """`CacheLayer.decode` of a cache with one layer."""
        return self._only_layer("decode").decode(q, k_new, v_new, scale, return_lse, out)

    def extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int] | Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """`CacheLayer.extend` of a cache with one layer."""
        return self._only_layer("extend").extend(q, k, v, lengths, scale)

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """`CacheLayer.dequantize` of a cache with one layer."""
        return self._only_layer("dequantize").dequantize()

    def _only_layer(self, call: str) -> CacheLayer:
        if self.num_layers != 1:
            raise ValueError(
                f"`cache.{call}` needs num_layers=1, got {self.num_layers}; "
                f"use `cache.layer(i).{call}`"
            )
        return self.layers[0]

    def crop(self, c: int | Sequence[int] | Tensor) -> Cropped:
        """Remove the last `c` tokens of every active row, or `c[i]` of row `i`.

        Exact, even across a flush, as long as no more than `rollback` tokens are taken back from
        the longest length since the last inexact crop. Beyond that the window is filled with
        dequantized values, and both the result and `report()` say for how many tokens.

        Returns
        -------
        Cropped
            `refilled` tokens per row, and `exact`.

        Raises
        ------
        TypeError, ValueError
            `c` is no count, or more than a row holds; nothing has changed.
        RuntimeError
            A step is open.
        """
        self.check_no_step()
        if isinstance(c, bool) or as_int(c) is not None:
            counts = [check_count("c", c) * active for active in self.active]
        else:
            counts = check_ints("c", c, "an int or a list of ints")
        if len(counts) != self.batch_size:
            raise ValueError(
                f"`c` must have one entry per row ({self.batch_size}), got {len(counts)}"
            )
        bad = {
            row: count
            for row, (count, length) in enumerate(zip(counts, self.lengths, strict=True))
            if not 0 <= count <= length
        }
        if bad:
            raise ValueError(
                f"`c` must be in 0..length with lengths {self.lengths}, got (row: c) {bad}"
            )
        return rewinding.crop(self, counts)

    def enable_rollback(self, tokens: int) -> None:
        """Let `crop` take back at least `tokens` tokens exactly, from now on.

        Tokens stored before are taken back exactly only as far as full-precision data is still
        held: the window's values, and keys that are not packed yet.

        Raises
        ------
        ValueError
            `tokens` is negative or no int.
        RuntimeError
            A step is open.
        """
        self.check_no_step()
        if check_count("tokens", tokens) > self.rollback:
            rewinding.enable(self, tokens)

    def reorder(self, index: Sequence[int] | Tensor) -> None:
        """Let every row `i` become a copy of row `index[i]`, as beam search asks for.

        Complete pages are shared, not copied; the first row to take a sequence keeps its window.

        Raises
        ------
        TypeError, ValueError
            `index` is not `batch_size` row numbers.
        RuntimeError
            A step is open.
        """
        self.check_no_step()
        chosen = check_rows("index", index, self.batch_size, distinct=False)
        if len(chosen) != self.batch_size:
            raise ValueError(
                f"`index` must have one entry per row ({self.batch_size}), got {len(chosen)}"
            )
        rearrange(self, chosen)

    def repeat(self, n: int) -> None:
        """Hold every row `n` times, side by side: rows `[0, 0, 1, 1, ...]` for `n = 2`.

        Raises
        ------
        ValueError
            `n` is less than 1 or no int.
        RuntimeError
            A step is open.
        """
        self.check_no_step()
        times = check_count("n", n, least=1)
        rearrange(self, [row for row in range(self.batch_size) for _ in range(times)])

    def select(self, index: Sequence[int] | Tensor) -> None:
        """Let row `i` be what row `index[i]` was; the batch size becomes `len(index)`.

        Raises
        ------
        TypeError, ValueError
            `index` is not a list of one or more row numbers.
        RuntimeError
            A step is open.
        """
        self.check_no_step()
        rearrange(self, check_rows("index", index, self.batch_size, distinct=False))

    def fork(self, row: int) -> int:
        """Copy row `row` into the lowest inactive row, or into a new last one; returns which.

        Raises
        ------
        TypeError, ValueError
            `row` is not the number of an active row.
        RuntimeError
            A step is open.
        """
        self.check_no_step()
        row = self._active_row(row)
        index = list(range(self.batch_size))
        target = self.active.index(False) if not all(self.active) else self.batch_size
        index[target : target + 1] = [row]
        rearrange(self, index)
        return target

    def free(self, row: int) -> None:
        """Forget row `row`: it is inactive until `prefill` or `extend` gives it tokens.

        Raises
        ------
        TypeError, ValueError
            `row` is not the number of an active row.
        RuntimeError
            A step is open.
        """
        self.check_no_step()
        row = self._active_row(row)
        with self.all_or_nothing([]):
            self.pages.release(self.rows.rows[row].slot)
            self.rows.rows[row] = Row()
            self.rows_changed()

    def reset(self) -> None:
        """Forget all sequences; every row is active and empty. Memory is kept for the next ones."""
        step = self._step
        try:
            with self.all_or_nothing([]):
                self.pages.clear()
                self.rows.rows = [Row(slot) for slot in range(self.batch_size)]
                self.rows_changed()
        except BaseException:
            self._step = step
            raise
        self._step = None

    def copy(self) -> Cache:
        """An independent cache with the same contents and options; reserved memory is not copied.

        Raises
        ------
        RuntimeError
            A step is open.
        """
        self.check_no_step()
        return transfer.copy(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        """`copy`: the kernels are shared."""
        memo[id(self)] = new = self.copy()
        return new

    def __reduce__(self) -> NoReturn:
        raise TypeError("a cache cannot be pickled: use `cache.save` and `module.load_cache`")

    def save(self, path: str | Path) -> None:
        """Write everything that the rows hold to a safetensors file; `Module.load_cache` reads it.

        The file is replaced as a whole. Shared pages are written once; what was freed or taken back
        is not in it.

        Raises
        ------
        CacheFileError
            The directory does not exist.
        RuntimeError
            A step is open.
        OSError
            The file cannot be written; what was at `path` is still there.
        """
        self.check_no_step()
        persistence.save(self, path)

    def _active_row(self, row: int) -> int:
        found = as_int(row)
        if found is None:
            raise TypeError(f"`row` must be an int, got {row!r}")
        if not 0 <= found < self.batch_size or not self.active[found]:
            rows = [i for i, active in enumerate(self.active) if active]
            raise ValueError(f"`row` must be one of the active rows {rows}, got {row}")
        return found

    def reserve(self, tokens: int) -> None:
        """Take the pages for `tokens` tokens of every active row now; steps still take scratch.

        A row that `crop` makes shorter gives pages back to the pool, where all rows may take them.

        Raises
        ------
        ValueError
            `tokens` is negative or above `max_tokens`.
        RuntimeError
            A step is open.
        """
        self.check_no_step()
        check_count("tokens", tokens)
        if self.max_tokens is not None and tokens > self.max_tokens:
            raise ValueError(f"`tokens` must be at most max_tokens={self.max_tokens}, got {tokens}")
        with self.all_or_nothing([]):
            self._make_room([max(self.rows.body(tokens), n) for n in self.rows.bodies])

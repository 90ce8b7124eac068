"""One layer of a cache: attention over its pages and windows, and the kernels that fill them."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any

import torch
import tvm_ffi
from torch import Tensor

from kivi_tvm import layout
from kivi_tvm.runtime.checks import (
    INDEX_LIMIT,
    check_no_overlap,
    check_rows,
    check_span,
    check_tensor,
    finite_scale,
    fits,
    in_lines,
    span,
)
from kivi_tvm.runtime.devices import processors
from kivi_tvm.runtime.memory import LayerMemory
from kivi_tvm.runtime.rows import NO_SLOT

if TYPE_CHECKING:
    from kivi_tvm.runtime.cache import Cache
    from kivi_tvm.runtime.workspace import Workspace


# What ends a step on a GPU, by the heads of all rows for each of its multiprocessors: `combine_few`
# with at most so many query heads, `combine_batch` from so many KV heads on, else `combine_window`.
# `attend_batch` is a whole step of so many KV heads, of rows that are one part each. Each was the
# fastest there on an H100; which of them it is changes no bit.
FEW_HEADS, BATCH_HEADS, WHOLE_HEADS = 4, 4, 3
# Windows before a step: (name, slots, copy of what they held).
Saved = Sequence[tuple[str, list[int], Tensor]]
NOTHING: Saved = ()


class CacheLayer:
    """Layer `index` of a `Cache`; `Cache.layer` gives it."""

    def __init__(self, cache: Cache, index: int) -> None:
        self.cache = cache
        self.index = index
        rows = cache.rows
        self.memory = LayerMemory(
            cache.cfg, rows.capacity, rows.rollback, cache.window, rows.sink_tokens, cache.device
        )
        self.bind()

    @property
    def pages(self) -> dict[str, Tensor]:
        """The page pool by `layout.page_buffers`' names."""
        return self.memory.pages

    @property
    def windows(self) -> dict[str, Tensor]:
        """The full-precision tokens by `layout.ring_buffers`' names, indexed by slot."""
        return self.memory.windows

    def bind(self) -> None:
        """Collect the leading arguments of every kernel; after any buffer was replaced."""
        cache, memory, rows = self.cache, self.memory, self.cache.rows
        B = len(rows)
        self._token_shape = (B, cache.cfg.H_kv, cache.cfg.D)
        self._query_shape = (B, cache.cfg.H, cache.cfg.D)
        keys, values = memory.pool("k"), memory.pool("v")
        k_ring, v_ring, k_exact = memory.rings(rows.capacity)
        tables = (cache.pages.table[: rows.capacity], rows.state)
        self._key_args = (*keys, *tables)
        self._value_args = (*values, *tables)
        self._fill_args = (*keys, k_ring, v_ring, *tables)
        self._fill_exact_args = (*keys, k_exact, v_ring, *tables) if k_exact.numel() else None
        # The hot path's are converted once: ten torch tensors cost 1.2 us in every call.
        self._append_args = _frozen(*keys, *values, k_ring, v_ring, k_exact, *tables)
        self._attend_args = _frozen(*keys, *values, *tables, rows.slots)
        self._window_args = _frozen(k_ring, v_ring, rows.state, rows.slots)
        self._batch_args = (*self._attend_args[:7], *self._window_args)
        self._row_args = _frozen(rows.state, rows.slots)
        self._takes_lines = False
        self._combine_window = self._attend_batch = None
        if cache.device.type == "cuda":
            manifest = cache.module.manifest
            self._takes_lines = manifest["compute"] == "half"
            # a launch costs more than the window does
            ends, whole = self._functions_of_steps(manifest["sources"])
            self._combine_window = cache.kernels[ends]
            self._attend_batch = cache.kernels[whole] if whole else None
        # `extend` reads the history as it was before the step
        history = _frozen(rows.state_before, rows.slots)
        self._extend_attend_args = (*self._attend_args[:-2], *history)
        self._extend_window_args = (*self._window_args[:2], *history)
        self._extend_row_args = history
        self._sink_args: tuple[Any, ...] = ()
        if rows.sink_tokens:
            sinks = [memory.windows[name][: rows.capacity] for name in ("k_sink", "v_sink")]
            self._sink_args = _frozen(*sinks, rows.sink_state, rows.slots)
            self._extend_sink_args = _frozen(*sinks, rows.sink_state_before, rows.slots)
        self._lse = tvm_ffi.from_dlpack(cache.lse)

    def _functions_of_steps(self, there: Container[str]) -> tuple[str, str | None]:
        """What ends a step of so many rows, and what is all of one if they are short enough."""
        cache = self.cache
        rows, places = len(cache.rows), processors(cache.device)
        heads, whole = rows * cache.cfg.H_kv, None
        if "attend_batch" in there and heads >= WHOLE_HEADS * places:
            whole = None if cache.rows.sink_tokens else "attend_batch"
        if "combine_few" in there and rows * cache.cfg.H <= FEW_HEADS * places:
            return "combine_few", whole
        if "combine_batch" in there and heads >= BATCH_HEADS * places:
            return "combine_batch", whole
        return "combine_window", whole

    def prefill(
        self,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int] | Tensor | None = None,
        rows: Sequence[int] | None = None,
    ) -> None:
        """Store prompts in empty rows; attention over them is the caller's, exact.

        Parameters
        ----------
        k, v : Tensor
            `[B, H_kv, T, D]` in the model dtype, keys after RoPE, inner stride 1. Row `i`'s
            tokens are the first `lengths[i]` ones: padding on the right, never stored.
        lengths : sequence of int or Tensor, optional
            `[B]`, each in `0 .. T`; default `T` for active rows, or for all if none is active.
            Rows that get no tokens may hold a sequence, which stays as it is.
        rows : sequence of int, optional
            The rows of the cache that `k`, `v` and `lengths` are about, in that order; each gets
            `T` tokens by default, inactive ones become active. Default: all.

        Raises
        ------
        TypeError, ValueError
            A tensor or length breaks a rule; nothing has changed.
        RuntimeError
            A row that gets tokens is not empty, or the layer was already called in this step.

        Source: paper Algorithm 1, prefill: keys `[0, T - T mod R)` and values `[0, T - R)`.
        """
        cache = self.cache
        B, H_kv, D = self._token_shape
        chosen = None if rows is None else check_rows("rows", rows, B)
        B = B if chosen is None else len(chosen)
        check_tensor("k", k, (B, H_kv, None, D), cache.dtype, cache.device)
        check_tensor("v", v, (B, H_kv, k.shape[2], D), cache.dtype, cache.device)
        check_span("a row of `k`", k[:1])
        check_span("a row of `v`", v[:1])
        added = cache.new_tokens(k.shape[2], lengths, chosen)
        cache.check_can_prefill(added)
        began = cache.enter(self.index, k.shape[2], added)
        try:
            self._store_prompts(k, v, list(range(B)) if chosen is None else chosen)
        except BaseException:
            cache.abandon(began)
            raise
        cache.leave(self.index)

    def _store_prompts(self, k: Tensor, v: Tensor, rows: list[int]) -> None:
        """Store `k, v [len(rows), H_kv, T, D]` of the open step: first the sinks, then the body."""
        step, held = self.cache.step, self.cache.rows
        if held.sink_tokens:
            self._store_sinks(k, v, rows)
            k, v = (x[:, :, held.sink_tokens :] for x in (k, v))
        if k.shape[2] == 0:
            return
        used = [held.rows[i].slot if step.lengths[i] else NO_SLOT for i in rows]
        slots = held.tensor(used)
        whole = max(span(k), span(v)) < INDEX_LIMIT
        for part in [slice(None)] if whole else [slice(b, b + 1) for b in range(len(rows))]:
            self._store_bodies(k[part], v[part], slots[part])

    def _store_bodies(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        kernels = self.cache.kernels
        if k.shape[2] >= self.cache.cfg.G_k:  # a GPU launches one work-group for a grid of none
            kernels["quantize_key"](*self._key_args, slots, k)
        kernels["quantize_value"](*self._value_args, slots, v)
        kernels["fill_window"](*self._fill_args, slots, k, v, self.cache.write_back)
        if self._fill_exact_args:
            kernels["fill_window"](*self._fill_exact_args, slots, k, v, 0)

    def _store_sinks(self, k: Tensor, v: Tensor, rows: Sequence[int]) -> None:
        """Store the tokens of `k, v [len(rows), H_kv, n, D]` that the open step makes sinks."""
        windows, held = self.windows, self.cache.rows
        for i, row in enumerate(rows):
            count = self.cache.step.to_sinks[row] if self.cache.step.to_sinks else 0
            if count:
                slot = held.rows[row].slot
                first = held.rows[row].length - self.cache.step.lengths[row]
                windows["k_sink"][slot, :, first : first + count] = k[i, :, :count]
                windows["v_sink"][slot, :, first : first + count] = v[i, :, :count]

    def decode(
        self,
        q: Tensor,
        k_new: Tensor,
        v_new: Tensor,
        scale: float | None = None,
        return_lse: bool = False,
        out: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Append one token per active row, quantize what is due, attend to everything stored.

        Inactive rows' inputs do not matter; their output is 0 and their log-sum-exp -inf.

        Parameters
        ----------
        q : Tensor
            `[B, H, D]` in the model dtype, inner stride 1. On GPUs, in compute mode "half", a copy
            is made first of queries that do not begin at multiples of 16 bytes.
        k_new, v_new : Tensor
            `[B, H_kv, D]`, the new token's key (after RoPE) and value.
        scale : float, optional
            Multiplies the scores; default `D ** -0.5`.
        return_lse : bool
            Also return the log-sum-exp of the scaled scores.
        out : Tensor, optional
            `[B, H, D]`, receives the result.

        Returns
        -------
        out : Tensor
            `[B, H, D]` in the model dtype.
        lse : Tensor
            `[B, H]` float32, natural log; only with `return_lse`.

        Raises
        ------
        TypeError, ValueError
            An argument breaks a rule; nothing has changed.
        RuntimeError
            The layer was already called in this step.

        Source: paper Algorithm 1, decoding; a key block is quantized before the attention of the
        step that completes it.
        """
        self._check_decode(q, k_new, v_new, out)
        cache = self.cache
        scale = cache.cfg.D**-0.5 if scale is None else finite_scale(scale)
        lse = torch.empty_like(cache.lse) if return_lse else self._lse
        began, saved = cache.enter(self.index, 1), NOTHING
        try:
            if out is None:
                out = torch.empty_like(q, memory_format=torch.contiguous_format)
            if cache.step.flushed:
                saved = self._save_windows()
            # `attend` begins with what was there before `append`
            queries = in_lines(q) if self._takes_lines else q
            self._append(k_new.unsqueeze(2), v_new.unsqueeze(2))
            if self._attend_batch and cache.workspace.one_part:
                self._attend_batch(*self._batch_args, queries, scale, out, lse)
            else:
                self._attend_parts(q, queries, scale, out, lse)
        except BaseException:
            self._put_windows(saved)
            cache.abandon(began)
            raise
        cache.leave(self.index)
        return (out, lse) if return_lse else out

    def _attend_parts(
        self, q: Tensor, queries: Tensor, scale: float, out: Tensor, lse: Tensor
    ) -> None:
        """Attention of `q`, of which `queries` may be a copy: first to the splits of every row."""
        kernels, space = self.cache.kernels, self.cache.workspace
        parts, work = space.parts, space.work
        if work is not None:
            kernels["attend"](*self._attend_args, work, queries, scale, *parts)
        if self._combine_window and not self._sink_args:
            rest = (space.split, *parts, out, lse)
            self._combine_window(*self._window_args, queries, scale, *rest)
        else:
            kernels["attend_window"](*self._window_args, q, scale, 1, *parts)
            if self._sink_args:
                kernels["attend_window"](*self._sink_args, q, scale, 2, *parts)
            kernels["combine"](*self._row_args, space.split, space.tail, *parts, out, lse)

    def _save_windows(self) -> Saved:
        """Copies of all that the open step overwrites of what rows held before it.

        Other writes lie outside of that: pages beyond the packed tokens, and a ring's spare slots.
        """
        step, rings = self.cache.step, [x for x in self.windows if not x.endswith("sink")]
        saved = [(name, step.flushed, self.windows[name][step.flushed]) for name in rings[:1]]
        if step.overrun:
            saved += [(name, step.overrun, self.windows[name][step.overrun]) for name in rings]
        return saved

    def _put_windows(self, saved: Saved) -> None:
        for name, slots, copy in saved:
            self.windows[name][slots] = copy

    def _append(self, k: Tensor, v: Tensor) -> None:
        """Store the open step's `k, v [B, H_kv, n, D]`."""
        cache, step = self.cache, self.cache.step
        if step.to_sinks:
            self._store_sinks(k, v, range(k.shape[0]))
            k, v = (_shifted(x, step.to_sinks) for x in (k, v))
        cache.kernels["append"](
            *self._append_args, step.slots, step.added, k, v, cache.cfg.R, cache.write_back
        )

    def extend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: Sequence[int] | Tensor | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """Attend with several new tokens, then append them all.

        Every query sees the history as it was before the call, and of the new tokens, exactly,
        itself and those before it. Codes are read once for up to 16 tokens (`extend_rows` of the
        kernel key); more go through in passes. What is stored equals the tokens appended one by
        one, bit for bit; the outputs do not equal those of `decode` wherever a key block or a
        value was quantized on the way. A pass computes the queries of 16 tokens, however few there
        are: on a CPU, where that bounds it, it takes as long as some 16 decodes' attention.

        Parameters
        ----------
        q : Tensor
            `[B, H, n, D]` in the model dtype, inner stride 1.
        k, v : Tensor
            `[B, H_kv, n, D]`, the new keys (after RoPE) and values.
        lengths : sequence of int or Tensor, optional
            `[B]`, new tokens of each row, in `0 .. n`; default `n` for active rows, or for all if
            none is active. An inactive row that gets tokens becomes active. Outputs of the queries
            beyond mean nothing.
        scale : float, optional
            Multiplies the scores; default `D ** -0.5`.

        Returns
        -------
        Tensor
            `[B, H, n, D]` in the model dtype.

        Raises
        ------
        TypeError, ValueError
            An argument breaks a rule; nothing has changed.
        RuntimeError
            The layer was already called in this step.
        """
        cache = self.cache
        (B, H, D), H_kv = self._query_shape, self._token_shape[1]
        check_tensor("q", q, (B, H, None, D), cache.dtype, cache.device)
        n = q.shape[2]
        check_tensor("k", k, (B, H_kv, n, D), cache.dtype, cache.device)
        check_tensor("v", v, (B, H_kv, n, D), cache.dtype, cache.device)
        for name, x in (("q", q), ("k", k), ("v", v)):
            check_span(f"`{name}`", x)
        scale = D**-0.5 if scale is None else finite_scale(scale)
        out = torch.empty(B, H, n, D, dtype=cache.dtype, device=cache.device)
        began, saved = cache.enter(self.index, n, cache.new_tokens(n, lengths)), NOTHING
        try:
            if n:
                added, space = cache.extension()
                for first in range(0, n, space.rows):
                    part = slice(first, first + space.rows)
                    into = out[:, :, part]
                    self._extend_pass(q[:, :, part], k, v, first, scale, added, space, into)
                saved = self._save_windows()
                self._append(k, v)
        except BaseException:
            self._put_windows(saved)
            cache.abandon(began)
            raise
        cache.leave(self.index)
        return out

    def _extend_pass(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        first: int,
        scale: float,
        added: Tensor,
        space: Workspace,
        out: Tensor,
    ) -> None:
        """Attention of the queries `q [B, H, <= rows, D]` that start at new token `first`."""
        kernels, parts = self.cache.kernels, space.parts
        B, H, used, D = q.shape
        # The kernels take `rows` tokens' queries of a head as so many heads; the rest is padding.
        padded = torch.nn.functional.pad(q, (0, 0, 0, space.rows - used)).reshape(B, -1, D)
        result = torch.empty_like(padded)
        lse = torch.empty(padded.shape[:2], device=q.device)
        if space.work is not None:
            kernels["extend_attend"](*self._extend_attend_args, space.work, padded, scale, *parts)
        kernels["extend_window"](*self._extend_window_args, padded, scale, 1, *parts)
        if self._sink_args:
            kernels["extend_window"](*self._extend_sink_args, padded, scale, 3, *parts)
        slots = self.cache.rows.slots
        kernels["extend_new"](slots, added, k, v, padded, first, scale, *parts)
        kernels["combine"](*self._extend_row_args, space.split, space.tail, *parts, result, lse)
        out.copy_(result.view(B, H, space.rows, D)[:, :, :used])

    def _check_decode(self, q: Tensor, k_new: Tensor, v_new: Tensor, out: Tensor | None) -> None:
        dtype, device = self.cache.dtype, self.cache.device
        query, token = self._query_shape, self._token_shape
        inputs = ("q", q, query), ("k_new", k_new, token), ("v_new", v_new, token)
        for name, x, shape in inputs:
            if not fits(x, shape, dtype, device):
                check_tensor(name, x, shape, dtype, device)
                check_span(f"`{name}`", x)
        if out is not None and not (fits(out, query, dtype, device) and out.is_contiguous()):
            check_tensor("out", out, query, dtype, device)
            check_span("`out`", out)
            check_no_overlap("out", out)

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """What attention sees, dense: sinks, dequantized tokens, then the window.

        Returns
        -------
        k, v : Tensor
            `[B, H_kv, L, D]` in the model dtype, `L` the longest row; shorter rows end in zeros.

        Raises
        ------
        RuntimeError
            The open step's tokens are still to come to this layer.
        """
        self.cache.check_done(self.index)
        cache, held, windows = self.cache, self.cache.rows, self.windows
        B, H_kv, D = self._token_shape
        bodies = held.bodies
        k = torch.zeros(B, H_kv, max(bodies), D, dtype=cache.dtype, device=cache.device)
        v = torch.zeros_like(k)
        if max(bodies):
            cache.kernels["dequantize_key"](*self._key_args, held.slots, k)
            cache.kernels["dequantize_value"](*self._value_args, held.slots, v)
        for i, (row, length) in enumerate(zip(held.rows, bodies, strict=True)):
            window = torch.arange(layout.packed_values(cache.cfg, length), length)
            for dense, name in ((k, "k_ring"), (v, "v_ring")):
                ring = windows[name]
                dense[i, :, window] = ring[row.slot][:, window % ring.shape[2]]
        if held.sink_tokens:
            k, v = (
                self._with_sinks(x, windows[name]) for x, name in ((k, "k_sink"), (v, "v_sink"))
            )
        return k, v

    def _with_sinks(self, body: Tensor, sinks: Tensor) -> Tensor:
        """`body [B, H_kv, T, D]` behind every row's sinks; shorter rows end in zeros."""
        held = self.cache.rows
        longest = max(held.lengths)
        out = body.new_zeros(*body.shape[:2], longest, body.shape[3])
        first = min(held.sink_tokens, longest)
        out[:, :, first:] = body[:, :, : longest - first]
        for i, row in enumerate(held.rows):
            count = row.length - held.body(row.length)
            out[i, :, :count] = sinks[row.slot, :, :count]
        return out

    def dequantize_tokens(self, slot: int, tokens: range) -> tuple[Tensor, Tensor]:
        """Packed body tokens of the sequence in `slot`, `[H_kv, n, D]` in the model dtype."""
        cache, P = self.cache, self.cache.cfg.P
        first, stop = tokens.start // P, -(-tokens.stop // P)
        pages = cache.pages.owned(slot)[first:stop]
        count = len(pages) * P
        lines: tuple[list[list[int]], ...] = ([list(pages)], [[count] * 4])
        table, state = map(cache.rows.tensor, lines)
        only = cache.rows.tensor([0])
        shape = (1, cache.cfg.H_kv, count, cache.cfg.D)
        k = torch.empty(shape, dtype=cache.dtype, device=cache.device)
        v = torch.empty_like(k)
        cache.kernels["dequantize_key"](*self.memory.pool("k"), table, state, only, k)
        cache.kernels["dequantize_value"](*self.memory.pool("v"), table, state, only, v)
        inside = slice(tokens.start - first * P, tokens.stop - first * P)
        return k[0, :, inside], v[0, :, inside]


def _shifted(x: Tensor, counts: list[int]) -> Tensor:
    """`x [B, H_kv, n, D]` with the first `counts[i]` tokens of row `i` moved out of the way."""
    n = x.shape[2]
    first = torch.tensor(counts, device=x.device)[:, None]
    index = (torch.arange(n, device=x.device) + first).clamp(max=n - 1)
    return x.gather(2, index[:, None, :, None].expand(x.shape))


def _frozen(*tensors: Tensor) -> tuple[Any, ...]:
    """The tensors as kernels take them; they share and keep alive the memory."""
    return tuple(map(tvm_ffi.from_dlpack, tensors))

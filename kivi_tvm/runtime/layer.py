"""One layer of a cache: its pages and rings, and the kernels that read and write them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import tvm_ffi
from torch import Tensor

from kivi_tvm import layout
from kivi_tvm.runtime.checks import (
    INDEX_LIMIT,
    check_no_overlap,
    check_tensor,
    fits,
    outside_inference_mode,
    span,
)

if TYPE_CHECKING:
    from kivi_tvm.runtime.cache import Cache
    from kivi_tvm.runtime.workspace import Workspace

# torch's uint32 lacks most operators on CPU: words are held as int32 and viewed at the call.
_HELD_AS = {"uint32": torch.int32}


class CacheLayer:
    """Layer `index` of a `Cache`; `Cache.layer` gives it."""

    def __init__(self, cache: Cache, index: int) -> None:
        self._cache = cache
        self.index = index
        cfg = cache.cfg
        rings = layout.ring_buffers(cfg, cache.batch_size)
        self._rings = {name: _empty(buffer, cache.device) for name, buffer in rings.items()}
        self._pages: dict[str, Tensor] = {}
        self._token_shape = (cache.batch_size, cfg.H_kv, cfg.D)
        self._query_shape = (cache.batch_size, cfg.H, cfg.D)
        self.grow(0)

    @property
    def packed_nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._pages.values())

    @property
    def window_nbytes(self) -> int:
        return sum(ring.nbytes for ring in self._rings.values())

    def grow(self, num_pages: int) -> None:
        """Make every page buffer hold `num_pages` pages, one buffer at a time.

        Raises
        ------
        ValueError
            A buffer would have more elements than the kernels can index.
        """
        for name, buffer in layout.page_buffers(self._cache.cfg, num_pages).items():
            old = self._pages.get(name)
            new = _empty(buffer, self._cache.device)
            if old is not None:
                if old.shape[0] >= num_pages:
                    continue
                new[: old.shape[0]] = old
            self._pages[name] = new
        self.bind()

    def bind(self) -> None:
        """Collect the leading arguments of every kernel; after any buffer was replaced."""
        cache = self._cache
        words = {
            name: buffer.view(torch.uint32) if name.endswith("code") else buffer
            for name, buffer in self._pages.items()
        }
        keys = (words["k_code"], words["k_scale"], words["k_zero"])
        values = (words["v_code"], words["v_scale"], words["v_zero"])
        rings = (self._rings["k_ring"], self._rings["v_ring"])
        tables = (cache.page_table, cache.state, cache.slots)
        self._key_args = (*keys, *tables)
        self._value_args = (*values, *tables)
        self._fill_args = (*keys, *rings, *tables)
        # The hot path's are converted once: ten torch tensors cost 1.2 us in every call.
        no_keys = rings[0][:, :, :0]  # the keys that stay exact
        self._append_args = _frozen(*keys, *values, *rings, no_keys, *tables)
        self._one = tvm_ffi.from_dlpack(cache.one)
        self._attend_args = _frozen(*keys, *values, *tables)
        self._window_args = _frozen(*rings, cache.state, cache.slots)
        self._row_args = _frozen(cache.state, cache.slots)
        # `extend` reads the history as it was before the step
        history = _frozen(cache.state_before, cache.slots)
        self._extend_attend_args = (*self._attend_args[:-2], *history)
        self._extend_window_args = (*self._window_args[:2], *history)
        self._extend_row_args = history
        self._lse = tvm_ffi.from_dlpack(cache.lse)

    def prefill(self, k: Tensor, v: Tensor, lengths: Sequence[int] | Tensor | None = None) -> None:
        """Store a prompt in an empty cache; attention over it is the caller's, exact.

        Parameters
        ----------
        k, v : Tensor
            `[B, H_kv, T, D]` in the model dtype, keys after RoPE, inner stride 1. Row `i`'s
            tokens are the first `lengths[i]` ones: padding on the right, never stored.
        lengths : sequence of int or Tensor, optional
            `[B]`, each in `0 .. T`; default `T`.

        Raises
        ------
        TypeError, ValueError
            A tensor or length breaks a rule; nothing has changed.
        RuntimeError
            The cache is not empty, or the layer was already called in this step.

        Source: paper Algorithm 1, prefill: keys `[0, T - T mod R)` and values `[0, T - R)`.
        """
        cache = self._cache
        B, H_kv, D = self._token_shape
        check_tensor("k", k, (B, H_kv, None, D), cache.dtype, cache.device)
        check_tensor("v", v, (B, H_kv, k.shape[2], D), cache.dtype, cache.device)
        if max(span(k[:1]), span(v[:1])) >= INDEX_LIMIT:
            raise ValueError(
                f"one row of `k` or `v` must span less than 2^31 elements, got {k.shape}"
            )
        cache.check_can_prefill()
        cache.enter(self.index, k.shape[2], lengths)
        if k.shape[2]:
            whole = max(span(k), span(v)) < INDEX_LIMIT
            for rows in [slice(None)] if whole else [slice(b, b + 1) for b in range(B)]:
                self._store_prompt(k[rows], v[rows], cache.slots[rows])
        cache.leave(self.index)

    def _store_prompt(self, k: Tensor, v: Tensor, slots: Tensor) -> None:
        kernels = self._cache.kernels
        kernels["quantize_key"](*self._key_args[:-1], slots, k)
        kernels["quantize_value"](*self._value_args[:-1], slots, v)
        kernels["fill_window"](*self._fill_args[:-1], slots, k, v, self._cache.write_back)

    def decode(
        self,
        q: Tensor,
        k_new: Tensor,
        v_new: Tensor,
        scale: float | None = None,
        return_lse: bool = False,
        out: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Append one token per row, quantize what is due, and attend to everything stored.

        Parameters
        ----------
        q : Tensor
            `[B, H, D]` in the model dtype, inner stride 1.
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
        cache = self._cache
        scale = cache.cfg.D**-0.5 if scale is None else float(scale)
        cache.enter(self.index, 1)
        if out is None:
            out = torch.empty_like(q, memory_format=torch.contiguous_format)
        lse = torch.empty_like(cache.lse) if return_lse else self._lse
        kernels, space = cache.kernels, cache.workspace
        parts, work = space.parts, space.work
        kernels["append"](
            *self._append_args,
            self._one,
            k_new.unsqueeze(2),
            v_new.unsqueeze(2),
            cache.cfg.R,
            cache.write_back,
        )
        if work is not None:
            kernels["attend"](*self._attend_args, work, q, scale, *parts)
        kernels["attend_window"](*self._window_args, q, scale, 1, *parts)
        kernels["combine"](*self._row_args, space.split, space.tail, *parts, out, lse)
        cache.leave(self.index)
        return (out, lse) if return_lse else out

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
        value was quantized on the way.

        Parameters
        ----------
        q : Tensor
            `[B, H, n, D]` in the model dtype, inner stride 1.
        k, v : Tensor
            `[B, H_kv, n, D]`, the new keys (after RoPE) and values.
        lengths : sequence of int or Tensor, optional
            `[B]`, new tokens of each row, in `0 .. n`; default `n`. Outputs of the queries beyond
            are finite but mean nothing.
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
        cache = self._cache
        (B, H, D), H_kv = self._query_shape, self._token_shape[1]
        check_tensor("q", q, (B, H, None, D), cache.dtype, cache.device)
        n = q.shape[2]
        check_tensor("k", k, (B, H_kv, n, D), cache.dtype, cache.device)
        check_tensor("v", v, (B, H_kv, n, D), cache.dtype, cache.device)
        if max(map(span, (q, k, v))) >= INDEX_LIMIT:
            raise ValueError(f"`q`, `k` and `v` must span less than 2^31 elements, got {q.shape}")
        scale = D**-0.5 if scale is None else float(scale)
        cache.enter(self.index, n, lengths)
        out = torch.empty(B, H, n, D, dtype=cache.dtype, device=cache.device)
        if n:
            added, space = cache.extension()
            for first in range(0, n, space.rows):
                rows = slice(first, first + space.rows)
                self._extend_pass(q[:, :, rows], k, v, first, scale, added, space, out[:, :, rows])
            cache.kernels["append"](*self._append_args, added, k, v, cache.cfg.R, cache.write_back)
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
        kernels, parts = self._cache.kernels, space.parts
        B, H, used, D = q.shape
        # The kernels take `rows` tokens' queries of a head as so many heads; the rest is padding.
        padded = torch.nn.functional.pad(q, (0, 0, 0, space.rows - used)).reshape(B, -1, D)
        result = torch.empty_like(padded)
        lse = torch.empty(padded.shape[:2], device=q.device)
        if space.work is not None:
            kernels["extend_attend"](*self._extend_attend_args, space.work, padded, scale, *parts)
        kernels["extend_window"](*self._extend_window_args, padded, scale, 1, *parts)
        kernels["extend_new"](self._cache.slots, added, k, v, padded, first, scale, *parts)
        kernels["combine"](*self._extend_row_args, space.split, space.tail, *parts, result, lse)
        out.copy_(result.view(B, H, space.rows, D)[:, :, :used])

    def _check_decode(self, q: Tensor, k_new: Tensor, v_new: Tensor, out: Tensor | None) -> None:
        dtype, device = self._cache.dtype, self._cache.device
        query, token = self._query_shape, self._token_shape
        if not fits(q, query, dtype, device):
            check_tensor("q", q, query, dtype, device)
        if not fits(k_new, token, dtype, device):
            check_tensor("k_new", k_new, token, dtype, device)
        if not fits(v_new, token, dtype, device):
            check_tensor("v_new", v_new, token, dtype, device)
        if out is not None and not (fits(out, query, dtype, device) and out.is_contiguous()):
            check_tensor("out", out, query, dtype, device)
            check_no_overlap("out", out)

    def dequantize(self) -> tuple[Tensor, Tensor]:
        """What attention sees, dense: dequantized tokens, then the window.

        Returns
        -------
        k, v : Tensor
            `[B, H_kv, L, D]` in the model dtype, `L` the longest row; shorter rows end in zeros.
        """
        cache = self._cache
        lengths = cache.lengths
        B, H_kv, D = self._token_shape
        k = torch.zeros(B, H_kv, max(lengths), D, dtype=cache.dtype, device=cache.device)
        v = torch.zeros_like(k)
        if max(lengths):
            cache.kernels["dequantize_key"](*self._key_args, k)
            cache.kernels["dequantize_value"](*self._value_args, v)
        for row, length in enumerate(lengths):
            window = torch.arange(layout.packed_values(cache.cfg, length), length)
            for dense, ring in ((k, self._rings["k_ring"]), (v, self._rings["v_ring"])):
                dense[row, :, window] = ring[row, :, window % ring.shape[2]]
        return k, v


def _frozen(*tensors: Tensor) -> tuple[Any, ...]:
    """The tensors as kernels take them; they share and keep alive the memory."""
    return tuple(map(tvm_ffi.from_dlpack, tensors))


@outside_inference_mode
def _empty(buffer: layout.Buffer, device: torch.device) -> Tensor:
    """Uninitialized memory for a buffer; kernels never read what was not written."""
    dtype = _HELD_AS.get(buffer.dtype) or getattr(torch, buffer.dtype)
    found = torch.empty(buffer.shape, dtype=dtype, device=device)
    if found.numel() >= INDEX_LIMIT:
        raise ValueError(
            f"a page buffer must have less than 2^31 elements, got {buffer.shape}; "
            "use fewer sequences or several caches"
        )
    return found

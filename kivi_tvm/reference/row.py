"""One sequence's cache, token by token.

Source: paper (arXiv 2402.02750) Algorithm 1; sinks and rollback are not the paper's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kivi_tvm.config import KiviConfig
from kivi_tvm.reference.formulas import KEY_AXES, dequantize, quantize_key, quantize_value


class ReferenceRow:
    """One sequence's cache by Algorithm 1: what attention may see.

    The first `sink_tokens` tokens stay exact in `k_sink, v_sink`. All else is about the tokens
    after them, the body, which is a KIVI sequence of its own: its first token is token 0.
    `k_seen, v_seen` `[H_kv, L, D]` float32 hold dequantized values where a token is packed and the
    exact ones elsewhere; `k_exact, v_exact`, in the model dtype, all of them as they came or, after
    `crop` went too far back, their stand-ins.

    Parameters
    ----------
    cfg : KiviConfig
    window : str
        "kivi" (Algorithm 1) or "exact" (keys of the window stay exact after a flush).
    rollback : int
        Tokens `E` that `crop` removes exactly, counted from the longest length since.
    sink_tokens : int
        First tokens that are never quantized.
    key_axis : str
        "channel" (KIVI) or "token": keys in groups of `G_k` consecutive channels of one token,
        still quantized in blocks of `R` tokens; the paper's baseline.

    Raises
    ------
    ValueError
        `key_axis` is unknown, or "token" where `G_k` does not divide head_dim.
    """

    def __init__(
        self,
        cfg: KiviConfig,
        window: str = "kivi",
        rollback: int = 0,
        sink_tokens: int = 0,
        key_axis: str = "channel",
    ) -> None:
        if key_axis not in KEY_AXES:
            raise ValueError(f"`key_axis` must be one of {list(KEY_AXES)}, got {key_axis!r}")
        if key_axis == "token" and cfg.D % cfg.G_k:
            raise ValueError(
                f"`key_axis`='token' needs a key group size that divides head_dim={cfg.D}, got "
                f"{cfg.G_k}"
            )
        self.cfg, self.window, self.rollback = cfg, window, rollback
        self.sink_tokens, self.key_axis = sink_tokens, key_axis
        self.dtype = getattr(torch, cfg.dtype)
        empty = torch.zeros(cfg.H_kv, 0, cfg.D)
        self.k_seen = self.v_seen = empty  # so that codes of a float16 model stay unrounded
        self.k_exact = self.v_exact = self.k_sink = self.v_sink = empty.to(self.dtype)
        self.packed_keys = self.packed_values = 0
        self.keys_from = self.values_from = 0  # where a cache still holds full precision
        self.refilled = 0  # tokens that became stand-ins, over all crops

    @property
    def length(self) -> int:
        return self.k_sink.shape[1] + self.k_exact.shape[1]

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add tokens `k, v [H_kv, n, D]`, then quantize what Algorithm 1 says is due."""
        sinks = self.sink_tokens - self.k_sink.shape[1]
        self.k_sink = torch.cat([self.k_sink, k[:, :sinks]], 1)
        self.v_sink = torch.cat([self.v_sink, v[:, :sinks]], 1)
        k, v = k[:, sinks:], v[:, sinks:]
        self.k_exact = torch.cat([self.k_exact, k], 1)
        self.v_exact = torch.cat([self.v_exact, v], 1)
        self.k_seen = torch.cat([self.k_seen, k.float()], 1)
        self.v_seen = torch.cat([self.v_seen, v.float()], 1)
        self._quantize()
        held_from = self.k_exact.shape[1] - self.cfg.R - self.rollback
        self.values_from = max(self.values_from, held_from)
        # Without rollback, Algorithm 1 keeps no exact key once its block is quantized.
        forgets = self.window == "kivi" and not self.rollback
        self.keys_from = self.packed_keys if forgets else max(self.keys_from, held_from)

    def _quantize(self) -> None:
        cfg, length = self.cfg, self.k_exact.shape[1]
        due = slice(self.packed_keys, length - length % cfg.R)
        if due.stop > due.start:
            codes = quantize_key(self.k_exact[:, due], cfg.key_bits, cfg.G_k, self.key_axis)
            self.k_seen[:, due] = dequantize(codes, KEY_AXES[self.key_axis])
            self.packed_keys = due.stop
        due = slice(self.packed_values, max(0, length - cfg.R))
        if due.stop > due.start:
            codes = quantize_value(self.v_exact[:, due], cfg.value_bits, cfg.G_v)
            self.v_seen[:, due] = dequantize(codes, -1)
            self.packed_values = due.stop

    def crop(self, c: int) -> int:
        """Remove the last `c` tokens.

        Tokens that must be full precision again but are no longer held so get a stand-in: their
        dequantized value, rounded to the model dtype, which is exact data from then on.

        Returns
        -------
        int
            Tokens with a stand-in for their key, value or both. If it is 0, the row equals one
            that never saw the removed tokens.

        Raises
        ------
        ValueError
            There are not `c` tokens.
        """
        if not 0 <= c <= self.length:
            raise ValueError(f"`c` must be in 0..{self.length}, got {c}")
        kept = self.length - c
        self.k_sink, self.v_sink = self.k_sink[:, :kept], self.v_sink[:, :kept]
        body = max(0, kept - self.sink_tokens)
        for name in ("k_exact", "v_exact", "k_seen", "v_seen"):
            setattr(self, name, getattr(self, name)[:, :body].clone())
        self.packed_keys = body - body % self.cfg.R
        self.packed_values = max(0, body - self.cfg.R)
        need = self.packed_values if self.window == "exact" else self.packed_keys
        keys = slice(need, min(self.keys_from, body))
        values = slice(self.packed_values, min(self.values_from, body))
        self.k_exact[:, keys] = self.k_seen[:, keys].to(self.dtype)
        self.v_exact[:, values] = self.v_seen[:, values].to(self.dtype)
        self.k_seen[:, self.packed_keys :] = self.k_exact[:, self.packed_keys :].float()
        self.v_seen[:, self.packed_values :] = self.v_exact[:, self.packed_values :].float()
        self.keys_from = min(self.keys_from, need)
        self.values_from = min(self.values_from, self.packed_values)
        refilled = len({*range(keys.start, keys.stop), *range(values.start, values.stop)})
        self.refilled += refilled
        return refilled

    def visible(self) -> tuple[Tensor, Tensor]:
        """Keys and values `[H_kv, length, D]` in float32 as the kernels see them.

        In the window (the tokens whose value is full precision) a packed key is the dequantized
        one rounded to the model dtype (`window="kivi"`) or the exact one (`window="exact"`).
        """
        k, window = self.k_seen.clone(), slice(self.packed_values, None)
        source = self.k_exact if self.window == "exact" else self.k_seen.to(self.dtype)
        k[:, window] = source[:, window].float()
        return (
            torch.cat([self.k_sink.float(), k], 1),
            torch.cat([self.v_sink.float(), self.v_seen], 1),
        )

"""A plain-torch KIVI in the same model: `KiviCache` over `kivi_tvm.reference`, no compiled code."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from kivi_tvm.config import KiviConfig
from kivi_tvm.hf import KiviCache
from kivi_tvm.reference import ReferenceCache


class TorchModule:
    """Stands where a built module does."""

    source = "torch"

    def __init__(self, cfg: KiviConfig, accumulate: torch.dtype) -> None:
        self.cfg, self.accumulate = cfg, accumulate

    def new_cache(self, num_layers=1, batch_size=1, max_tokens=None, device="cpu", window="kivi"):
        layers = [
            ReferenceCache(self.cfg, batch_size, window, self.accumulate) for _ in range(num_layers)
        ]
        return TorchCache(layers, max_tokens)


class TorchCache:
    """The runtime cache's calls, with its rule that each step is begun once."""

    def __init__(self, layers: list[ReferenceCache], max_tokens: int | None) -> None:
        self.layers = [TorchLayer(x) for x in layers]
        self.max_tokens = max_tokens
        self.lengths = [0] * len(layers[0].rows)

    def layer(self, i: int) -> TorchLayer:
        return self.layers[i]

    def begin(self, n: int, lengths: list[int] | None = None) -> None:
        new = [n] * len(self.lengths) if lengths is None else lengths
        total = [a + b for a, b in zip(self.lengths, new)]
        if self.max_tokens is not None and max(total) > self.max_tokens:
            raise ValueError(f"`max_tokens` must be at least {max(total)}, got {self.max_tokens}")
        self.lengths = total

    def reset(self) -> None:
        for layer in self.layers:
            layer.reset()
        self.lengths = [0] * len(self.lengths)

    @property
    def nbytes(self) -> dict[str, int]:
        rows = [row for layer in self.layers for row in layer.cache.rows]
        held = sum(x.nbytes for row in rows for x in (row.k_exact, row.v_exact))
        return {"torch": held, "total": held}


class TorchLayer:
    def __init__(self, cache: ReferenceCache) -> None:
        self.cache = cache

    def reset(self) -> None:
        old = self.cache
        self.cache = ReferenceCache(old.cfg, len(old.rows), old.rows[0].window, old.accumulate)

    def prefill(self, k, v, lengths=None) -> None:
        self.cache.prefill(k, v, lengths)

    def decode(self, q, k, v, scale=None):
        return self.cache.decode(q, k, v, scale).to(q.dtype)

    def extend(self, q, k, v, lengths=None, scale=None):
        """Attend to the history as it is, and causally to the exact new tokens; then append."""
        out, dtype = torch.zeros_like(q), self.cache.accumulate
        for i, row in enumerate(self.cache.rows):
            n = q.shape[2] if lengths is None else lengths[i]
            if n:
                new = k[i, :, :n], v[i, :, :n]
                seen = [torch.cat(x, 1).to(dtype) for x in zip(row.visible(), new)]
                causal = torch.ones(n, row.length + n, dtype=torch.bool).tril(row.length)
                out[i, :, :n] = scaled_dot_product_attention(
                    q[i, :, :n].to(dtype), *seen, attn_mask=causal, scale=scale, enable_gqa=True
                )
                row.append(*new)
        return out


class TorchKiviCache(KiviCache):
    """`KiviCache` whose runtime is the plain-torch reference."""

    accumulate = torch.float64

    def _build(self, cfg: KiviConfig, device: torch.device) -> TorchModule:
        return TorchModule(cfg, self.accumulate)


class Float32KiviCache(TorchKiviCache):
    """The same with float32 attention: how far float noise alone moves the logits."""

    accumulate = torch.float32

"""One run's keys and values, recorded and fed to another run's cache.

Float noise of 1e-6 in a key can sit on a rounding boundary of its group; the code then flips, and
at 2 bits a flip moves that key by a third of its group's range. Two correct caches in one model
drift apart that way as soon as generated tokens are quantized (measured: 1e-2 in the logits after
a flush, for reference arithmetic in float32 instead of float64). With the same keys and values
stored on both sides, what differs is the attention alone.
"""

from __future__ import annotations

from typing import Any

import torch

from kivi_tvm.config import KiviConfig
from kivi_tvm.hf import KiviCache
from kivi_tvm.hf.reference_cache import ReferenceModule


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    """Relative L2."""
    return float((got - want).norm() / want.norm().clamp(min=1e-30))


class Tape:
    """Keys and values in the order in which layers stored them."""

    def __init__(self) -> None:
        self.stored: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.at = 0
        self.worst = 0.0

    def record(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.stored.append((k.clone(), v.clone()))
        return k, v

    def replay(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The recorded ones in place of `k, v`; `worst` is how far those were from them."""
        old_k, old_v = self.stored[self.at]
        self.at += 1
        self.worst = max(self.worst, distance(k, old_k), distance(v, old_v))
        return old_k, old_v


class TapedLayer:
    def __init__(self, layer: Any, through: Any) -> None:
        self.layer, self.through = layer, through

    def prefill(self, k, v, lengths=None):
        self.layer.prefill(*self.through(k, v), lengths=lengths)

    def decode(self, q, k, v, scale=None):
        return self.layer.decode(q, *self.through(k, v), scale=scale)

    def extend(self, q, k, v, lengths=None, scale=None):
        return self.layer.extend(q, *self.through(k, v), lengths=lengths, scale=scale)


class TapedModule:
    """A module whose caches store what `through(k, v)` gives."""

    def __init__(self, module: Any, through: Any) -> None:
        self.module, self.through, self.source = module, through, module.source

    def new_cache(self, **options: Any) -> Any:
        return TapedCache(self.module.new_cache(**options), self.through)


class TapedCache:
    def __init__(self, cache: Any, through: Any) -> None:
        self.cache, self.through = cache, through

    def layer(self, i: int) -> TapedLayer:
        return TapedLayer(self.cache.layer(i), self.through)

    def copy(self) -> TapedCache:
        return TapedCache(self.cache.copy(), self.through)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)


class RecordingTorchCache(KiviCache):
    """The plain-torch KIVI, recording what it stores."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tape = Tape()

    def _build(self, cfg: KiviConfig, device: torch.device) -> Any:
        return TapedModule(ReferenceModule(cfg), self.tape.record)


class ReplayingCache(KiviCache):
    """The compiled cache, storing what `tape` recorded."""

    def __init__(self, *args: Any, tape: Tape, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tape = tape

    def _build(self, cfg: KiviConfig, device: torch.device) -> Any:
        return TapedModule(super()._build(cfg, device), self.tape.replay)

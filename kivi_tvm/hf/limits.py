"""The methods of transformers' `Cache` that a KIVI cache refuses, each by name and purpose."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor
from transformers.cache_utils import Cache

from kivi_tvm.hf.support import unsupported


class LimitedCache(Cache):
    """A `Cache` whose rows cannot be permuted, copied, selected or shortened yet."""

    def crop(self, tokens_to_remove: int) -> None:
        """Not supported, except removing nothing."""
        if tokens_to_remove:
            unsupported(f"crop({tokens_to_remove})", "rollback, assisted decoding")

    def activate_past_recording(self) -> None:
        """Not supported: assisted decoding announces rollbacks by it."""
        unsupported("activate_past_recording", "rollback, assisted decoding")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Not supported: rows cannot be permuted."""
        unsupported("reorder_cache", "beam search")

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Not supported: rows cannot be copied."""
        unsupported("batch_repeat_interleave", "copying rows")

    def batch_select_indices(self, indices: Tensor) -> None:
        """Not supported: rows cannot be selected."""
        unsupported("batch_select_indices", "selecting rows")

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        unsupported("copy.deepcopy", "reusing a prompt's cache")

    def __reduce__(self) -> NoReturn:
        unsupported("pickle", "saving a cache")

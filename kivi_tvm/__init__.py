"""kivi-tvm: a 2-bit KV cache for LLM decoding, compiled with TVM TensorIR."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kivi_tvm.config import KiviConfig

if TYPE_CHECKING:
    from kivi_tvm.runtime import build, load

__all__ = ["KiviConfig", "build", "load"]


def __getattr__(name: str) -> Any:
    # torch and tvm-ffi take seconds to import; the command line does without them.
    if name in ("build", "load"):
        from kivi_tvm import runtime

        return getattr(runtime, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

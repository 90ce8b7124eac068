"""Head counts and head dim of a model: from its transformers configuration or its ONNX file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Geometry:
    """Heads of a model's attention layers; what the source does not tell is None.

    Parameters
    ----------
    num_heads, num_kv_heads, head_dim : int
        `H`, `H_kv` and `D`.
    dtype : str or None
        Of the model, by torch's name, not checked.
    """

    num_heads: int | None
    num_kv_heads: int
    head_dim: int
    dtype: str | None = None


def one_line(error: Exception) -> str:
    """The start of an error's text, or its type's name."""
    return " ".join(str(error).split())[:200] or type(error).__name__

"""How far a cache setting moves a model's predictions from those at full precision."""

from kivi_tvm.eval.predictions import (
    Agreement,
    Scored,
    agreement,
    decoded_logits,
    full_precision_logits,
    perplexity,
)

__all__ = [
    "Agreement",
    "Scored",
    "agreement",
    "decoded_logits",
    "full_precision_logits",
    "perplexity",
]

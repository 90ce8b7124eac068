"""How far attention may be from a float64 reference on the same codes: one table."""

from __future__ import annotations

import torch

RELATIVE_L2 = {
    # Sums of some hundred float32 products and a polynomial exp2: a few 1e-7 each.
    torch.float32: 1e-5,
    # The output is rounded to 11 bits, 2.4e-4 rms at most; inputs are exact.
    torch.float16: 2e-3,
    # Rounded to 8 bits, 2e-3 rms at most.
    torch.bfloat16: 1e-2,
}

# What other compute modes add on the data of tests: 15, 7 or 11 bits of the prepared operand.
MODE_L2 = {"int8x2": 1e-3, "int8": 8e-2, "half": 5e-3}


def limit(dtype: torch.dtype, max_score: float = 0.0, compute: str = "float") -> float:
    """The tolerance for a dtype and compute mode; a float32 score loses digits as it grows."""
    scale = max(1.0, max_score / 100) if dtype == torch.float32 else 1.0
    return max(RELATIVE_L2[dtype] * scale, MODE_L2.get(compute, 0.0))

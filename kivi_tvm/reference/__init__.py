"""KIVI in plain torch: slow, obvious, and the only oracle of every test.

Shapes: `B` batch, `H` query heads, `H_kv` key/value heads, `T` tokens, `D` channels, `G` group
size, `R` residual length, `W = 32 / bits` codes per word (design section 2).
"""

from kivi_tvm.reference.cache import ReferenceCache
from kivi_tvm.reference.formulas import (
    FLOAT16_MAX,
    KEY_AXES,
    Quantized,
    attention,
    dequantize,
    pack,
    quantize,
    quantize_key,
    quantize_value,
    repack,
    unpack,
)
from kivi_tvm.reference.row import ReferenceRow

__all__ = [
    "FLOAT16_MAX",
    "KEY_AXES",
    "Quantized",
    "ReferenceCache",
    "ReferenceRow",
    "attention",
    "dequantize",
    "pack",
    "quantize",
    "quantize_key",
    "quantize_value",
    "repack",
    "unpack",
]

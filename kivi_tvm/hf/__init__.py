"""transformers integration: `KiviCache` and the attention implementation "kivi_tvm".

Importing this module registers the attention function, and transformers' own `sdpa_mask` as its
mask function (without one, masks would arrive as None and padding would be ignored).
"""

from kivi_tvm.hf.support import require_transformers

require_transformers()

from kivi_tvm.hf.attention import register  # noqa: E402
from kivi_tvm.hf.cache import KiviCache  # noqa: E402

register()

__all__ = ["KiviCache"]

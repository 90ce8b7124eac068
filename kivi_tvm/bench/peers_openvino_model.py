"""An OpenVINO model of one PagedAttention node."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np

from kivi_tvm.workloads import Workload

# In the node's order, before `_constants`; the caches' type and block shape is up to the plugin.
WIDE = ("q", "k", "v")
CACHES = ("key_cache.0", "value_cache.0")
TABLE = ("past_lens", "subsequence_begins", "block_indices", "block_indices_begins")


def attention_model(w: Workload) -> Any:
    """Decode attention of the heads of `w` over any number of rows; new tokens are stored."""
    ov = importlib.import_module("openvino")
    opset = importlib.import_module("openvino.opset13")
    node = importlib.import_module("openvino.op")._PagedAttentionExtension
    heads = {"q": w.num_heads, "k": w.num_kv_heads, "v": w.num_kv_heads}
    shapes: dict[str, tuple[Any, Any]] = {
        **{name: ([-1, heads[name] * w.head_dim], np.float32) for name in WIDE},
        **{name: (ov.PartialShape([-1] * 4), ov.Type.dynamic) for name in CACHES},
        **{name: ([-1], np.int32) for name in TABLE},
    }
    given = [_parameter(opset, name, *spec) for name, spec in shapes.items()]
    longest = _parameter(opset, "max_context_len", [], np.int32)
    nodes = given + _constants(opset, longest, w.head_dim)
    attention = node([each.output(0) for each in nodes])
    facts = attention.get_rt_info()
    for side in ("k", "v"):
        facts[f"num_{side}_heads"], facts[f"{side}_head_size"] = w.num_kv_heads, w.head_dim
    return ov.Model([opset.result(attention.output(0))], [*given, longest], "attention")


def _parameter(opset: Any, name: str, shape: Any, dtype: Any) -> Any:
    made = opset.parameter(shape, dtype)
    made.output(0).get_tensor().set_names({name})
    made.set_friendly_name(name)
    return made


def _constants(opset: Any, max_context_len: Any, head_dim: int) -> list[Any]:
    """The node's inputs behind the block table: scale, no window, no ALiBi, no rotation, ..."""

    def empty(dtype: Any) -> Any:
        return opset.constant(np.empty((0,), dtype))

    def zero() -> Any:
        return opset.constant(np.asarray(0, np.int32))

    f32, i32 = np.float32, np.int32
    scale = opset.constant(np.asarray(head_dim**-0.5, f32))
    return [
        scale, zero(), empty(f32), max_context_len, empty(i32), empty(i32), empty(i32), empty(f32),
        empty(f32), zero(), zero(), empty(f32), zero(), empty(i32), empty(i32), empty(i32),
        empty(i32), empty(np.uint8), empty(i32),
    ]  # fmt: skip

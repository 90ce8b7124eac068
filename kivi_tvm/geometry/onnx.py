"""Head counts and head dim of the attention in an ONNX file."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from kivi_tvm.errors import UserError
from kivi_tvm.geometry import Geometry, one_line

INSTALL_ONNX = "pip install 'kivi-tvm[onnx]'"
# H (None: not told), H_kv, D, and the name of a cache tensor.
Found = tuple[int | None, int, int, str]

# Attention operators of ONNX: attributes of H and H_kv, first of the inputs and of the outputs that
# are a cache `[B, H_kv, T, D]` of keys, then of values.
ONNX_ATTENTION = {
    ("com.microsoft", "GroupQueryAttention"): ("num_heads", "kv_num_heads", 3, 1),
    ("com.microsoft", "MultiHeadAttention"): ("num_heads", "num_heads", 6, 1),
    ("", "Attention"): ("q_num_heads", "kv_num_heads", 4, 1),
}


def read_onnx(path: Path) -> list[Geometry]:
    """The distinct geometries of an ONNX file's attention; weights beside it are not read.

    They come from attention operators with a cache (`GroupQueryAttention` and its kin), else from
    inputs such as `past_key_values.0.key`, which do not tell the query heads.

    Raises
    ------
    UserError
        The package `onnx` is missing, or the file is unreadable or has no such attention.
    """
    try:
        onnx: Any = import_module("onnx")
    except ImportError as error:
        raise UserError(f"`--model` {path} needs the package onnx; run: {INSTALL_ONNX}") from error
    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise UserError(f"`--model` {path} cannot be read: {error.strerror}") from error
    except Exception as error:  # protobuf's own error has no base but Exception
        raise UserError(f"`--model` {path} is not an ONNX file: {one_line(error)}") from error
    infos = [x for g in _graphs(model.graph) for x in (*g.input, *g.output, *g.value_info)]
    shapes = {info.name: _shape(info) for info in infos}
    types = {info.name: info.type.tensor_type.elem_type for info in infos}
    names = {
        onnx.TensorProto.FLOAT16: "float16",
        onnx.TensorProto.BFLOAT16: "bfloat16",
        onnx.TensorProto.FLOAT: "float32",
    }
    found = dict.fromkeys(_from_nodes(model, shapes, path)) or dict.fromkeys(_from_inputs(model))
    if not found:
        raise UserError(
            f"`--model` {path} must have GroupQueryAttention or inputs named "
            "past_key_values.0.key, got neither; pass --head-dim, --num-heads and --num-kv-heads"
        )
    layers = [Geometry(H, H_kv, D, names.get(types[cache])) for H, H_kv, D, cache in found]
    return list(dict.fromkeys(layers))


def _from_nodes(model: Any, shapes: dict[str, list[int]], path: Path) -> Iterator[Found]:
    """(H, H_kv, D, name of a cache tensor) of every attention operator."""
    for node in (n for graph in _graphs(model.graph) for n in graph.node):
        domain = "" if node.domain == "ai.onnx" else node.domain
        if (rule := ONNX_ATTENTION.get((domain, node.op_type))) is None:
            continue
        H_name, H_kv_name, past, present = rule
        caches = [*node.input[past : past + 2], *node.output[present : present + 2]]
        attributes = {a.name: a.i for a in node.attribute}
        H, H_kv = attributes.get(H_name, 0), attributes.get(H_kv_name, 0)
        # [B, H_kv, T, D]
        cache = next(
            (name for name in caches if len(s := shapes.get(name, [])) == 4 and s[3]), None
        )
        if cache is None or not H:
            raise UserError(
                f"`--model` {path} must state the head dim of its cache, got {node.op_type} "
                f"{node.name!r} without {H_name} or a shape of past_key; "
                "pass --head-dim, --num-heads and --num-kv-heads"
            )
        yield H, H_kv or shapes[cache][1], shapes[cache][3], cache


def _from_inputs(model: Any) -> Iterator[Found]:
    for info in model.graph.input:
        shape = _shape(info)
        is_past = info.name.startswith(("past_key_values.", "past_key"))
        if is_past and len(shape) == 4 and shape[1] and shape[3]:
            yield None, shape[1], shape[3], info.name


def _graphs(graph: Any) -> Iterator[Any]:
    """A graph and those inside its nodes (branches of `If`)."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs):
                yield from _graphs(inner)


def _shape(info: Any) -> list[int]:
    """Extents of a tensor; 0 where one is symbolic."""
    return [int(d.dim_value) for d in info.type.tensor_type.shape.dim]

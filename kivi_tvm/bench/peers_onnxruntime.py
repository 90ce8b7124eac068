"""ONNX Runtime's GroupQueryAttention on the CPU, cache in float32, int8 or int4.

The operator's own quantization: symmetric, one scale for the layer ("int8", the faster) or one per
channel ("int8-channel"), fixed in the model; scales here are those of the data, the best there are.
Every call stores the same new token again and attends.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kivi_tvm.bench.provider import QUANTIZED, WIDE, Peer, Provider, Setting, Unusable
from kivi_tvm.workloads import Workload

INSTALL = "pip install onnx onnxruntime"
BITS = {"fp32": None, "int8": 8, "int4": 4}
# Against attention on the numbers that the cache means; seen: 3e-6, and 8e-5 where the new token,
# which the operator quantizes itself, was rounded the other way.
TOLERANCES = {"fp32": 1e-5, "int8": 1e-3, "int4": 1e-3}
QUANTIZED_INPUTS = ["", "", "", "", "", "k_scale", "v_scale"]


def _scale(x: Tensor, bits: int, per_channel: bool) -> Tensor:
    """`[1, H_kv, 1, D]`, one number repeated unless `per_channel`."""
    top = x.abs().amax((0, 2), keepdim=True) if per_channel else x.abs().amax().expand(1, 1, 1, 1)
    made: Tensor = (top / (2 ** (bits - 1) - 1)).clamp(min=torch.finfo(torch.float32).tiny)
    return made.expand(1, x.shape[1], 1, x.shape[3]).contiguous()


def _codes(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    top = 2 ** (bits - 1)
    return (x / scale).round_().clamp_(-top, top - 1)


def _packed(codes: Tensor, bits: int) -> Tensor:
    """int8, or two codes plus 8 in a byte, the even channel low."""
    if bits == 8:
        return codes.to(torch.int8)
    nibbles = (codes + 8).to(torch.uint8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def _node(
    helper: Any,
    w: Workload,
    inputs: list[str],
    outputs: list[str],
    scales: dict[str, Any],
    bits: int,
) -> Any:
    attributes: dict[str, Any] = {"num_heads": w.num_heads, "kv_num_heads": w.num_kv_heads}
    if scales:
        kind = "PER_CHANNEL" if scales["k_scale"].size > 1 else "PER_TENSOR"
        attributes |= {"k_quant_type": kind, "v_quant_type": kind, "kv_cache_bit_width": bits}
        inputs = inputs + QUANTIZED_INPUTS
    domain = "com.microsoft"
    return helper.make_node("GroupQueryAttention", inputs, outputs, domain=domain, **attributes)


def _model(setting: Setting, cache_type: str, width: int, scales: dict[str, Any]) -> bytes:
    """A graph of one node; `cache_type` is an ONNX type, `width` the cache's last dimension."""
    onnx = importlib.import_module("onnx")
    helper, types = onnx.helper, onnx.TensorProto
    w = setting.w
    B, H, H_kv, D, T = w.batch_size, w.num_heads, w.num_kv_heads, w.head_dim, max(setting.lengths)
    cache = (getattr(types, cache_type), [B, H_kv, T, width])
    inputs = {
        "q": (types.FLOAT, [B, 1, H * D]),
        "k": (types.FLOAT, [B, 1, H_kv * D]),
        "v": (types.FLOAT, [B, 1, H_kv * D]),
        "past_k": cache,
        "past_v": cache,
        "seqlens_k": (types.INT32, [B]),
        "total": (types.INT32, [1]),
    }
    outputs = {"out": (types.FLOAT, [B, 1, H * D]), "present_k": cache, "present_v": cache}
    node = _node(helper, w, [*inputs], [*outputs], scales, 4 if width < D else 8)
    sides = [
        [helper.make_tensor_value_info(name, *spec) for name, spec in side.items()]
        for side in (inputs, outputs)
    ]
    constants = [onnx.numpy_helper.from_array(value, name) for name, value in scales.items()]
    graph = helper.make_graph([node], "attention", *sides, constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(model.SerializeToString())


def _session(model: bytes) -> Any:
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Else its threads spin for 40 ms after a call, on the cores of whoever is timed next; no
    # slower for it: 0.32 against 0.64 ms at 1,000 tokens (int8, 2 threads).
    options.add_session_config_entry("session.force_spinning_stop", "1")
    try:
        return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its errors have no common base
        raise Unusable(f"onnxruntime refuses the model: {error}") from error


def _bound(
    session: Any, inputs: dict[str, Tensor], cache: Sequence[Tensor]
) -> Callable[[], Tensor]:
    """A call on torch's memory: past and present are the same buffers, nothing is copied."""
    out = torch.empty_like(inputs["q"])
    binding = session.io_binding()
    tensors = {**inputs, "past_k": cache[0], "past_v": cache[1]}
    results = {"out": out, "present_k": cache[0], "present_v": cache[1]}
    for bind, each in ((binding.bind_input, tensors), (binding.bind_output, results)):
        for name, tensor in each.items():
            array = tensor.numpy()
            bind(name, "cpu", 0, array.dtype.type, tuple(array.shape), tensor.data_ptr())

    def call() -> Tensor:
        session.run_with_iobinding(binding)
        return out

    # The binding holds addresses only.
    call.__dict__["keep"] = tensors
    return call


def _stored(
    setting: Setting, bits: int | None, per_channel: bool
) -> tuple[list[Tensor], list[Tensor], dict[str, Any]]:
    """The cache's buffers, the float32 numbers that they mean, and the scales."""
    caches, meant, scales = [], [], {}
    for name, x in (("k_scale", setting.keys.float()), ("v_scale", setting.values.float())):
        if bits is None:
            caches.append(x)
            meant.append(x)
            continue
        scale = _scale(x, bits, per_channel)
        codes = _codes(x, scale, bits)
        caches.append(_packed(codes, bits))
        meant.append(codes * scale)
        scales[name] = scale.numpy() if per_channel else scale.flatten()[:1].numpy()
    return caches, meant, scales


def _make(name: str, slug: str, per_channel: bool, setting: Setting) -> Provider:
    bits = BITS[slug]
    caches, meant, scales = _stored(setting, bits, per_channel)
    cache_type = {None: "FLOAT", 8: "INT8", 4: "UINT8"}[bits]
    session = _session(_model(setting, cache_type, caches[0].shape[-1], scales))
    B, drawn = setting.w.batch_size, setting.inputs
    new = {"q": drawn.q[0], "k": drawn.k_new[0], "v": drawn.v_new[0]}
    inputs = {key: x.float().reshape(B, 1, -1).contiguous() for key, x in new.items()}
    inputs["seqlens_k"] = torch.tensor(setting.lengths, dtype=torch.int32) - 1
    inputs["total"] = torch.tensor([max(setting.lengths)], dtype=torch.int32)
    token_bytes = 2 * caches[0][0, :, 0].nbytes
    nbytes = sum(setting.lengths) * token_bytes
    copies = [[x.clone() for x in caches] for _ in range(setting.copies(nbytes))]
    return Provider(
        name=name,
        source="peer",
        calls=[_bound(session, inputs, each) for each in copies],
        nbytes=nbytes,
        expected=setting.exact(drawn.q[0], *meant),
        tolerance=TOLERANCES[slug],
        kind=WIDE if bits is None else QUANTIZED,
    )


def _peer(slug: str, per_channel: bool = False) -> Peer:
    name = f"onnxruntime-{slug}" + ("-channel" if per_channel else "")
    kind = WIDE if BITS[slug] is None else QUANTIZED
    make = partial(_make, name, slug, per_channel)
    return Peer(name, kind, make, ("onnx", "onnxruntime"), INSTALL, default=not per_channel)


PEERS = [_peer("fp32"), _peer("int8"), _peer("int4"), _peer("int8", True), _peer("int4", True)]

"""OpenVINO's PagedAttention on the CPU, cache in float16, u8 or u4.

It quantizes what it is given: values per token, keys per token ("u8", the faster of the two there)
or per channel over the 32 tokens of a block ("u4", the nearest peer in algorithm). Every call
stores the same new token again and attends.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kivi_tvm.bench.peers_openvino_model import CACHES, attention_model
from kivi_tvm.bench.provider import HALF, QUANTIZED, Peer, Provider, Setting, Unusable

INSTALL = "pip install openvino"
BLOCK = 32  # tokens, fixed by the plugin
FILL_TOKENS = 256  # of one call that fills the cache: whole blocks, with little attention
BITS = {"f16": 16, "u8": 8, "u4": 4}
# Against attention on the numbers that the cache means; seen at 1,000 tokens of normal, outlier,
# peaked and zero-mean data: 1e-6, 2e-3 and 1.3e-2. The block of the new token is quantized once
# more where keys are per channel.
TOLERANCES = {"f16": 1e-4, "u8": 1e-2, "u4": 5e-2}


def _compiled(setting: Setting, form: str, per_channel: bool) -> Any:
    ov = importlib.import_module("openvino")
    options = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "KV_CACHE_PRECISION": form,
        # bfloat16 and float16 were slower: 2.1 and 1.1 against 0.9 ms (f16 cache, 4,000 tokens).
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        # Threads bound to cores would stand in the way of those of the others.
        "ENABLE_CPU_PINNING": False,
    }
    if form != "f16":
        options["KEY_CACHE_QUANT_MODE"] = "BY_CHANNEL" if per_channel else "BY_TOKEN"
    try:
        return ov.Core().compile_model(attention_model(setting.w), "CPU", options)
    except RuntimeError as error:
        raise Unusable(f"openvino refuses the model: {str(error).splitlines()[0]}") from error


def _step(request: Any, rows: Sequence[Tensor], past: Sequence[int], bases: Sequence[int]) -> None:
    """Hand over `q, k, v [n, ...]`: equally many new tokens of rows with blocks from `bases` on."""
    ov = importlib.import_module("openvino")
    new = len(rows[0]) // len(past)
    totals = [each + new for each in past]
    blocks = [np.arange(base, base - (-total // BLOCK)) for base, total in zip(bases, totals)]
    given = {
        **dict(zip("qkv", (x.numpy() for x in rows))),
        "past_lens": np.array(past),
        "subsequence_begins": np.arange(len(past) + 1) * new,
        "block_indices": np.concatenate(blocks),
        "block_indices_begins": np.cumsum([0, *map(len, blocks)]),
        "max_context_len": np.array(max(totals)),
    }
    for name, array in given.items():
        dtype = np.float32 if name in ("q", "k", "v") else np.int32
        request.set_tensor(name, ov.Tensor(np.asarray(array, dtype, order="C")))


def _tokens(x: Tensor) -> Tensor:
    """`[..., H, D]` to `[-1, H * D]` float32."""
    return x.float().flatten(-2).reshape(-1, x.shape[-2] * x.shape[-1]).contiguous()


def _fill(request: Any, setting: Setting, bases: Sequence[int]) -> None:
    """Store all tokens but the new ones: pieces of whole blocks, each as a sequence of its own."""
    width = setting.w.num_heads * setting.w.head_dim
    for row, length in enumerate(setting.lengths):
        both = [x[row].transpose(0, 1) for x in (setting.keys, setting.values)]
        for start in range(0, length - 1, FILL_TOKENS):
            piece = slice(start, min(length - 1, start + FILL_TOKENS))
            k, v = (_tokens(x[piece]) for x in both)
            _step(request, (torch.zeros(len(k), width), k, v), [0], [bases[row] + start // BLOCK])
            request.infer()


def _caches(compiled: Any, blocks: int) -> dict[str, Any]:
    """Empty caches; the plugin chooses the shape of a block: codes with scales and zeros."""
    ov = importlib.import_module("openvino")
    ports = {port.get_any_name(): port for port in compiled.inputs}
    made = {}
    for name in CACHES:
        inner = [each.get_length() for each in list(ports[name].partial_shape)[1:]]
        made[name] = ov.Tensor(ports[name].element_type, ov.Shape([blocks, *inner]))
    return made


def _requests(compiled: Any, setting: Setting) -> tuple[list[Any], int]:
    """Infer requests on filled caches of their own, ready for the new token; a cache's bytes."""
    sizes = [-(-length // BLOCK) for length in setting.lengths]
    bases = [sum(sizes[:row]) for row in range(len(sizes))]
    filled = _caches(compiled, sum(sizes))
    nbytes = sum(tensor.byte_size for tensor in filled.values())
    drawn = [_tokens(x[0]) for x in (setting.inputs.q, setting.inputs.k_new, setting.inputs.v_new)]
    requests = []
    for number in range(setting.copies(nbytes)):
        request = compiled.create_infer_request()
        own = filled if number == 0 else _caches(compiled, sum(sizes))
        for name, tensor in own.items():
            request.set_tensor(name, tensor)
            if number:
                filled[name].copy_to(tensor)
        if number == 0:
            _fill(request, setting, bases)
        _step(request, drawn, [length - 1 for length in setting.lengths], bases)
        requests.append(request)
    return requests, nbytes


def _call(request: Any) -> Tensor:
    request.infer()
    out: Tensor = torch.from_numpy(request.get_output_tensor(0).data)
    return out


def _affine(x: Tensor, bits: int, dim: int) -> Tensor:
    """Nearest of `2**bits` steps between the least and the largest along `dim`."""
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)
    made: Tensor = ((x - low) / step).round_() * step + low
    return made


def _by_block(x: Tensor, length: int, bits: int) -> Tensor:
    """Keys `[H_kv, T, D]` per channel in blocks; the last block holds what is there of it."""
    made = x.clone()
    for start in range(0, length, BLOCK):
        stop = min(length, start + BLOCK)
        made[:, start:stop] = _affine(x[:, start:stop], bits, 1)
    return made


def _meant(setting: Setting, bits: int, per_channel: bool) -> tuple[Tensor, Tensor]:
    """The keys and values that the cache's codes stand for."""
    k, v = setting.keys, setting.values
    if bits == 16:
        return k.half(), v.half()
    k, v = k.float(), v.float()
    if not per_channel:
        return _affine(k, bits, 3), _affine(v, bits, 3)
    rows = [_by_block(row, length, bits) for row, length in zip(k, setting.lengths)]
    return torch.stack(rows), _affine(v, bits, 3)


def _make(name: str, form: str, per_channel: bool, setting: Setting) -> Provider:
    compiled = _compiled(setting, form, per_channel)
    requests, nbytes = _requests(compiled, setting)
    return Provider(
        name=name,
        source="peer",
        calls=[partial(_call, request) for request in requests],
        nbytes=nbytes,
        expected=setting.exact(setting.inputs.q[0], *_meant(setting, BITS[form], per_channel)),
        tolerance=TOLERANCES[form],
        kind=HALF if form == "f16" else QUANTIZED,
    )


def _peer(form: str, per_channel: bool, other: bool = False) -> Peer:
    suffix = ("-channel" if per_channel else "-token") if other else ""
    name, kind = f"openvino-{form}{suffix}", HALF if form == "f16" else QUANTIZED
    make = partial(_make, name, form, per_channel)
    return Peer(name, kind, make, ("openvino",), INSTALL, default=not other)


PEERS = [
    _peer("f16", False),
    _peer("u8", False),
    _peer("u4", True),
    _peer("u8", True, other=True),
    _peer("u4", False, other=True),
]

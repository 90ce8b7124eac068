"""Measure decoding with Llama-shaped models on an NVIDIA GPU: KIVI against 16-bit caches.

    python tools/gpu_decode.py docs/gpu-decode-h100.jsonl --commit $(git rev-parse --short HEAD)

Needs torch with CUDA, transformers, nvcc and no network. Weights and cached tokens are random.
Every cache gets as many sequences as fit in the same memory at their full length; the bytes of a
sequence are those that the filled cache holds. A step is the whole model: embedding, all layers,
logits and the most likely token, replayed as one CUDA graph. The peers keep bfloat16 keys and
values, in buffers of exactly the length with the new token written in place ("exact"), or joined
anew in every step, as transformers' `DynamicCache` does ("concatenated"); both attend by the
fastest of PyTorch's backends. The same model without attention ("rest") is timed beside: what no
cache can be faster than. Steps are timed where no key block is due, which is so in all but one
of R steps.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from gpu_steps import (
    BACKENDS,
    TOLERANCE,
    D,
    arguments,
    captured,
    drawn,
    environment_of,
    error_of,
    filled,
    graph_us,
    replay_us,
    warm_up,
)
from torch import Tensor
from torch.nn.attention import sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from kivi_tvm import KiviConfig
from kivi_tvm.runtime.cache import Cache

SHAPES = {
    "Llama-3-8B": {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256},
    "Llama-2-7B": {"num_key_value_heads": 32, "intermediate_size": 11008, "vocab_size": 32000},
}
# The paper's prompt of 161 and output of 338 tokens (section 4.3), and long contexts: tokens at the
# end and where a step is timed, bytes of memory, and tokens of a page.
SETTINGS = ((161 + 338, 161 + 338 // 2, 8 << 30, 32), (32768, 32744, 32 << 30, 128))
WINDOWS = (128, 32)  # residual lengths
DTYPE = torch.bfloat16
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Setting:
    """One model and length, and the memory of its cache."""

    model: str
    full_tokens: int  # of a sequence at its end, for which there must be memory
    tokens: int  # where a step is timed
    memory_bytes: int
    page_size: int  # of KIVI's cache


def new_model(shape: str) -> LlamaForCausalLM:
    """A model with random weights on the GPU."""
    config = LlamaConfig(
        hidden_size=4096, num_hidden_layers=32, num_attention_heads=32,
        max_position_embeddings=131072, **SHAPES[shape],
    )  # fmt: skip
    torch.set_default_dtype(DTYPE)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    return model


def next_tokens(model: LlamaForCausalLM, ids: Tensor, position: Tensor, attend: Attend) -> Tensor:
    """The most likely next token of every sequence; `ids`, `position [B, 1]`."""
    x = model.model.embed_tokens(ids)
    angles = model.model.rotary_emb(x, position)
    for i, layer in enumerate(model.model.layers):
        y, own = layer.input_layernorm(x), layer.self_attn
        q, k, v = (
            proj(y).unflatten(-1, (-1, D)).transpose(1, 2)
            for proj in (own.q_proj, own.k_proj, own.v_proj)
        )
        q, k = apply_rotary_pos_emb(q, k, *angles)
        x = x + own.o_proj(attend(i, q, k, v).flatten(1)[:, None])
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    logits: Tensor = model.lm_head(model.model.norm(x))
    return logits.argmax(-1)


def config_of(kv_heads: int, window: int, page_size: int) -> KiviConfig:
    """A cache that is measured."""
    return KiviConfig(
        D, 32, kv_heads, residual_length=window, dtype="bfloat16", page_size=page_size
    )


def configs() -> Iterator[KiviConfig]:
    """Every cache that is measured."""
    for shape, (*_, page_size), window in product(SHAPES.values(), SETTINGS, WINDOWS):
        yield config_of(shape["num_key_value_heads"], window, page_size)


def free() -> None:
    """Give the memory of what is gone back: a cache and its layers know each other."""
    gc.collect()
    torch.cuda.empty_cache()


def row_bytes(config: KiviConfig, layers: int, tokens: int) -> int:
    """Bytes of one sequence, of a filled cache's own account; layers share tables and workspace."""
    few = 4
    found = filled(config, 1, few, tokens).nbytes
    own = (found["packed"] + found["window"]) * layers
    return (own + found["tables"] + found["workspace"]) // few


def fastest_attention(kv_heads: int, batch: int, tokens: int) -> Any:
    """The backend that attends fastest to such a cache, query heads of a KV head as rows."""
    q, k, v = (
        drawn(batch, kv_heads, 32 // kv_heads, D, dtype=DTYPE),
        *drawn(2, batch, kv_heads, tokens, D, dtype=DTYPE),
    )
    found = []
    for backend in BACKENDS:
        with suppress(RuntimeError), sdpa_kernel(backend):  # one may not take it
            found.append((graph_us(lambda: scaled_dot_product_attention(q, k, v), 1), backend))
    return min(found, key=lambda each: each[0])[1]


def peer(setting: Setting, kv_heads: int, layers: int, batch: int, joined: bool) -> Attend:
    """Attention to 16-bit caches; `joined`: made anew with the new token in every step."""
    tokens = setting.tokens
    kept = tokens - 1 if joined else tokens
    caches = [drawn(2, batch, kv_heads, kept, D, dtype=DTYPE) for _ in range(layers)]
    backend = fastest_attention(kv_heads, batch, tokens)

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = caches[i]
        if joined:
            keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        else:
            keys[:, :, -1:], values[:, :, -1:] = k, v
        rows = q.reshape(batch, kv_heads, -1, D)
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(rows, keys, values)

    return attend


def attention_of(cache: Cache) -> Attend:
    """Attention to a cache of ours."""

    def attend(i: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found: Any = cache.layer(i).decode(q[:, :, 0], k[:, :, 0], v[:, :, 0])
        out: Tensor = found
        return out

    return attend


def no_attention(_: int, q: Tensor, *__: Tensor) -> Tensor:
    """What a layer without attention goes on with."""
    return q[:, :, 0]


def step_ms(
    model: LlamaForCausalLM, attend: Attend, batch: int, before: Callable[[], object]
) -> tuple[float, float]:
    """Time of a step, and of the same model without attention."""
    ids = torch.randint(0, 1000, (batch, 1), device="cuda")
    position = torch.full_like(ids, 1000)

    def step() -> None:
        before()
        next_tokens(model, ids, position, attend)

    steps = captured(step)
    others = captured(lambda: next_tokens(model, ids, position, no_attention))
    warm_up(others)  # steps add tokens
    rest = replay_us(others, 1)
    return replay_us(steps, 1) / 1e3, rest / 1e3


def measured(model: LlamaForCausalLM, setting: Setting) -> Iterator[dict[str, Any]]:
    """Batch, time of a step and tokens per second, of every cache."""
    layers, kv_heads = model.config.num_hidden_layers, model.config.num_key_value_heads

    def result(name: str, row: int, attend: Attend, before: Any = lambda: None) -> dict[str, Any]:
        batch = setting.memory_bytes // row
        time, rest = step_ms(model, attend, batch, before)
        return {
            "cache": name, "batch": batch, "row_bytes": row, "step_ms": round(time, 3),
            "rest_ms": round(rest, 3), "tokens_per_s": round(batch / time * 1e3, 1),
        }  # fmt: skip

    row = 4 * D * kv_heads * layers * setting.full_tokens
    for name, joined in (("exact", False), ("concatenated", True)):
        attend = peer(setting, kv_heads, layers, setting.memory_bytes // row, joined)
        yield result(f"bfloat16, {name}", row, attend)
        del attend
        free()
    for window in WINDOWS:
        config = config_of(kv_heads, window, setting.page_size)
        row = row_bytes(config, layers, setting.full_tokens)
        batch = setting.memory_bytes // row
        error = error_of(filled(config, 1, batch, setting.tokens))
        if error > TOLERANCE:
            raise SystemExit(f"the error of attention must be at most {TOLERANCE}, got {error}")
        free()
        cache = filled(config, layers, batch, setting.tokens)

        begin = partial(cache.begin, 1)
        yield result(f"KIVI, 2 bits, G=32, R={window}", row, attention_of(cache), begin) | {
            "error": error
        }
        del cache, begin
        free()


def main() -> None:
    """Write one line per cache."""
    args = arguments(__doc__)
    names = "kivi-tvm", "apache-tvm", "apache-tvm-ffi", "torch", "transformers"
    environment = environment_of(args.commit, *names)
    with args.output.open("w", encoding="utf-8") as file, torch.no_grad():
        for shape in SHAPES:
            model = new_model(shape)
            for setting in (Setting(shape, *each) for each in SETTINGS):
                peer_rate = None
                for found in measured(model, setting):
                    peer_rate = peer_rate or found["tokens_per_s"]
                    record = asdict(setting) | found
                    record["throughput_ratio"] = round(found["tokens_per_s"] / peer_rate, 3)
                    print(json.dumps(record), flush=True)
                    print(json.dumps(record | environment), file=file, flush=True)
            del model
            free()


if __name__ == "__main__":
    main()

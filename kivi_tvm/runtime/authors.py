"""Converters to and from the cache of the KIVI authors' code: the same codes, packed their way.

Their `past_key_value` of one layer is a tuple of eight tensors and a length. Keys are stored
transposed and both kinds of codes are packed along the last axis, low bits first; a key block is
packed `R` tokens at a time and a value when it is `R` tokens old, as here. Converting moves codes,
scales and zeros without requantizing, so a cache that goes there and back holds the same bits.

Source: github.com/jy-yuan/KIVI, `models/llama_kivi.py` (the tuple) and `quant/new_pack.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kivi_tvm import layout
from kivi_tvm.config import WORD_BITS, KiviConfig
from kivi_tvm.errors import UserError
from kivi_tvm.reference import Quantized, dequantize, pack, unpack
from kivi_tvm.runtime.checks import check_tensor, outside_inference_mode
from kivi_tvm.runtime.rollback import get_tokens, put_tokens
from kivi_tvm.runtime.transfer import joined_pages, write_pages

if TYPE_CHECKING:
    from kivi_tvm.runtime.cache import Cache
    from kivi_tvm.runtime.layer import CacheLayer


class AuthorsCache(NamedTuple):
    """One layer as the authors' models keep it; a tuple of theirs, in their order.

    `L` tokens per row, of which `PK = L - L mod R` keys and `PV = max(0, L - R)` values are
    packed. A part without tokens is None, except `v_full`.

    Attributes
    ----------
    k_code : Tensor or None
        `[B, H_kv, D, PK / W_k]` int32: `W_k = 32 / b` tokens of one channel per word.
    k_full : Tensor or None
        `[B, H_kv, L - PK, D]` in the model dtype.
    k_scale, k_mn : Tensor or None
        `[B, H_kv, D, PK / G_k]` float16: a key is `code * scale + mn`.
    v_code : Tensor or None
        `[B, H_kv, PV, D / W_v]` int32: `W_v` channels of one token per word.
    v_full : Tensor
        `[B, H_kv, min(L, R), D]` in the model dtype.
    v_scale, v_mn : Tensor or None
        `[B, H_kv, PV, D / G_v]` float16.
    kv_seq_len : int
        `L`.
    """

    k_code: Tensor | None
    k_full: Tensor | None
    k_scale: Tensor | None
    k_mn: Tensor | None
    v_code: Tensor | None
    v_full: Tensor
    v_scale: Tensor | None
    v_mn: Tensor | None
    kv_seq_len: int


def to_authors(layer: CacheLayer) -> AuthorsCache:
    """What `layer` holds, in new tensors of the authors' layout.

    Tokens that `rollback` keeps beyond the window have no place there and are left out.

    Parameters
    ----------
    layer : CacheLayer
        Of a cache with window="kivi" and no sinks, whose rows have one length above 0.

    Returns
    -------
    AuthorsCache

    Raises
    ------
    UserError
        The cache holds something that the authors' layout cannot express.
    RuntimeError
        A step is open.

    Source: `past_key_value` in the authors' `models/llama_kivi.py`.
    """
    cache = layer.cache
    _check_window(cache)
    cache.check_no_step()
    lengths = cache.lengths
    if min(lengths) == 0 or len(set(lengths)) > 1:
        raise UserError(
            "the authors' layout needs every row to have the same length above 0, "
            f"got lengths {lengths}; `select` the rows of one length first"
        )
    rows = [_row_to_authors(layer, row.slot, lengths[0]) for row in cache.rows.rows]
    parts = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    held = {name: x if x.numel() else None for name, x in parts.items()}
    return AuthorsCache(**held, kv_seq_len=lengths[0])  # type: ignore[arg-type]


@outside_inference_mode
def from_authors(layer: CacheLayer, stored: AuthorsCache) -> None:
    """Fill `layer` of an empty cache; like `prefill`, it is the layer's part of one step.

    Decoding continues bit for bit as from the cache that `to_authors` read.

    Parameters
    ----------
    layer : CacheLayer
        Of a cache with window="kivi" and no sinks, every row empty.
    stored : AuthorsCache
        `AuthorsCache(*past_key_value)` for a tuple of the authors'.

    Raises
    ------
    UserError
        The cache has another window or sinks.
    TypeError, ValueError
        A part has the wrong dtype or shape, is missing or too much, or `max_tokens` would be
        exceeded; nothing has changed.
    RuntimeError
        The cache is not empty, or the layer was already called in this step.

    Source: `past_key_value` in the authors' `models/llama_kivi.py`.
    """
    cache = layer.cache
    _check_window(cache)
    _check_parts(cache, stored)
    added = [stored.kv_seq_len] * cache.batch_size
    cache.check_can_prefill(added)
    began = cache.enter(layer.index, stored.kv_seq_len, added)
    try:
        for i, row in enumerate(cache.rows.rows):
            # Nothing older than the window can be taken back exactly.
            row.values_from = layout.packed_values(cache.cfg, row.length)
            row.keys_from = layout.packed_keys(cache.cfg, row.length)
            parts = {name: part[i] for name, part in _tensors(stored) if part is not None}
            _row_from_authors(layer, row.slot, parts)
    except BaseException:
        cache.abandon(began)
        raise
    cache.leave(layer.index)


def _check_window(cache: Cache) -> None:
    """Raise unless the authors' code could hold what this cache does."""
    found = []
    if cache.window != "kivi":
        found.append(
            f"`window` must be 'kivi', got {cache.window!r}: the authors drop the exact keys of a "
            "block when they pack it"
        )
    if cache.sink_tokens:
        found.append(f"`sink_tokens` must be 0, got {cache.sink_tokens}: they keep no sinks")
    if found:
        raise UserError("the authors' layout cannot hold this cache: " + "; ".join(found))


def _check_parts(cache: Cache, stored: AuthorsCache) -> None:
    """Raise unless every part is there as `kv_seq_len` tokens ask for."""
    length = stored.kv_seq_len
    if not isinstance(length, int) or isinstance(length, bool) or length < 1:
        raise ValueError(f"`kv_seq_len` must be an int of at least 1, got {length!r}")
    shapes = _shapes(cache.cfg, cache.batch_size, length)
    dtypes = {"code": torch.int32, "full": cache.dtype, "scale": torch.float16, "mn": torch.float16}
    for name, part in _tensors(stored):
        shape = shapes[name]
        if 0 in shape:
            if part is not None:
                raise ValueError(f"`{name}` must be None for kv_seq_len={length}, got {part!r}")
            continue
        check_tensor(name, part, shape, dtypes[name[2:]], cache.device)


def _shapes(cfg: KiviConfig, batch_size: int, length: int) -> dict[str, tuple[int, ...]]:
    """Shape of every part for `length` tokens; one with a 0 in it is None there."""
    PK, PV = layout.packed_keys(cfg, length), layout.packed_values(cfg, length)
    W_k, W_v = WORD_BITS // cfg.key_bits, WORD_BITS // cfg.value_bits
    rows, D = (batch_size, cfg.H_kv), cfg.D
    stats = {"k": (*rows, D, PK // cfg.G_k), "v": (*rows, PV, D // cfg.G_v)}
    return {
        "k_code": (*rows, D, PK // W_k),
        "k_full": (*rows, length - PK, D),
        "v_code": (*rows, PV, D // W_v),
        "v_full": (*rows, length - PV, D),
        **{f"{kind}_{name}": shape for kind, shape in stats.items() for name in ("scale", "mn")},
    }


def _tensors(stored: AuthorsCache) -> list[tuple[str, Tensor | None]]:
    return [(name, part) for name, part in stored._asdict().items() if name != "kv_seq_len"]


def _row_to_authors(layer: CacheLayer, slot: int, length: int) -> dict[str, Tensor]:
    """One row's parts by name, without the batch axis; those without tokens are empty."""
    cfg, key = layer.cache.cfg, layer.cache.module.key
    PK, PV = layout.packed_keys(cfg, length), layout.packed_values(cfg, length)
    held = joined_pages(layer, slot, layout.num_pages(cfg, PK))
    k_code = unpack(held["k_code"], cfg.key_bits, 1, layout.key_order(key))  # [H_kv, D, tokens]
    v_code = unpack(held["v_code"], cfg.value_bits, 1, layout.value_order(key))
    found = {
        "k_code": pack(k_code[:, :, :PK], cfg.key_bits, 2),
        "k_full": get_tokens(layer.windows["k_ring"][slot], range(PK, length)),
        "v_code": pack(v_code[:, :PV], cfg.value_bits, 2),
        "v_full": get_tokens(layer.windows["v_ring"][slot], range(PV, length)),
    }
    for ours, theirs in (("scale", "scale"), ("zero", "mn")):
        # [H_kv, PK / G_k, D] -> [H_kv, D, PK / G_k], [H_kv, D / G_v, PV] -> [H_kv, PV, D / G_v]
        found[f"k_{theirs}"] = held[f"k_{ours}"][:, : PK // cfg.G_k].mT
        found[f"v_{theirs}"] = held[f"v_{ours}"][:, :, :PV].mT
    return found


def _row_from_authors(layer: CacheLayer, slot: int, parts: dict[str, Tensor]) -> None:
    """Write one row's parts, without the batch axis, into its pages and rings."""
    cfg, key = layer.cache.cfg, layer.cache.module.key
    first = 0
    if "k_code" in parts:
        code = unpack(parts["k_code"], cfg.key_bits, 2)  # [H_kv, D, PK]
        keys = Quantized(code.mT, parts["k_scale"].mT, parts["k_mn"].mT)
        first = code.shape[2]
        write_pages(layer, slot, "k_code", pack(code, cfg.key_bits, 1, layout.key_order(key)))
        write_pages(layer, slot, "k_scale", keys.scale)
        write_pages(layer, slot, "k_zero", keys.zero)
        # the window sees packed keys as their codes give them
        _fill_ring(layer, "k_ring", slot, 0, dequantize(keys, 1))
    if "v_code" in parts:
        code = unpack(parts["v_code"], cfg.value_bits, 2)  # [H_kv, PV, D]
        whole = F.pad(code, (0, 0, 0, -code.shape[1] % cfg.P))
        words = pack(whole, cfg.value_bits, 1, layout.value_order(key))
        write_pages(layer, slot, "v_code", words)
        write_pages(layer, slot, "v_scale", parts["v_scale"].mT)
        write_pages(layer, slot, "v_zero", parts["v_mn"].mT)
    if "k_full" in parts:
        for name in {"k_ring", "k_exact"} & layer.windows.keys():
            _fill_ring(layer, name, slot, first, parts["k_full"])
    values = parts["v_code"].shape[1] if "v_code" in parts else 0
    _fill_ring(layer, "v_ring", slot, values, parts["v_full"])


def _fill_ring(layer: CacheLayer, name: str, slot: int, start: int, x: Tensor) -> None:
    """Write `x [H_kv, n, D]`, the first at token `start`, or as many of the last as there are."""
    ring = layer.windows[name][slot]
    stop = start + x.shape[1]
    kept = range(max(start, stop - ring.shape[1]), stop)
    put_tokens(ring, kept, x[:, kept.start - start :].to(ring.dtype))

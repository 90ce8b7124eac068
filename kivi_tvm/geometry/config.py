"""Head counts and head dim of transformers' configurations, read as plain JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kivi_tvm.errors import UserError
from kivi_tvm.geometry import Geometry, one_line

# What configurations call one thing; the first name that is there counts. `global_*` are those of
# the layers with full attention, which alone are KIVI's, in models that give sliding ones others.
HEADS = ("num_attention_heads", "num_query_heads", "n_head", "n_heads", "num_heads")
KV_HEADS = (
    "num_global_key_value_heads",
    "num_key_value_heads_per_layer",
    "num_key_value_heads",
    "num_kv_heads",
    "n_head_kv",
    "multi_query_group_num",
)
HEAD_DIM = ("global_head_dim", "head_dim", "kv_channels")
HIDDEN = ("hidden_size", "n_embd", "d_model")
FIELDS = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
DTYPE = ("dtype", "torch_dtype")
# Where models that also see or hear keep the language model's part.
NESTED = ("text_config", "thinker_config", "llm_config", "language_config", "decoder")


def read_config(
    path: Path, complete: Callable[[Path], dict[str, Any]] | None = None
) -> list[Geometry]:
    """The distinct geometries of a model's layers.

    Parameters
    ----------
    path : Path
        A folder with a config.json, or such a file.
    complete : callable, optional
        `complete(folder)` gives the language model's configuration in `folder` with the defaults
        of its model type, which nested configurations leave out.

    Raises
    ------
    UserError
        The file is missing or unreadable, or does not tell what it should.
    """
    file = path / "config.json" if path.is_dir() else path
    config = _read_json(file)
    text = text_config(config)
    dtype = _first(text, DTYPE) or _first(config, DTYPE)
    lacks = [usual for usual, names in FIELDS.items() if _first(text, names) is None]
    if text is not config and lacks:
        if complete is None or file.name != "config.json":
            raise UserError(_missing_message(file, lacks))
        text = complete(file.parent)
    return from_config(text, file, dtype)


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """The language model's part of a configuration: itself, or what it nests."""
    nested = next((config[name] for name in NESTED if isinstance(config.get(name), dict)), None)
    return config if nested is None else text_config(nested)


def from_config(config: dict[str, Any], source: Path, dtype: Any = None) -> list[Geometry]:
    """The distinct geometries of a configuration without nesting, in the order of the layers.

    Raises
    ------
    UserError
        The model has no plain decoder attention, or fields are missing or not whole numbers.
    """
    _check_kind(config, source)
    if missing := _missing(config):
        raise UserError(_missing_message(source, missing))
    heads = _layers(config, HEADS, source)
    kv_heads = _kv_heads(config, heads, source)
    dims = _head_dims(config, heads, source)
    count = max(map(len, (heads, kv_heads, dims)))
    for found in (heads, kv_heads, dims):
        if len(found) not in (1, count):
            raise UserError(f"`--model` {source} must have lists of one length, one per layer")
    rows = zip(*(found * (count // len(found)) for found in (heads, kv_heads, dims)))
    # Layers without attention have no heads.
    layers = dict.fromkeys(row for row in rows if all(row))
    name = dtype.removeprefix("torch.") if isinstance(dtype, str) and dtype != "auto" else None
    return [Geometry(H, H_kv, D, name) for H, H_kv, D in layers]


def _check_kind(config: dict[str, Any], source: Path) -> None:
    kind = config.get("model_type")
    if config.get("is_encoder_decoder"):
        raise UserError(
            f"`--model` {source} must be a decoder-only model, got encoder-decoder {kind!r}"
        )
    if config.get("kv_lora_rank") is not None:
        raise UserError(
            f"`--model` {source} must not use multi-head latent attention, "
            f"got kv_lora_rank={config['kv_lora_rank']} ({kind!r})"
        )


def _missing(config: dict[str, Any]) -> list[str]:
    """Fields, by their usual names, that a configuration leaves to its model type's defaults.

    Absent key/value heads mean as many as query heads: configurations from before grouped queries.
    """
    wanted = {"num_attention_heads": HEADS, "head_dim or hidden_size": (*HEAD_DIM, *HIDDEN)}
    return [usual for usual, names in wanted.items() if _first(config, names) is None]


def _missing_message(source: Path, names: Sequence[str]) -> str:
    return (
        f"`--model` {source} must tell {', '.join(names)}; or pass --head-dim, --num-heads and "
        "--num-kv-heads instead"
    )


def _kv_heads(config: dict[str, Any], heads: list[int], source: Path) -> list[int]:
    # Falcon: the count is there, but means something in its new architecture only.
    if config.get("multi_query") and not config.get("new_decoder_architecture"):
        return [1]
    return heads if _first(config, KV_HEADS) is None else _layers(config, KV_HEADS, source)


def _head_dims(config: dict[str, Any], heads: list[int], source: Path) -> list[int]:
    if _first(config, HEAD_DIM) is not None:
        return _layers(config, HEAD_DIM, source)
    hidden = _layers(config, HIDDEN, source)[0]
    if uneven := next((H for H in heads if H and hidden % H), None):
        raise UserError(
            f"`--model` {source} must have a hidden_size that is a multiple of {uneven} heads, "
            f"got {hidden}"
        )
    return [hidden // H if H else 0 for H in heads]


def _layers(config: dict[str, Any], names: Sequence[str], source: Path) -> list[int]:
    """The values of a field, one per layer or one for all."""
    value = _first(config, names)
    values = value if isinstance(value, list) else [value]
    if not values or any(type(each) is not int or each < 0 for each in values) or not any(values):
        name = next(name for name in names if config.get(name) is not None)
        raise UserError(f"`--model` {source} must have a positive int as {name}, got {value!r}")
    return values


def _first(config: dict[str, Any], names: Sequence[str]) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), None)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"`--model` {file} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"`--model` {file} is not JSON: {one_line(error)}") from error
    if not isinstance(config, dict):
        raise UserError(f"`--model` {file} must hold a JSON object, got {type(config).__name__}")
    return config

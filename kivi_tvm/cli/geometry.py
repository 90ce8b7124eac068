"""Options that say which caches a command is about: heads, head dim, bits, groups, dtype."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Iterable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kivi_tvm.config import BITS, COMPUTE_MODES, DTYPES, GROUP_SIZES
from kivi_tvm.errors import UserError

if TYPE_CHECKING:
    from kivi_tvm.geometry import Geometry
    from kivi_tvm.workloads import Workload

# What `kivi-tvm demo` runs: its model, and the dtype that it runs in.
DEMO_MODEL, DEMO_DTYPE = "smollm2-135m", "float32"
MODEL_TOKENS = 4096
HEAD_FLAGS = ("head_dim", "num_heads", "num_kv_heads")
INSTALL_TRANSFORMERS = "pip install 'kivi-tvm[hf]'"


def add_geometry_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `workloads` reads."""
    group = parser.add_argument_group(
        "geometry", f"by default that of the demo's model, {DEMO_MODEL}, in {DEMO_DTYPE}"
    )
    group.add_argument(
        "--model", help="a named model, a local transformers folder or config.json, or .onnx file"
    )
    group.add_argument(
        "--workloads", nargs="+", metavar="NAME", help="named ones: D128-M4-b2-bf16, ..."
    )
    group.add_argument("--head-dim", type=int, help="channels per head")
    group.add_argument("--num-heads", type=int, help="query heads")
    group.add_argument("--num-kv-heads", type=int, help="key/value heads (default: --num-heads)")
    group.add_argument(
        "--bits", type=int, nargs="+", metavar="BITS", help="per code, or of keys and of values: 2"
    )
    group.add_argument("--group-size", type=int, help="default: 32")
    group.add_argument("--residual-length", type=int, help="default: 128")
    group.add_argument(
        "--dtype", nargs="+", help=f"one or more (default: the model's, else {DEMO_DTYPE})"
    )
    group.add_argument("--compute", choices=COMPUTE_MODES, help="mode of attention: auto")
    group.add_argument("--tokens", type=int, help="length of the caches that are timed")
    group.add_argument("--batch-size", type=int, help="default: 1")


def workloads(args: argparse.Namespace) -> list[Workload]:
    """The distinct workloads that the options name, in their order.

    Several come from names, from a model whose layers differ in heads, or from several dtypes.

    Raises
    ------
    UserError
        Options contradict each other or break rules (all of them are listed), or the model's file
        cannot be read.
    """
    found = _contradictions(args) + _out_of_range(args)
    if found:
        raise UserError("; ".join(found))
    options = {
        "group_size": args.group_size,
        "residual_length": args.residual_length,
        "tokens": args.tokens,
        "batch_size": args.batch_size,
        "compute": args.compute,
    }
    if args.bits:
        options |= {"key_bits": args.bits[0], "value_bits": args.bits[-1]}
    given = {name: value for name, value in options.items() if value is not None}
    made = []
    for base, dtype in product(_bases(args), args.dtype or [None]):
        made.append(replace(base, **given, **({"dtype": dtype} if dtype else {})))
    _check(made, args)
    return list(dict.fromkeys(made))


def _contradictions(args: argparse.Namespace) -> list[str]:
    """Options that exclude each other."""
    heads = [_flag(name) for name in HEAD_FLAGS if getattr(args, name) is not None]
    if args.model is not None and Path(args.model).suffix == ".onnx":
        heads = [flag for flag in heads if flag != "--num-heads"]
    sources = [flag for flag in ("--model", "--workloads") if getattr(args, flag[2:]) is not None]
    found = []
    if len(sources) + bool(heads) > 1:
        found.append(f"the geometry must be given in one way, got {' and '.join(sources + heads)}")
    elif heads and (args.head_dim is None or args.num_heads is None):
        missing = [_flag(name) for name in HEAD_FLAGS[:2] if getattr(args, name) is None]
        found.append(f"{' and '.join(missing)} must be given with {' and '.join(heads)}")
    if args.workloads is not None:
        if args.bits is not None:
            found.append("`--bits` must not be given with --workloads, whose names say the bits")
        found += _unknown("--workloads", args.workloads, _tuned())
    return found


def _out_of_range(args: argparse.Namespace) -> list[str]:
    found = []
    if args.bits is not None and len(args.bits) > 2:
        found.append(f"`--bits` must be one number or two, of keys and of values, got {args.bits}")
    for name, allowed in (("bits", BITS), ("group_size", GROUP_SIZES), ("dtype", DTYPES)):
        value = getattr(args, name)
        for each in dict.fromkeys(value if isinstance(value, list) else [value]):
            if each is not None and each not in allowed:
                found.append(f"`{_flag(name)}` must be one of {list(allowed)}, got {each!r}")
    for name in (*HEAD_FLAGS, "residual_length", "tokens", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            found.append(f"`{_flag(name)}` must be at least 1, got {value}")
    return found


def _bases(args: argparse.Namespace) -> list[Workload]:
    """What is meant, before the options that change it are applied."""
    from kivi_tvm.workloads import MODELS

    if args.workloads is not None:
        return [_tuned()[name] for name in args.workloads]
    if args.head_dim is not None:
        from kivi_tvm.geometry import Geometry

        kv_heads = args.num_heads if args.num_kv_heads is None else args.num_kv_heads
        return [_workload(Geometry(args.num_heads, kv_heads, args.head_dim), args)]
    name = DEMO_MODEL if args.model is None else args.model
    if name in MODELS:
        return [replace(MODELS[name], dtype=DEMO_DTYPE)]
    return list(dict.fromkeys(_workload(each, args) for each in _read_model(name)))


def _read_model(name: str) -> list[Geometry]:
    from kivi_tvm.geometry.config import read_config
    from kivi_tvm.geometry.onnx import read_onnx
    from kivi_tvm.workloads import MODELS

    path = Path(name).expanduser()
    if not os.path.lexists(path):
        known = "; ".join(_unknown("--model", [name], MODELS))
        raise UserError(f"{known}, or a local folder, config.json or .onnx file")
    return read_onnx(path) if path.suffix == ".onnx" else read_config(path, _complete)


def _workload(geometry: Geometry, args: argparse.Namespace) -> Workload:
    from kivi_tvm.workloads import Workload

    if geometry.num_heads is None and args.num_heads is None:
        raise UserError(f"`--num-heads` must be given: {args.model} tells only the cache's heads")
    if geometry.num_heads is not None and args.model is not None and args.num_heads is not None:
        raise UserError(
            f"`--num-heads` must not be given: {args.model} has {geometry.num_heads} heads"
        )
    if not args.dtype and geometry.dtype not in (None, *DTYPES):
        raise UserError(
            f"`--dtype` must be given, one of {list(DTYPES)}: {args.model} has {geometry.dtype!r}"
        )
    return Workload(
        num_heads=args.num_heads if geometry.num_heads is None else geometry.num_heads,
        num_kv_heads=geometry.num_kv_heads,
        head_dim=geometry.head_dim,
        tokens=MODEL_TOKENS,
        dtype=args.dtype[0] if args.dtype else geometry.dtype or DEMO_DTYPE,
    )


def _complete(folder: Path) -> dict[str, Any]:
    """The language model's configuration in `folder` with the defaults that transformers knows."""
    try:
        from kivi_tvm.hf import models
    except ImportError as error:
        raise UserError(
            f"`--model` {folder} leaves head counts to its model type's defaults, which "
            f"transformers knows; run: {INSTALL_TRANSFORMERS}"
        ) from error
    config: dict[str, Any] = models.read_config(folder).get_text_config(decoder=True).to_dict()
    return config


def _check(made: list[Workload], args: argparse.Namespace) -> None:
    """Raise for every rule of `KiviConfig` that a workload breaks, in the words of the options."""
    found: dict[str, None] = {}
    for workload in made:
        try:
            _ = workload.cfg
        except ValueError as error:
            found |= dict.fromkeys(str(error).split("; `"))
    if not found:
        return
    # The last is a hint to an argument of `KiviConfig` that is no option here.
    text = "; `".join(found).replace(", as value_group_size if not for both", "")
    flags = ["group_size", "residual_length", *(HEAD_FLAGS if args.head_dim is not None else ())]
    for name in flags:
        text = text.replace(f"`{name}`", f"`{_flag(name)}`")
    raise UserError(text if args.model is None else f"`--model` {args.model}: {text}")


def _unknown(flag: str, names: Iterable[str], known: dict[str, Workload]) -> list[str]:
    """A line for every name that is not known, with the nearest ones."""
    found = []
    for name in (each for each in names if each not in known):
        near = difflib.get_close_matches(name, known, 3)
        hint = f" (did you mean {' or '.join(near)}?)" if near else ""
        found.append(f"`{flag}` must be one of {', '.join(known)}, got {name!r}{hint}")
    return found


def _tuned() -> dict[str, Workload]:
    from kivi_tvm.workloads import TUNED

    return TUNED


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"

"""`kivi-tvm eval`: what a cache of few bits does to a model's predictions."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kivi_tvm.cli import COMMANDS
from kivi_tvm.config import KiviConfig
from kivi_tvm.errors import UserError
from kivi_tvm.pictures import check_plot

if TYPE_CHECKING:
    from kivi_tvm.eval.compare import Options, Text


# Options that every cache setting takes.
SHARED = ("group_size", "residual_length", "dtype", "compute")


def add_parser(subparsers: Any) -> None:
    """Register the command and its options."""
    parser = subparsers.add_parser("eval", help=COMMANDS["eval"], description=COMMANDS["eval"])
    parser.add_argument("--model", type=Path, help="folder of a local transformers model")
    parser.add_argument("--text", type=Path, help="UTF-8 file to predict (default: a story)")
    parser.add_argument(
        "--caches",
        nargs="+",
        metavar="NAME",
        help="full, kivi-2, kivi-4, kivi-8, k4v2, k2v4, token-2, token-4 (keys per token, "
        "simulated); default: full kivi-2 kivi-4 k4v2 token-2",
    )
    parser.add_argument(
        "--prompt", type=int, default=256, help="tokens that are read at once first (default: 256)"
    )
    parser.add_argument(
        "--positions", type=int, default=512, help="tokens predicted after them (default: 512)"
    )
    parser.add_argument("--group-size", type=int, default=32, help="default: 32")
    parser.add_argument("--residual-length", type=int, default=128, help="default: 128")
    parser.add_argument("--dtype", default="float32", help="default: float32")
    parser.add_argument(
        "--compute", default="auto", help="mode of our attention, as KiviConfig takes it"
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--plot", type=Path, help="write a plot to this file (needs matplotlib)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Measure every setting, then print the table or the JSON object."""
    # Before transformers is imported: nothing is read from the network.
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    _check(args)
    compare, report = _import()
    if args.plot:
        check_plot(args.plot, "bench")
    options = _options(args)
    names, text = _load(args, options)
    from kivi_tvm.notices import announce

    outcomes = list(compare.compare(text, options, announce))
    if args.json:
        print(json.dumps(report.to_json(outcomes, options, *names)))
    else:
        report.print_table(outcomes, options, *names)
    if args.plot:
        report.plot(outcomes, options, names[0], args.plot)
    return 0


def _check(args: argparse.Namespace) -> None:
    """What can be refused before anything heavy is imported, all of it at once."""
    found = []
    for name in ("prompt", "positions", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            found.append(f"`--{name}` must be at least 1, got {value}")
    shared = {name: getattr(args, name) for name in SHARED}
    try:
        # 256 is divisible by every group size: the model's own heads come later.
        KiviConfig(head_dim=256, num_heads=1, num_kv_heads=1, **shared)
    except ValueError as error:
        found.append(str(error))
    if found:
        raise UserError("; ".join(found))


def _import() -> tuple[Any, Any]:
    """The modules that need transformers, which is missing or too old by the user's doing."""
    from kivi_tvm.demo import weights

    weights.check_readers()
    try:
        from kivi_tvm.eval import compare, report
        from kivi_tvm.hf import models
    except ImportError as error:
        raise UserError(str(error)) from error
    models.quiet()
    return compare, report


def _options(args: argparse.Namespace) -> Options:
    from kivi_tvm.eval.compare import Options
    from kivi_tvm.hf.settings import DEFAULT_SETTINGS, SETTINGS

    caches = tuple(args.caches or DEFAULT_SETTINGS)
    if unknown := [name for name in caches if name not in SETTINGS]:
        raise UserError(f"`--caches` must be among {list(SETTINGS)}, got {unknown}")
    names = ("prompt", "positions", *SHARED)
    return Options(caches, **{name: getattr(args, name) for name in names})


def _load(args: argparse.Namespace, options: Options) -> tuple[tuple[str, str], Text]:
    """Model and text, and their names."""
    import torch

    from kivi_tvm.demo import weights
    from kivi_tvm.demo.prompt import read_text, story
    from kivi_tvm.eval.compare import load
    from kivi_tvm.hf.models import convert_gguf

    text = read_text("--text", args.text) if args.text else story()
    folder = args.model or weights.default_model(convert_gguf)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    model = folder.resolve().name if args.model else weights.MODEL_NAME
    return (model, args.text.name if args.text else "bundled story"), load(folder, text, options)

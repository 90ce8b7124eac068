"""`kivi-tvm demo`: a real model answers from a 2-bit cache on this machine."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kivi_tvm.cli import COMMANDS, USER_ERROR_STATUS
from kivi_tvm.config import BITS, DTYPES, GROUP_SIZES
from kivi_tvm.errors import UserError

if TYPE_CHECKING:
    from kivi_tvm.demo.generate import Result, Settings


def add_parser(subparsers: Any) -> None:
    """Register the command and its options."""
    parser = subparsers.add_parser("demo", help=COMMANDS["demo"], description=COMMANDS["demo"])
    prompt = parser.add_mutually_exclusive_group()
    prompt.add_argument("--prompt", help="text to answer (default: a story and a question)")
    prompt.add_argument("--prompt-file", type=Path, help="read the prompt from a UTF-8 file")
    parser.add_argument("--model", type=Path, help="folder of a local transformers model")
    parser.add_argument("--bits", type=int, default=2, help="bits per code: 2, 4 or 8 (default: 2)")
    parser.add_argument("--group-size", type=int, default=32, help="default: 32")
    parser.add_argument("--residual-length", type=int, default=128, help="default: 128")
    parser.add_argument("--max-new-tokens", type=int, default=64, help="default: 64")
    parser.add_argument("--dtype", default="float32", help="default: float32")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--compare", action="store_true", help="also compare with full precision, token by token"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Generate, then print the table or the JSON object."""
    # Both before transformers is imported: nothing is read from the network, and the converter's
    # progress bar stays away (it does not follow transformers' own setting).
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    from kivi_tvm.demo.weights import MissingPackages

    _check(args)
    try:
        result, settings, model, threads = _generate(args)
    except MissingPackages as error:
        print(f"kivi-tvm: error: {error.what}; run", file=sys.stderr)
        print("\n".join(f"  {command}" for command in error.commands), file=sys.stderr)
        return USER_ERROR_STATUS
    from kivi_tvm.demo import report

    if args.json:
        print(json.dumps(report.to_json(result, settings, model, threads)))
    else:
        report.print_tables(result, settings, model, threads)
    return 0


def _check(args: argparse.Namespace) -> None:
    """What can be refused before anything heavy is imported, all of it at once."""
    found = []
    for name, allowed in (("bits", BITS), ("group_size", GROUP_SIZES), ("dtype", DTYPES)):
        if (value := getattr(args, name)) not in allowed:
            option = name.replace("_", "-")
            found.append(f"`--{option}` must be one of {list(allowed)}, got {value!r}")
    if args.residual_length < 1 or args.residual_length % max(args.group_size, 1):
        found.append(
            f"`--residual-length` must be a positive multiple of --group-size={args.group_size}, "
            f"got {args.residual_length}"
        )
    for name in ("max_new_tokens", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            found.append(f"`--{name.replace('_', '-')}` must be at least 1, got {value}")
    if found:
        raise UserError("; ".join(found))


def _generate(args: argparse.Namespace) -> tuple[Result, Settings, str, int]:
    from kivi_tvm.demo import weights
    from kivi_tvm.demo.prompt import last_paragraph, read_prompt

    prompt = read_prompt(args.prompt, args.prompt_file)
    weights.check_readers()
    folder = args.model or weights.default_model(_convert)
    name = folder.resolve().name if args.model else weights.MODEL_NAME
    import torch

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    generate, settings = _import_generate(), _settings(args)
    _say(f"loading {name}")
    chat = generate.load_chat(folder, prompt, settings)
    cache = generate.new_cache(chat, settings)
    _say(f"reading {chat.tokens.shape[1]:,} tokens, ending in: {last_paragraph(prompt)}")
    result = generate.generate(chat, cache, settings, echo=not args.json)
    if args.compare:
        from dataclasses import replace

        _say("comparing with full precision")
        result = replace(result, agreement=generate.compare(chat, cache, result.tokens))
    return result, settings, name, torch.get_num_threads()


def _settings(args: argparse.Namespace) -> Settings:
    from kivi_tvm.demo.generate import Settings

    names = ("bits", "group_size", "residual_length", "max_new_tokens", "dtype")
    return Settings(**{name: getattr(args, name) for name in names})


def _import_generate() -> Any:
    """The module that needs transformers, quietened; an old version is the user's to correct."""
    try:
        from kivi_tvm.demo import generate
        from kivi_tvm.hf import models
    except ImportError as error:
        raise UserError(str(error)) from error
    models.quiet()
    return generate


def _convert(gguf: Path, folder: Path) -> None:
    _import_generate()
    from kivi_tvm.hf.models import convert_gguf

    convert_gguf(gguf, folder)


def _say(message: str) -> None:
    print(f"kivi-tvm: {message}", file=sys.stderr, flush=True)

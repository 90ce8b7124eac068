"""`kivi-tvm bench generate`: a real model with our cache and with transformers' own."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kivi_tvm.config import BITS, DTYPES, GROUP_SIZES
from kivi_tvm.errors import UserError
from kivi_tvm.outputs import check_file
from kivi_tvm.pictures import check_plot

if TYPE_CHECKING:
    from kivi_tvm.bench.generate import Outcome
    from kivi_tvm.bench.generate_cases import Options

DEFAULT_MODEL = "smollm2-135m"
CHECK_FAILED = 1


def add_parser(benchmarks: Any) -> None:
    """Add `generate` to the benchmarks."""
    parser = benchmarks.add_parser("generate", help="a model's decode speed and memory by cache")
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, help=f"folder of a model (default: {DEFAULT_MODEL})")
    add("--context", type=int, nargs="+", default=[512, 2048, 8192], help="default: 512 2048 8192")
    add("--new-tokens", type=int, default=64, help="timed steps of each cache (default: 64)")
    add("--rounds", type=int, default=16, help="turns that they are made in (default: 16)")
    add(
        "--caches",
        nargs="+",
        metavar="NAME",
        help="dynamic, dynamic-eager (decodes with eager attention), kivi, quanto, hqq "
        "(default: all that are installed)",
    )
    add("--dtype", nargs="+", default=["float32", "bfloat16"], help="default: float32 bfloat16")
    add("--bits", type=int, nargs="+", default=[2, 4], help="of quantized caches (default: 2 4)")
    add("--group-size", type=int, default=32, help="of quantized caches (default: 32)")
    add("--residual-length", type=int, default=128, help="default: 128")
    add("--compute", default="auto", help="mode of our attention (default: auto)")
    add("--threads", type=int, help="CPU threads (default: torch's)")
    add(
        "--memory",
        choices=("peak", "held"),
        default="peak",
        help="peak (default): also the process's peak, one process per cache; held: bytes alone",
    )
    add("--output", type=Path, help="append the records to this JSONL file")
    add("--markdown", type=Path, help="write the tables to this file")
    add("--plot", type=Path, help="write a plot to this file (needs matplotlib)")
    add("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    """Measure every cache; 1 if a result is wrong."""
    # Before transformers is imported: nothing is read from the network.
    os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    _check(args)
    check_file("--output", args.output)
    check_file("--markdown", args.markdown)
    generate = _import()
    options = _options(args)
    if args.plot:
        check_plot(args.plot, "bench")
    from kivi_tvm.notices import announce

    folder, name = _model(args)
    outcome = generate.run(folder, name, options, args.memory == "peak", announce)
    if not outcome.records:
        reasons = "; ".join(sorted({each.reason for each in outcome.left_out}))
        raise UserError(f"`--caches` must have one that can be measured here: {reasons}")
    _write(args, outcome)
    return 0 if all(each.passed for each in outcome.records) else CHECK_FAILED


def _write(args: argparse.Namespace, outcome: Outcome) -> None:
    from dataclasses import asdict

    from kivi_tvm.bench import generate_report, record
    from kivi_tvm.cli.bench import _command

    if args.json:
        plain = [each.to_dict() for each in outcome.records]
        left_out = [asdict(each) for each in outcome.left_out]
        print(json.dumps({"benchmark": "generate", "records": plain, "left_out": left_out}))
    else:
        generate_report.print_outcome(outcome)
    if args.output:
        record.append_jsonl(args.output, outcome.records)
    if args.markdown:
        generate_report.write_markdown(args.markdown, outcome, _command(args))
    if args.plot:
        generate_report.plot(outcome.records, args.plot)


def _check(args: argparse.Namespace) -> None:
    """What can be refused before anything heavy is imported, all of it at once."""
    found = []
    for name, allowed in (("bits", BITS), ("group_size", GROUP_SIZES), ("dtype", DTYPES)):
        value = getattr(args, name)
        values = value if isinstance(value, list) else [value]
        if unknown := [each for each in values if each not in allowed]:
            option = name.replace("_", "-")
            found.append(f"`--{option}` must be among {list(allowed)}, got {unknown}")
    if args.residual_length < 1 or args.residual_length % max(args.group_size, 1):
        found.append(
            f"`--residual-length` must be a positive multiple of --group-size={args.group_size}, "
            f"got {args.residual_length}"
        )
    for name, values in (("new-tokens", [args.new_tokens]), ("context", args.context)):
        if min(values) < 1:
            found.append(f"`--{name}` must be at least 1, got {min(values)}")
    if found:
        raise UserError("; ".join(found))


def _import() -> Any:
    """The module that needs transformers, which is missing or too old by the user's doing."""
    from kivi_tvm.demo import weights

    weights.check_readers()
    try:
        from kivi_tvm.bench import generate
        from kivi_tvm.hf import models
    except ImportError as error:
        raise UserError(str(error)) from error
    models.quiet()
    return generate


def _options(args: argparse.Namespace) -> Options:
    from kivi_tvm.bench.generate_cases import FAMILIES, Options

    caches = args.caches or FAMILIES
    if unknown := [name for name in caches if name not in FAMILIES]:
        raise UserError(f"`--caches` must be among {list(FAMILIES)}, got {unknown}")
    return Options(
        context=tuple(dict.fromkeys(args.context)),
        new_tokens=args.new_tokens,
        rounds=min(args.rounds, args.new_tokens),
        caches=tuple(dict.fromkeys(caches)),
        dtypes=tuple(dict.fromkeys(args.dtype)),
        bits=tuple(dict.fromkeys(args.bits)),
        group_size=args.group_size,
        residual_length=args.residual_length,
        compute=args.compute,
    )


def _model(args: argparse.Namespace) -> tuple[Path, str]:
    """The model's folder and name."""
    from kivi_tvm.demo import weights
    from kivi_tvm.hf.models import convert_gguf

    if args.model == DEFAULT_MODEL:
        return weights.default_model(convert_gguf), weights.MODEL_NAME
    folder = Path(args.model)
    return folder, folder.resolve().name

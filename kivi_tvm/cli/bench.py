"""`kivi-tvm bench`: attention against peers, call overhead, and operations on a cache."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kivi_tvm.cli import COMMANDS, bench_attention, bench_generate
from kivi_tvm.errors import UserError
from kivi_tvm.outputs import check_file

if TYPE_CHECKING:
    from kivi_tvm.bench.cache import CacheRecord
    from kivi_tvm.workloads import Workload

CHECK_FAILED = 1


def add_parser(subparsers: Any) -> None:
    """Add `bench` and its benchmarks to the command line."""
    parser = subparsers.add_parser("bench", help=COMMANDS["bench"], description=COMMANDS["bench"])
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    attention = benchmarks.add_parser("attention", help=bench_attention.SUMMARY)
    overhead = benchmarks.add_parser("overhead", help="cost of a decode call besides its kernels")
    cache = benchmarks.add_parser("cache", help="bytes and time of every operation on a cache")
    bench_generate.add_parser(benchmarks)
    bench_attention.add_options(attention)
    _add_cache_options(cache)
    for each in (attention, overhead, cache):
        each.add_argument("--model", default="llama3-8b", help="geometry (default: %(default)s)")
        each.add_argument("--residual-length", type=int, default=128, help="default: 128")
        each.add_argument("--dtype", default="float16", help="default: float16")
        each.add_argument("--target", default="native", help="default: native")
        each.add_argument("--threads", type=int, help="threads of both sides (default: torch's)")
        each.add_argument("--rounds", type=int, default=10, help="default: 10")
        each.add_argument("--json", action="store_true", help="print one JSON object")
    for each in (overhead, cache):
        each.add_argument("--bits", type=int, default=2, help="bits per code (default: 2)")
        each.add_argument("--group-size", type=int, default=32, help="default: 32")
        each.add_argument("--compute", default="auto", help="mode of attention (default: auto)")


def _add_cache_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[512, 4096, 32768], help="default: 512 4096 32768"
    )
    parser.add_argument("--batch-size", type=int, default=4, help="default: 4")
    parser.add_argument("--rollback", type=int, help="default: the residual length")
    parser.add_argument("--output", type=Path, help="append the records to this JSONL file")
    parser.add_argument("--markdown", type=Path, help="write the tables to this file")


def run(args: argparse.Namespace) -> int:
    """Run the benchmark; 1 if a result is wrong or the overhead above its limit."""
    import torch

    for name in ("rounds", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"`--{name}` must be at least 1, got {value}")
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads or threads)
    try:
        return _BENCHMARKS[args.benchmark](args)
    finally:
        torch.set_num_threads(threads)


def _workload(args: argparse.Namespace) -> Workload:
    """The workload of the options that most benchmarks share, checked as a whole."""
    options = {
        "key_bits": args.bits,
        "value_bits": args.bits,
        "group_size": args.group_size,
        "residual_length": args.residual_length,
        "dtype": args.dtype,
        "compute": args.compute,
    }
    return _changed(_model(args), options)


def _model(args: argparse.Namespace) -> Workload:
    from kivi_tvm.workloads import MODELS

    if args.model not in MODELS:
        raise UserError(f"`--model` must be one of {list(MODELS)}, got {args.model!r}")
    return MODELS[args.model]


def _changed(workload: Workload, options: dict[str, Any]) -> Workload:
    """`workload` with other fields; a combination that does not fit is the user's error."""
    try:
        changed = replace(workload, **options)
        _ = changed.cfg
    except ValueError as error:
        raise UserError(str(error)) from error
    return changed


def _attention(args: argparse.Namespace) -> int:
    base = _changed(
        _model(args),
        {"residual_length": args.residual_length, "dtype": args.dtype, "data": args.data},
    )
    return 0 if bench_attention.run(args, base) else CHECK_FAILED


def _overhead(args: argparse.Namespace) -> int:
    from kivi_tvm.bench import overhead, report

    result = overhead.run(_workload(args), args.rounds, args.target)
    if args.json:
        print(json.dumps({"benchmark": "overhead"} | result.to_dict()))
    else:
        report.print_overhead(result)
    return 0 if result.passed else CHECK_FAILED


def _cache(args: argparse.Namespace) -> int:
    from kivi_tvm.bench import cache, record, report

    check_file("--output", args.output)
    check_file("--markdown", args.markdown)
    base = _changed(_workload(args), {"batch_size": args.batch_size})
    workloads = [_changed(base, {"tokens": tokens}) for tokens in args.tokens]
    records: list[CacheRecord] = []
    for workload in workloads:
        found = cache.run(workload, args.rollback, args.rounds, args.target)
        if not args.json:
            report.print_cache(found)
        records += found
    if args.output:
        record.append_jsonl(args.output, records)
    if args.markdown:
        report.write_cache(args.markdown, records, _command(args))
    if args.json:
        plain = [each.to_dict() for each in records]
        print(json.dumps({"benchmark": "cache", "records": plain}))
    return 0 if all(each.passed for each in records) else CHECK_FAILED


def _command(args: argparse.Namespace) -> str:
    """The command line that gives the same tables."""
    own = ("command", "benchmark", "output", "markdown", "json")
    words = ["kivi-tvm", "bench", args.benchmark]
    for name, value in vars(args).items():
        if name not in own and value is not None:
            words.append(f"--{name.replace('_', '-')}")
            words += map(str, value) if isinstance(value, list) else [str(value)]
    return " ".join(words)


_BENCHMARKS = {
    "attention": _attention,
    "overhead": _overhead,
    "cache": _cache,
    "generate": bench_generate.run,
}

"""`kivi-tvm bench attention`: decode attention in every compute mode beside its peers."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

from kivi_tvm.outputs import check_file

if TYPE_CHECKING:
    from kivi_tvm.bench.accuracy import Accuracy
    from kivi_tvm.bench.record import PlainData, Record
    from kivi_tvm.workloads import Workload

SUMMARY = "decode attention beside torch, vLLM, ONNX Runtime and OpenVINO"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that no other benchmark has; lists are swept, all with all."""
    sweeps = {
        "--tokens": ([4096, 32768], "tokens in the cache (default: 4096 32768)"),
        "--batch-size": ([1], "rows (default: 1)"),
        "--queries-per-kv": ([], "query heads per KV head (default: the model's)"),
        "--head-dim": ([], "channels per head (default: the model's)"),
        "--bits": ([2], "bits per code (default: 2)"),
        "--group-size": ([32], "default: 32"),
    }
    for flag, (default, text) in sweeps.items():
        parser.add_argument(flag, type=int, nargs="+", default=default, help=text)
    parser.add_argument(
        "--ragged",
        action="store_true",
        help="rows of a batch between 100 tokens and --tokens, the same ones in every run",
    )
    parser.add_argument("--data", default="normal", help="kind of inputs (default: normal)")
    parser.add_argument(
        "--compute",
        nargs="+",
        help="modes of attention: auto, float, int8x2, int8 (default: all that the bits allow)",
    )
    parser.add_argument(
        "--state",
        nargs="+",
        choices=("cold", "warm"),
        default=["cold"],
        help="cold (default): caches that together exceed L3, in turn; warm: one cache",
    )
    parser.add_argument(
        "--peers", nargs="*", help="names of peers (default: those installed, none with float16)"
    )
    parser.add_argument("--output", type=Path, help="append the records to this JSONL file")
    parser.add_argument("--plot", type=Path, help="write a plot to this file (needs matplotlib)")


def run(args: argparse.Namespace, base: Workload) -> bool:
    """Run the sweep that starts from `base`; whether every provider was right."""
    from kivi_tvm.bench import attention_plot, ours, peers, record, sweep
    from kivi_tvm.pictures import check_plot

    check_file("--output", args.output)
    if args.plot:
        check_plot(args.plot, "bench")
    axes = sweep.Axes(**{name: getattr(args, name) for name in sweep.Axes.__slots__})
    workloads = sweep.workloads(base, axes, args.ragged)
    peers.check(args.peers)
    for workload in workloads:
        ours.modes(workload, args.compute, args.target)
    errors = _errors(args, workloads)
    records, left_out = _times(args, workloads)
    everything: list[PlainData] = [*errors, *records]
    if args.output:
        record.append_jsonl(args.output, everything)
    if args.plot:
        attention_plot.plot_attention(records, args.plot)
    if args.json:
        plain = {
            "benchmark": "attention",
            "records": [each.to_dict() for each in records],
            "errors": [each.to_dict() for each in errors],
            "left_out": left_out,
        }
        print(json.dumps(plain))
    return all(each.passed for each in records)


def _errors(args: argparse.Namespace, workloads: list[Workload]) -> list[Accuracy]:
    """Errors of the compute modes, once for workloads that differ in length and batch only."""
    from kivi_tvm.bench import accuracy, attention_report

    found: list[Accuracy] = []
    for workload in dict.fromkeys(map(accuracy.shortened, workloads)):
        measured = accuracy.measure(workload, args.compute, args.target)
        if not args.json:
            attention_report.print_accuracy(measured)
        found += measured
    return found


def _times(
    args: argparse.Namespace, workloads: list[Workload]
) -> tuple[list[Record], dict[str, str]]:
    from kivi_tvm.bench import attention, attention_report

    records: list[Record] = []
    left_out: dict[str, str] = {}
    for workload in workloads:
        for state in args.state:
            result = attention.run(
                workload, state, args.peers, args.compute, args.rounds, args.target
            )
            if not args.json:
                attention_report.print_attention(result.records, result.left_out)
            records += result.records
            left_out |= result.left_out
    return records, left_out

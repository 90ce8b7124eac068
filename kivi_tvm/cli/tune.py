"""`kivi-tvm tune`: search for faster schedules on a device, and keep what is found."""

from __future__ import annotations

import argparse
import json
import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kivi_tvm.cli import COMMANDS, INTERRUPTED_STATUS
from kivi_tvm.cli.geometry import add_geometry_options, workloads
from kivi_tvm.errors import UserError
from kivi_tvm.host import available_processors, find_cxx
from kivi_tvm.notices import announce
from kivi_tvm.outputs import check_directory

if TYPE_CHECKING:
    from tvm.target import Target

    from kivi_tvm.tune.builder import Builder
    from kivi_tvm.tune.candidate import Task
    from kivi_tvm.tune.outcome import Options, Result
    from kivi_tvm.tune.runner import Runner
    from kivi_tvm.tune.start import Place
    from kivi_tvm.workloads import Workload

DEFAULT_TRIALS = 256
NOTHING_WORKS = 1
RUNNERS = ("local", "rpc")
# The options that an action reads; and those that `--emit`, which reads most, does not.
READS = {
    "list": {"log_dir", "json"},
    "prune": {"log_dir", "json"},
    "collect": {"log_dir", "json", "plot"},
}
NOT_EMITTED = ("plot", "time_budget", "threads", "cost_model", "tracker", "tracker_key", "runner")
SECONDS = {"": 1, "s": 1, "m": 60, "min": 60, "h": 3600}


def add_parser(subparsers: Any) -> None:
    """Add `tune` to the command line."""
    parser = subparsers.add_parser("tune", help=COMMANDS["tune"], description=COMMANDS["tune"])
    parser.add_argument("--target", default="native", help="default: native, this machine's CPU")
    parser.add_argument("--ops", nargs="+", metavar="NAME", help="functions (default: all)")
    parser.add_argument(
        "--trials",
        type=int,
        default=DEFAULT_TRIALS,
        help="of all functions together, at least half on attend; every function's default is one, "
        "and those of earlier runs count (default: %(default)s)",
    )
    parser.add_argument(
        "--time-budget",
        metavar="TIME",
        help="such as 90s, 10m or 1h; what is being measured then is finished",
    )
    parser.add_argument("--cost-model", help="xgb or random (default: xgb if installed)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--threads", type=int, help="of the kernels (default: every processor)")
    parser.add_argument("--log-dir", type=Path, help="of the records (default: the user's)")
    parser.add_argument("--plot", type=Path, help="write tuning curves to this file")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    _add_runner_options(parser)
    add_geometry_options(parser)
    actions = parser.add_argument_group("instead of tuning").add_mutually_exclusive_group()
    actions.add_argument("--list", action="store_true", help="show all records")
    actions.add_argument(
        "--emit", type=Path, metavar="DIR", help="write candidates for a device with batch jobs"
    )
    actions.add_argument(
        "--collect", type=Path, metavar="DIR", help="make records of what was measured in DIR"
    )
    actions.add_argument(
        "--prune",
        action="store_true",
        help="remove records whose schedule is another one now, files that were set aside as "
        "damaged before, built candidates",
    )
    parser.set_defaults(default_of=parser.get_default)


def _add_runner_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("where candidates run")
    group.add_argument("--runner", choices=RUNNERS, default="local", help="default: local")
    group.add_argument("--tracker", metavar="HOST:PORT", help="of the RPC tracker")
    group.add_argument("--tracker-key", metavar="KEY", help="what its servers are registered as")


def run(args: argparse.Namespace) -> int:
    """Tune, list or prune; 130 after Ctrl-C, 1 if no function has a result."""
    from kivi_tvm import database

    root = (args.log_dir or database.user_dir()).expanduser().absolute()
    if unread := _unread(args):
        raise UserError(unread)
    if args.list or args.prune:
        if args.log_dir and not root.is_dir():
            raise UserError(f"`--log-dir` must be a directory that exists, got {root}")
        from kivi_tvm.cli import tune_records

        action = tune_records.show if args.list else tune_records.prune
        return action(root, args.json)
    budget = _check(args, root)
    if args.collect:
        return _collect(args, root)
    return _tune(args, root, workloads(args), budget)


def _unread(args: argparse.Namespace) -> str:
    """What is wrong if there are options that the action does not read."""
    action = next((name for name in (*READS, "emit") if getattr(args, name)), None)
    if action is None:
        return ""
    given = {name for name, x in vars(args).items() if x != args.default_of(name)}
    given -= {action, "command", "default_of"}
    unread = given - READS[action] if action in READS else given.intersection(NOT_EMITTED)
    return "; ".join(f"`--{action}` takes no --{x.replace('_', '-')}" for x in sorted(unread))


def _check(args: argparse.Namespace, root: Path) -> float | None:
    """Refuse what can be refused before anything heavy is imported; the time budget."""
    found = []
    for name in ("trials", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            found.append(f"`--{name}` must be at least 1, got {value}")
    if args.seed < 0:
        found.append(f"`--seed` must not be negative, got {args.seed}")
    budget = _seconds(args.time_budget, found)
    remote = args.tracker is not None or args.tracker_key is not None
    if args.runner == "rpc" and (args.tracker is None or args.tracker_key is None):
        found.append("`--runner rpc` needs --tracker HOST:PORT and --tracker-key KEY")
    elif args.runner != "rpc" and remote:
        found.append("--tracker and --tracker-key are for `--runner rpc`")
    elif args.runner == "rpc":
        from kivi_tvm.tune.rpc_client import address

        try:
            address(args.tracker)
        except UserError as error:
            found.append(str(error))
    if found:
        raise UserError("; ".join(found))
    if args.plot:
        from kivi_tvm.pictures import check_plot

        check_plot(args.plot, "tune")
    check_directory("--log-dir", root)
    return budget


def _seconds(text: str | None, found: list[str]) -> float | None:
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|m|min|h|)", text.strip())
    seconds = float(match[1]) * SECONDS[match[2]] if match else 0.0
    if seconds <= 0:
        found.append(f"`--time-budget` must be a time such as 90s, 10m or 1h, got {text!r}")
    return seconds


def _tune(args: argparse.Namespace, root: Path, found: list[Workload], budget: float | None) -> int:
    from kivi_tvm import targets
    from kivi_tvm.host import commit
    from kivi_tvm.tune import session, start
    from kivi_tvm.tune.builder import Builder
    from kivi_tvm.tune.cost import check_cost_model, default_cost_model
    from kivi_tvm.tune.outcome import BATCH, Options
    from kivi_tvm.tune.progress import Display

    model = args.cost_model or default_cost_model()
    check_cost_model(model)
    target = targets.resolve(args.target)
    if target.kind.name == "cuda":
        _check_cuda(args, target)
    tasks = _tasks(args.ops, [_with_mode(workload, target) for workload in found], target)
    if find_cxx() is None:
        raise UserError("`tune` needs a C++ compiler to link candidates (apt-get install g++)")
    # All processors compile meanwhile, where none of them is what is measured.
    batch = max(BATCH, available_processors()) if target.kind.name == "cuda" else BATCH
    options = Options(args.trials, budget, args.seed, model, batch)
    if args.emit:
        from kivi_tvm.cli import tune_emit

        return tune_emit.emit(args, root, tasks, target, options)
    place = start.Place(root, target)
    with ExitStack() as stack:
        builder = stack.enter_context(Builder(target, place.built))
        runner = stack.enter_context(_runner(args, place, builder))
        display = stack.enter_context(Display())
        tools = start.tools(place, options, (builder, runner), display, commit(), stack)
        result = session.tune(tasks, options, tools)
    return _report(args, result, options, place, runner)


def _check_cuda(args: argparse.Namespace, target: Target) -> None:
    """Refuse what is for CPUs alone, and to measure on a GPU that is not here."""
    from kivi_tvm import targets

    if args.runner == "rpc":
        raise UserError(
            "`--runner rpc` measures on CPUs; for a GPU elsewhere, --emit candidates and measure "
            "them there"
        )
    if args.threads is not None:
        raise UserError(f"`--threads` is for CPUs, got {args.threads}")
    if not args.emit and not targets.is_native(targets.identity(target)):
        raise UserError(
            f"`--runner local` needs a GPU of {target.attrs['arch']} for this `--target`, and "
            "there is none here; --emit candidates and measure them on one"
        )


def _collect(args: argparse.Namespace, root: Path) -> int:
    from kivi_tvm.tune import start
    from kivi_tvm.tune.collect import collect

    done = collect(args.collect, root)
    return _report(args, done.result, done.options, start.Place(root, done.target), done.runner)


def _runner(args: argparse.Namespace, place: Place, builder: Builder) -> Runner:
    from kivi_tvm import targets
    from kivi_tvm.tune import start

    if args.runner == "rpc":
        return start.rpc_runner(place, args.tracker, args.tracker_key, args.threads)
    if not targets.is_native(targets.identity(place.target)):
        announce(
            f"`--target` is not this processor: records of {targets.slug(place.target)} will be "
            'marked "estimated", by the times of this one'
        )
    return start.local_runner(place, builder, args.threads)


def _with_mode(workload: Workload, target: Target) -> Workload:
    """`workload` in the compute mode of builds for `target`; its name tells it if not "float"."""
    from kivi_tvm import targets

    mode = targets.kernel_key(workload.cfg, target).compute
    return workload if mode == "float" else replace(workload, compute=mode)


def _tasks(names: list[str] | None, found: list[Workload], target: Target) -> list[Task]:
    """Each function of each kernel key once, `attend` first."""
    from kivi_tvm.compile import functions
    from kivi_tvm.tune.candidate import Task
    from kivi_tvm.tune.cases import make_case
    from kivi_tvm.tune.plan import MAIN_FUNCTION

    by_key: dict[Any, Workload] = {}
    for workload in found:
        first = by_key.setdefault(workload.cfg.kernel_key(), workload)
        if first is not workload:
            announce(f"{workload.id} runs the kernels of {first.id}, on which they are tuned")
    of_key = {key: functions(key, target) for key in by_key}
    known = {name: each for its in of_key.values() for name, each in its.items()}
    if unknown := [name for name in names or () if name not in known]:
        raise UserError(f"`--ops` must be among {sorted(known)}, got {unknown}")
    wanted = sorted(
        (name for name in known if not names or name in names),
        key=lambda name: name != MAIN_FUNCTION,
    )
    tasks = [
        Task(name, workload)
        for name in wanted
        for key, workload in by_key.items()
        if name in of_key[key]
    ]
    try:
        # The only operator that has nothing to do on a short cache.
        for task in {x.workload: x for x in tasks if known[x.function][0] == "attend"}.values():
            make_case(task)
    except ValueError as error:
        raise UserError(f"`--tokens` is too small: {error}") from error
    return tasks


def _report(
    args: argparse.Namespace, result: Result, options: Options, place: Place, runner: Runner
) -> int:
    from kivi_tvm import targets
    from kivi_tvm.tune import plot, report
    from kivi_tvm.tune.session import INTERRUPTED

    where = str(place.records)
    if args.plot:
        title = f"{targets.slug(place.target)}, {runner.device.name}"
        plot.plot(result.outcomes, title, args.plot)
    if args.json:
        target = targets.identity(place.target)
        print(json.dumps(report.to_json(result, options, target, runner, where)))
    else:
        report.print_table(result, where)
    if result.stopped == INTERRUPTED:
        return INTERRUPTED_STATUS
    return 0 if any(each.error is None for each in result.outcomes) else NOTHING_WORKS

"""`kivi-tvm tune --emit`: candidates for a device that only runs batch jobs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tvm.target import Target

    from kivi_tvm.tune.candidate import Task
    from kivi_tvm.tune.outcome import Options


def emit(
    args: argparse.Namespace, root: Path, tasks: list[Task], target: Target, options: Options
) -> int:
    """Write the folder and say what to do with it."""
    from kivi_tvm.host import commit
    from kivi_tvm.notices import announce
    from kivi_tvm.tune import publish
    from kivi_tvm.tune.emit import emit as write

    def seeds(task: Task) -> Iterator[Mapping[str, int | str]]:
        return publish.seeds(root, target, task)

    folder = write(tasks, target, args.emit, options, seeds, announce, commit())
    candidates = sum(len(each.candidates) for each in folder.tasks)
    compiled = sum(e.library is not None for each in folder.tasks for e in each.candidates)
    if args.json:
        facts = {"command": "tune --emit", "folder": str(args.emit)}
        print(json.dumps({**facts, "candidates": candidates, "compiled": compiled}))
        return 0
    print(f"{compiled} of {candidates} candidates in {args.emit}; on the device, there:")
    print("    python measure.py batch .")
    print(f"then, with its results.jsonl: kivi-tvm tune --collect {args.emit}")
    return 0

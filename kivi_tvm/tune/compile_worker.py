"""A process that compiles candidates: one JSON request a line on stdin, answers on stdout.

A request is `{"function", "workload", "decisions", "schedule_hash", "target", "path"}`, an answer
`{"seconds"}` or `{"failure": {"kind", "message"}}`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

END_CHARS = 300  # of both ends of a compiler's message
NICENESS = 10  # measuring and whoever else uses the machine come first


def main() -> None:
    """Answer requests until stdin ends; what the compiler prints goes to stderr."""
    os.nice(NICENESS)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    send({"ready": True})
    for line in sys.stdin:
        send(_answer(json.loads(line)))


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    start = time.perf_counter()
    kind = "schedule"
    try:
        module, target = _scheduled(request)
        kind = "build"
        _export(module, target, Path(request["path"]))
    except Exception as error:
        return {"failure": {"kind": kind, "message": f"{type(error).__name__}: {_ends(error)}"}}
    return {"seconds": time.perf_counter() - start}


def _ends(error: Exception) -> str:
    """How a message begins and ends: a linker's reason is above its command, TVM's at the end."""
    text = str(error).strip()
    return text if len(text) <= 2 * END_CHARS else f"{text[:END_CHARS]} ... {text[-END_CHARS:]}"


def _scheduled(request: dict[str, Any]) -> tuple[Any, Any]:
    """The module of one scheduled function, and its target."""
    from kivi_tvm import compile, targets
    from kivi_tvm.workloads import Workload

    lengths = request["workload"].pop("lengths")
    workload = Workload(**request["workload"], lengths=tuple(lengths) if lengths else None)
    target = targets.resolve(request["target"])
    name = request["function"]
    schedule = compile.scheduled_function(
        name, workload.cfg.kernel_key(), target, request["decisions"]
    )
    found = compile.schedule_hash(name, schedule)
    if found != request["schedule_hash"]:
        raise ValueError(
            f"`schedule_hash` must be that of the scheduled function, {found}, "
            f"got {request['schedule_hash']}"
        )
    return schedule.mod, target


def _export(module: Any, target: Any, path: Path) -> None:

    from kivi_tvm.host import find_cxx
    from kivi_tvm.lowering import compile_module

    part = path.with_name(f".{path.stem}.{os.getpid()}.so")
    try:
        compile_module(module, target, for_elsewhere=True).export_library(str(part), cc=find_cxx())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


if __name__ == "__main__":
    main()

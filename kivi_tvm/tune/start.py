"""What a session on this machine's disk and devices works with."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tvm.target import Target

from kivi_tvm import targets
from kivi_tvm.cpu import missing_cpu_flags
from kivi_tvm.errors import UserError
from kivi_tvm.manifest import current_versions
from kivi_tvm.tune import publish
from kivi_tvm.tune.builder import Builder
from kivi_tvm.tune.cases import make_case
from kivi_tvm.tune.journal import Journals
from kivi_tvm.tune.local import LocalRunner
from kivi_tvm.tune.outcome import Observer, Options
from kivi_tvm.tune.runner import Runner
from kivi_tvm.tune.session import Tools
from kivi_tvm.tune.space import Space, explorer


@dataclass(frozen=True, slots=True)
class Place:
    """Where the records of a target are, and what tuning leaves beside them."""

    root: Path
    target: Target

    @property
    def records(self) -> Path:
        """The target's directory of the database."""
        return self.root / targets.slug(self.target)

    @property
    def scratch(self) -> Path:
        """Journals, and below it built candidates."""
        return self.root / ".scratch" / targets.slug(self.target)

    @property
    def built(self) -> Path:
        """Candidates' libraries: the same schedule is another program under another TVM."""
        return self.scratch / f"built-tvm-{current_versions()['tvm']}"


def local_runner(place: Place, builder: Builder, threads: int | None) -> Runner:
    """What measures here; on a CPU nothing is compiled meanwhile.

    Raises
    ------
    UserError
        Its processor lacks instructions of the target.
    """
    if place.target.kind.name == "cuda":
        return LocalRunner(device="cuda")
    missing = missing_cpu_flags(targets.required_cpu_flags(place.target))
    if missing:
        raise UserError(
            f"`--runner local` needs a processor with {', '.join(missing)} for this `--target`; "
            "measure on one through `--runner rpc`"
        )
    return LocalRunner(builder.paused, threads)


def rpc_runner(place: Place, tracker: str, key: str, threads: int | None) -> Runner:
    """The servers of a tracker `HOST:PORT`."""
    from kivi_tvm.tune.rpc import RpcRunner
    from kivi_tvm.tune.rpc_client import address

    return RpcRunner(*address(tracker), key, place.target, threads)


def tools(
    place: Place,
    options: Options,
    machines: tuple[Builder, Runner],
    observer: Observer,
    commit: str | None,
    stack: ExitStack,
) -> Tools:
    """The tools of a session; `stack` closes the journals."""
    builder, runner = machines
    facts = publish.facts(place.target, runner)
    return Tools(
        builder=builder,
        runner=runner,
        journals=stack.enter_context(Journals(place.scratch, facts, observer.say)),
        observer=observer,
        space=lambda task: Space(explorer(task.function, task.key, place.target)),
        seeds=lambda task: publish.seeds(place.root, place.target, task),
        publish=publish.publisher(place.root, place.target, options, runner, commit),
        nbytes=lambda task: make_case(task).nbytes,
    )

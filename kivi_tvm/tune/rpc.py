"""Measure candidates on the servers of a TVM RPC tracker, on all that are free at once."""

from __future__ import annotations

import queue
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self

from tvm.target import Target

from kivi_tvm import targets
from kivi_tvm.errors import UserError
from kivi_tvm.tune.candidate import Built, Failure, Measured, Task
from kivi_tvm.tune.cases import make_case
from kivi_tvm.tune.guard import Guard
from kivi_tvm.tune.rpc_client import Client, server_keys
from kivi_tvm.tune.runner import DeviceInfo

# For how long a fleet may be without a server: one that restarts imports TVM first.
REAPPEAR_S = 20.0
ATTEMPTS = 2
Json = dict[str, Any]


class RpcRunner:
    """Checks and times candidates on servers of an RPC tracker.

    Every server has a client process here, and every candidate a session of its own, which the
    server runs in a process of its own. Who else asks the tracker for servers gets them in turn.

    Parameters
    ----------
    host, port
        Of the tracker.
    key : str
        What the servers were started with; all of them must be the same kind of CPU.
    target : Target
        Of the servers, and of the candidates.
    threads : int, optional
        Of the kernels; by default what the servers use.
    timeout_s : float
        For a candidate, the wait for a free server included.
    session_timeout : float
        After which a server ends a candidate's session.

    Raises
    ------
    UserError
        No tracker answers, or it has no server of that key.
    """

    method = "rpc"
    in_turn = False  # there may be several servers

    def __init__(
        self,
        host: str,
        port: int,
        key: str,
        target: Target,
        threads: int | None = None,
        timeout_s: float = 300.0,
        session_timeout: float = 60.0,
    ) -> None:
        self._host, self._port, self._key, self._target = host, port, key, target
        self._timeout_s, self._session_timeout = timeout_s, session_timeout
        count = self._require_servers(0.0)
        self._folder = Path(tempfile.mkdtemp(prefix="kivi-tvm-cases-"))
        self._cases: dict[Task, Path] = {}
        options = ["--threads", str(threads or 0)]
        options += ["--session-timeout", str(session_timeout)]
        command = [sys.executable, "-P", "-m", "kivi_tvm.tune.rpc_worker"]
        self._guard = Guard()
        self._guard.add_folder(self._folder)
        self._clients: queue.SimpleQueue[Client] = queue.SimpleQueue()
        self._all = [
            Client([*command, host, str(port), key, *options], self._guard) for _ in range(count)
        ]
        for client in self._all:
            self._clients.put(client)
        self._pool = ThreadPoolExecutor(count, "rpc")
        self.device = self._ask_device()

    def measure(self, built: Sequence[Built]) -> list[Measured]:
        """Check and time candidates, as many at once as there are servers; the order is kept.

        Raises
        ------
        UserError
            No server is left.
        """
        return self._run(built, time=True)

    def compare(self, built: Sequence[Built], rounds: int) -> list[Measured]:
        """Check candidates of one task, then time them in turn on one server.

        Raises
        ------
        ValueError
            The candidates are of several tasks, or `rounds` is less than 1.
        UserError
            No server is left.
        """
        if len({each.candidate.task.id for each in built}) > 1:
            raise ValueError("`built` must be candidates of one task, got several")
        if rounds < 1:
            raise ValueError(f"`rounds` must be at least 1, got {rounds}")
        found = self._run(built, time=False)
        while left := [i for i, each in enumerate(found) if each.failure is None]:
            request = {
                "do": "compare",
                "libraries": [str(built[i].library) for i in left],
                "rounds": rounds,
            }
            seconds = self._timeout_s * (1 + rounds)
            answer = self._ask(request, self._case(built[0].candidate.task), seconds)
            if "failure" not in answer:
                for i, times in zip(left, answer["times_us"]):
                    found[i] = _measured(built[i], _error_of(found[i]) | {"times_us": times})
                return found
            if "culprit" not in answer:
                raise self._unusable(answer)
            culprit = left[answer["culprit"]]
            found[culprit] = _measured(built[culprit], answer)
        return found

    def read_gb_per_s(self) -> float:
        """Rate at which a server reads its memory, measured now."""
        target = targets.as_dict(self._target)
        request = {"do": "bandwidth", "target": target, "folder": str(self._folder)}
        return float(self._must(request)["gb_per_s"])

    def close(self) -> None:
        """End the clients and remove the case files; servers go on."""
        for client in self._all:
            client.close()
        self._guard.close()
        self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _run(self, built: Sequence[Built], time: bool) -> list[Measured]:
        cases = [None if b.library is None else self._case(b.candidate.task) for b in built]

        def one(each: Built, case: Path | None) -> Measured:
            if each.failure is not None or case is None:
                missing = Failure("build", "there is no library")
                return Measured(each.candidate, failure=each.failure or missing)
            request = {"do": "measure", "library": str(each.library), "time": time}
            return _measured(each, self._ask(request, case, self._timeout_s))

        return list(self._pool.map(one, built, cases))

    def _ask(self, request: Json, case: Path | None, seconds: float) -> Json:
        """An answer of whatever server is free; of another one if the first is lost meanwhile."""
        client = self._clients.get()
        try:
            for _ in range(ATTEMPTS):
                answer = client.ask(request, case, seconds)
                if not answer.get("lost"):
                    break
                self._require_servers(REAPPEAR_S)
            return answer
        finally:
            self._clients.put(client)

    def _must(self, request: Json) -> Json:
        answer = self._ask(request, None, self._timeout_s)
        if "failure" in answer:
            raise self._unusable(answer)
        return answer

    def _unusable(self, answer: Json) -> UserError:
        return UserError(
            f"the servers of key {self._key!r} at {self._host}:{self._port} cannot be used: "
            f"{answer['failure']['message']}"
        )

    def _ask_device(self) -> DeviceInfo:
        try:
            found = self._must({"do": "device"})
        except BaseException:
            self.close()
            raise
        # Not the address: the same boards may be found elsewhere tomorrow.
        name = found["name"] or self._key
        return DeviceInfo(name, "cpu", found["threads"])

    def _case(self, task: Task) -> Path:
        if task not in self._cases:
            path = self._folder / f"{len(self._cases)}.pt"
            make_case(task).save(path)
            self._cases[task] = path
        return self._cases[task]

    def _require_servers(self, patience_s: float) -> int:
        """How many servers there are, now or after a while."""
        end = time.monotonic() + patience_s
        while True:
            keys = server_keys(self._host, self._port)
            if count := keys.count(self._key):
                return count
            if time.monotonic() >= end:
                others = f"only {sorted(set(keys))}" if keys else "none at all"
                raise UserError(
                    f"the tracker {self._host}:{self._port} must have a server of "
                    f"--tracker-key={self._key!r}, got {others}"
                )
            time.sleep(0.5)


def _measured(built: Built, answer: Json) -> Measured:
    if "failure" in answer:
        return Measured(built.candidate, failure=Failure(**answer["failure"]))
    times = tuple(answer.get("times_us", ()))
    return Measured(built.candidate, times, answer["max_error"], answer["error_limit"])


def _error_of(found: Measured) -> Json:
    return {"max_error": found.max_error, "error_limit": found.error_limit}

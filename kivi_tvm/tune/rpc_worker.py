"""A process that measures candidates on servers of an RPC tracker, one session per candidate.

Requests and answers are lines as of `measure.py serve`; here `measure` checks and times at once,
since both need the session. A lost connection is the failure "crash", which may be the server's
fault; a session that its server ended for taking too long is "timeout", the candidate's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tvm import rpc

from kivi_tvm.tune.measure import FORMAT, Wrong
from kivi_tvm.tune.rpc_remote import Remote, read_gb_per_s

# In the errors of a connection that ended, in TVM's C++ and Python.
CONNECTION_WORDS = ("SockChannel", "Socket", "RPC", "connect", "Connect")
Json = dict[str, Any]


class Servers:
    """Sessions on the servers of one key, and the case that is loaded."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given = given
        self.case: Json = {}
        self.running: int | None = None  # of a comparison's candidates

    def answer(self, request: Json) -> Json:
        """The answer to one request."""
        self.running = None
        try:
            found: Json = getattr(self, f"do_{request['do']}")(request)
            return found
        except Wrong as error:
            return _failure("wrong", str(error))
        except Exception as error:
            return _blame(error) | ({} if self.running is None else {"culprit": self.running})

    def do_load(self, request: Json) -> Json:
        self.case = torch.load(request["case"], weights_only=True)
        if self.case["format"] != FORMAT:
            return _failure("load", f"`format` must be {FORMAT}, got {self.case['format']}")
        return {"function": self.case["function"], "nbytes": self.case["nbytes"]}

    def do_device(self, request: Json) -> Json:
        with self.session() as remote:
            count = remote.session.get_function("runtime.NumThreads")
            return {"name": remote.device.device_name, "threads": int(count())}

    def do_measure(self, request: Json) -> Json:
        name = self.case["function"]
        with self.session() as remote:
            module = remote.load(request["library"])
            errors = [remote.check(module[name], call) for call in self.case["check"]]
            error, limit = max(errors, key=lambda e: e[0] / (e[1] or 1))
            if not request["time"]:
                return {"max_error": error, "error_limit": limit}
            times = self._times(remote, module, self._timed(remote))
            return {"max_error": error, "error_limit": limit, "times_us": times}

    def do_compare(self, request: Json) -> Json:
        """One sample per round and library, in turn, the order reversed every round."""
        libraries, rounds = request["libraries"], request["rounds"]
        samples: list[list[float]] = [[] for _ in libraries]
        with self.session(1 + rounds * len(libraries)) as remote:
            modules = []
            for self.running, library in enumerate(libraries):
                modules.append(remote.load(library, self.running))
            arguments = self._timed(remote)
            for number in range(rounds):
                for i in range(len(modules))[:: -1 if number % 2 else 1]:
                    self.running = i
                    times = self._times(remote, modules[i], arguments)
                    samples[i].append(statistics.median(times))
        return {"times_us": samples}

    def do_bandwidth(self, request: Json) -> Json:
        with self.session() as remote:
            rate = read_gb_per_s(remote, request["target"], Path(request["folder"]))
            return {"gb_per_s": rate}

    def _timed(self, remote: Remote) -> list[list[Any]]:
        return [remote.timed_arguments(call) for call in self.case["timed"]]

    def _times(self, remote: Remote, module: Any, arguments: list[list[Any]]) -> list[float]:
        """Samples of the case from those of its calls."""
        samples = []
        for call, given in zip(self.case["timed"], arguments):
            times = remote.times_us(module, self.case["function"], call, given)
            samples.append([call["weight"] * t for t in times])
        return [sum(row) for row in zip(*samples)]

    @contextmanager
    def session(self, share: int = 1) -> Iterator[Remote]:
        """A session on a server that is free, or gets free; `share` times as long as usual."""
        given = self.given
        tracker = rpc.connect_tracker(given.host, given.port)
        try:
            session = tracker.request(given.key, session_timeout=share * given.session_timeout)
        finally:
            tracker.close()
        yield Remote(session, given.threads)


def _blame(error: Exception) -> Json:
    """The failure that an exception of a session means; "lost": it may be the server's fault."""
    lines = str(error).strip().splitlines() or [""]
    if "RPCSessionTimeoutError" in str(error):
        return _failure("timeout", "the session took too long")
    found = _failure("crash", f"{type(error).__name__}: {lines[-1]}")
    return found | {"lost": any(word in str(error) for word in CONNECTION_WORDS)}


def _failure(kind: str, message: str) -> Json:
    return {"failure": {"kind": kind, "message": message}}


def main(words: Sequence[str] | None = None) -> None:
    """Answer requests until stdin ends; what TVM prints goes to stderr."""
    parser = argparse.ArgumentParser()
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("key")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--session-timeout", type=float, default=60.0)
    servers = Servers(parser.parse_args(words))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def send(answer: Json) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    send({"ready": True})
    for line in sys.stdin:
        send(servers.answer(json.loads(line)))


if __name__ == "__main__":
    main()

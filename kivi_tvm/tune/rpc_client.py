"""The near end of RPC measuring: what a tracker knows, and processes that talk to its servers."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kivi_tvm.errors import UserError
from kivi_tvm.tune.guard import Guard
from kivi_tvm.tune.measure import Worker, WorkerFailed

START_TIMEOUT_S = 120.0
TRACKER_TIMEOUT_S = 5.0
Json = dict[str, Any]


def address(text: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`.

    Raises
    ------
    UserError
        It is something else.
    """
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise UserError(f"`--tracker` must be HOST:PORT, got {text!r}")
    return host.strip("[]"), int(port)


def server_keys(host: str, port: int) -> list[str]:
    """The keys of the servers that are registered at a tracker, one per server.

    Raises
    ------
    UserError
        No tracker answers there.
    """
    from tvm.rpc import base

    try:
        with socket.create_connection((host, port), timeout=TRACKER_TIMEOUT_S) as connection:
            connection.sendall(struct.pack("<i", base.RPC_TRACKER_MAGIC))
            magic = struct.unpack("<i", base.recvall(connection, 4))[0]
            if magic != base.RPC_TRACKER_MAGIC:
                raise ConnectionError("what answers is no tracker")
            base.sendjson(connection, [base.TrackerCode.SUMMARY])
            _, summary = base.recvjson(connection)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(
            f"`--tracker` must be a running RPC tracker, got {host}:{port} ({reason}); start one "
            f"with: python -m tvm.exec.rpc_tracker --port {port}"
        ) from error
    return [server["key"].removeprefix("server:") for server in summary["server_info"]]


class Client:
    """A process that talks to servers, started when needed (`rpc_worker`)."""

    def __init__(self, command: Sequence[str], guard: Guard) -> None:
        self._command, self._guard = command, guard
        self._worker: Worker | None = None
        self._loaded: Path | None = None

    def ask(self, request: Json, case: Path | None, seconds: float) -> Json:
        """The answer; "lost" in it means that the connection, and maybe the server, is gone."""
        try:
            worker = self._started()
            if case is not None and case != self._loaded:
                answer = worker.ask({"do": "load", "case": str(case)}, seconds)
                if "failure" in answer:
                    return answer
                self._loaded = case
            return worker.ask(request, seconds)
        except WorkerFailed as error:
            self.close()
            failure = {"kind": error.kind, "message": str(error)}
            # No server got free, or one that is gone never answered.
            return {"failure": failure, "lost": True}

    def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.close()
            self._guard.remove(self._worker.process.pid)
        self._worker = self._loaded = None

    def _started(self) -> Worker:
        if self._worker is None:
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            self._worker = Worker(self._command, environment)
            self._guard.add(self._worker.process.pid)
            self._worker.receive(START_TIMEOUT_S)
        return self._worker

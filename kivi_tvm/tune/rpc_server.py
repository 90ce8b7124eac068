"""A TVM RPC server that goes on after a candidate crashed.

    python -m kivi_tvm.tune.rpc_server --tracker HOST:PORT --key KEY

TVM's own (`python -m tvm.exec.rpc_server`) works too, but stops serving at the first session that
ends by a signal, and stays in memory without saying so. Like TVM's, it runs whatever it is sent:
start it in a trusted network only.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

FIRST_PORT, LAST_PORT = 9090, 9199


def surviving(serving: Callable[..., None]) -> Callable[..., None]:
    """TVM's `_serving`, which raises if the session's process failed, without that."""

    def serve(sock: socket.socket, *arguments: Any) -> None:
        folder = os.getcwd()
        try:
            serving(sock, *arguments)
        except RuntimeError as error:
            logging.getLogger("RPCServer").warning("%s; serving on", error)
            os.chdir(folder)
            sock.close()

    return serve


def main(words: Sequence[str] | None = None) -> None:
    """Serve until killed."""
    parser = argparse.ArgumentParser(prog="kivi_tvm.tune.rpc_server", description=__doc__)
    parser.add_argument("--tracker", required=True, metavar="HOST:PORT")
    parser.add_argument("--key", required=True, help="what `kivi-tvm tune --tracker-key` asks for")
    parser.add_argument("--host", default="127.0.0.1", help="to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, help="default: the first free one from 9090 on")
    given = parser.parse_args(words)
    # A bound pool halves the speed beside another program's threads.
    os.environ.setdefault("TVM_BIND_THREADS", "0")
    from tvm.rpc import server

    server._serving = surviving(server._serving)
    host, _, port = given.tracker.rpartition(":")
    first, last = (given.port, given.port + 1) if given.port else (FIRST_PORT, LAST_PORT)
    state = server.PopenRPCServerState(
        given.host, first, last, tracker_addr=(host, int(port)), key=given.key
    )
    state.thread.join()


if __name__ == "__main__":
    main()

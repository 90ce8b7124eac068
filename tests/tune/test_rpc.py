"""Measuring through an RPC tracker: two servers on this machine, one of them killed meanwhile."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import pytest

from kivi_tvm import targets
from kivi_tvm.compile import schedule_hash, scheduled_function
from kivi_tvm.errors import UserError
from kivi_tvm.host import find_cxx
from kivi_tvm.tune.builder import Builder
from kivi_tvm.tune.candidate import Built, Candidate, Task
from kivi_tvm.tune.rpc import RpcRunner
from kivi_tvm.tune.rpc_client import address, server_keys
from kivi_tvm.tune.rpc_worker import Servers
from kivi_tvm.workloads import Workload

HOST, KEY = "127.0.0.1", "board"
SMALL = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "tokens": 300, "residual_length": 32}
START_S = 60.0
# What a library of `advance` does instead.
FAULTS = {
    "wrong": "return 0;",
    "crash": "*(volatile int*)0 = 1; return 0;",
    "timeout": "for (;;) { volatile int i = 0; i++; }",
}


def free_port():
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


@contextmanager
def running(*words):
    """A Python module as a process group of its own; yields what kills all of it."""
    environment = {**os.environ, "TVM_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-P", "-m", *map(str, words)]
    process = subprocess.Popen(
        command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL
    )

    def kill():
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    try:
        yield kill
    finally:
        kill()


def wait_for(condition):
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        with suppress(UserError):
            if condition():
                return
        time.sleep(0.1)
    raise TimeoutError("the fleet did not start")


@pytest.fixture(scope="module")
def fleet():
    """The tracker's port, and what kills each of its two servers."""
    port, tracker = free_port(), f"{HOST}:"
    options = ("--host", HOST, "--port", port, "--port-end", port + 1, "--silent")
    server = ("kivi_tvm.tune.rpc_server", "--tracker", f"{tracker}{port}", "--key", KEY)
    with running("tvm.exec.rpc_tracker", *options):
        wait_for(lambda: server_keys(HOST, port) == [])
        with (
            running(*server, "--port", free_port()) as first,
            running(*server, "--port", free_port()) as second,
        ):
            wait_for(lambda: len(server_keys(HOST, port)) == 2)
            yield port, first, second


@pytest.fixture(scope="module")
def target():
    return targets.resolve("native")


@pytest.fixture
def runner(fleet, target):
    with RpcRunner(HOST, fleet[0], KEY, target, threads=1, session_timeout=10.0) as found:
        yield found


@pytest.fixture(scope="module")
def builder(target, tmp_path_factory):
    with Builder(target, tmp_path_factory.mktemp("built"), processes=1) as found:
        yield found


def build(builder, target, function, **changes):
    task = Task(function, Workload(**SMALL | {"dtype": "float32"} | changes))
    digest = schedule_hash(function, scheduled_function(function, task.key, target))
    return builder.submit(Candidate(task, {}, digest, "default")).result()


@pytest.fixture
def faulty(tmp_path):
    """Libraries of `advance` that do something else."""

    def make(kind):
        source, library = tmp_path / f"{kind}.cc", tmp_path / f"{kind}.so"
        signature = "int __tvm_ffi_advance(void*, const void*, int, void*)"
        source.write_text(f'extern "C" {signature} {{ {FAULTS[kind]} }}\n')
        subprocess.run([find_cxx(), "-shared", "-fPIC", source, "-o", library], check=True)
        task = Task("advance", Workload(**SMALL, dtype="float32"))
        return Built(Candidate(task, {}, kind), library, 0.0)

    return make


@pytest.mark.slow
def test_measure_and_compare(fleet, runner, builder, target):
    """Every kind of argument goes there and back: words, int32, strided views, three dtypes."""
    built = [
        build(builder, target, "advance"),
        build(builder, target, "append", dtype="bfloat16"),
        build(builder, target, "combine", dtype="float16"),
    ]
    assert [each.failure for each in built] == [None] * 3
    assert (runner.method, runner.device.kind, runner.device.threads) == ("rpc", "cpu", 1)
    found = runner.measure(built)
    for each, source in zip(found, built):
        assert each.failure is None and each.candidate is source.candidate
        assert 0 < each.us < 1e5 and each.max_error <= each.error_limit
    assert found[2].max_error > 0
    first, second = runner.compare([built[2], built[2]], rounds=3)
    assert len(first.times_us) == len(second.times_us) == 3
    assert 0.1 < first.us / second.us < 10
    assert 0.5 < runner.read_gb_per_s() < 5000


@pytest.mark.slow
def test_a_bad_candidate_costs_only_itself(fleet, target, builder, faulty):
    good = build(builder, target, "advance")
    built = [faulty("wrong"), good, faulty("crash"), good, faulty("timeout"), good]
    unbuilt = Built(good.candidate, None, 0.0, None)
    with RpcRunner(HOST, fleet[0], KEY, target, threads=1, session_timeout=3.0) as runner:
        found = runner.measure([*built, unbuilt])
        kinds = [each.failure and each.failure.kind for each in found]
        assert kinds == ["wrong", None, "crash", None, "timeout", None, "build"]
        found = runner.compare([good, faulty("crash")], rounds=1)
        assert [each.failure and each.failure.kind for each in found] == [None, "crash"]
        assert found[0].times_us
    wait_for(lambda: server_keys(HOST, fleet[0]) == [KEY, KEY])


@pytest.mark.slow
def test_a_killed_server_costs_nothing(fleet, runner, builder, target):
    port, kill, _ = fleet
    built = [build(builder, target, "advance")] * 24
    killer = threading.Timer(0.7, kill)
    killer.start()
    found = runner.measure(built)
    assert not killer.is_alive(), "all was done before the server was killed"
    assert [each.failure for each in found] == [None] * len(built)
    assert server_keys(HOST, port) == [KEY]
    with pytest.raises(UserError) as error:
        RpcRunner(HOST, port, "other", target)
    assert str(error.value) == (
        f"the tracker {HOST}:{port} must have a server of --tracker-key='other', got only ['{KEY}']"
    )


@pytest.mark.slow
def test_a_tracker_that_ended_is_no_fault_of_a_candidate():
    given = argparse.Namespace(host=HOST, port=free_port(), key=KEY, session_timeout=1.0)
    servers = Servers(given)
    servers.running = 5  # of a comparison before
    answer = servers.answer({"do": "compare", "libraries": ["a", "b"], "rounds": 3})
    assert answer["lost"] and "culprit" not in answer and "connect" in str(answer["failure"])


def test_unreachable_tracker(target):
    port = free_port()
    with pytest.raises(UserError) as error:
        RpcRunner(HOST, port, KEY, target)
    for words in (f"got {HOST}:{port} (Connection refused)", "python -m tvm.exec.rpc_tracker"):
        assert words in str(error.value)
    with pytest.raises(UserError, match="`--tracker` must be a running RPC tracker"):
        server_keys("nowhere.invalid", 1)


def test_something_else_than_a_tracker():
    with socket.create_server((HOST, 0)) as server:

        def answer():
            with server.accept()[0] as connection:
                connection.sendall(b"HTTP/1.1 400\r\n")

        threading.Thread(target=answer).start()
        with pytest.raises(UserError) as error:
            server_keys(*server.getsockname())
        assert "(what answers is no tracker)" in str(error.value)


def test_address():
    assert address("board.local:9190") == ("board.local", 9190)
    assert address("[::1]:9190") == ("::1", 9190)
    for text in ("board", ":9190", "board:", "board:x", "board:0", "board:70000"):
        with pytest.raises(UserError, match=r"`--tracker` must be HOST:PORT, got "):
            address(text)
